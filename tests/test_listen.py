from collections.abc import Callable

import numpy as np
import pytest
import torch

from nanomimi import Codec
from nanomimi.tiny import digits
from nanomimi.tiny import listen as listen_module
from nanomimi.tiny.listen import ListenConfig, continue_wav, listen, make_recogniser
from nanomimi.tokens import separator


class Truth:
    """A model that counts on: it continues three digits with the codes of the next two."""

    def __init__(self, codec: Codec, step: int, voice: str | None = None) -> None:
        self.num_codebooks, self.codebook_size = codec.num_codebooks, codec.codebook_size
        self.codec, self.step, self.voice, self.asked = codec, step, voice, 0

    def generate(self, prompt, num_frames, sampler):
        assert torch.equal(prompt[0, :, :1], separator(self.num_codebooks, self.codebook_size))
        voices = digits.load_clips()
        name = self.voice or list(voices)[self.asked % len(voices)]
        last = self.asked // len(voices) % 10 + 2
        said = [(last + self.step) % 10, (last + 2 * self.step) % 10]
        wav = torch.from_numpy(digits.speak(voices[name], said, np.random.default_rng(0)))
        self.asked += 1
        yield from self.codec.encode(wav[None, None]).unbind(2)
        yield torch.full((1, self.num_codebooks), self.codebook_size)
        yield torch.zeros(1, self.num_codebooks, dtype=torch.long)  # after END: not audible


@pytest.fixture(scope="module")
def recognise() -> Callable:
    return make_recogniser(Codec.load("tiny", 4))


@pytest.mark.parametrize(
    "step, voice, expected", [(1, None, (1.0, 1.0)), (-1, "slt", (0.0, 1 / 7))]
)
def test_the_listener_hears_who_counts_and_in_whose_voice(
    step, voice, expected, recognise, monkeypatch
):
    """Seven prompts, one in each voice."""
    truth = Truth(Codec.load("tiny", 4), step, voice)
    load = lambda _: (truth, {"data": {"codec": "tiny"}})
    monkeypatch.setattr(listen_module.checkpoint, "load", load)
    monkeypatch.setattr(listen_module, "make_recogniser", lambda codec: recognise)
    result = listen(ListenConfig(prompts=7))
    assert (result["right_next_digit"], result["prompts_voice"]) == expected
    assert result["digits"] == 14 and result["silent"] == 0


def test_silence_and_nothing_are_no_digits(recognise):
    assert recognise(np.zeros(0, np.float32)) == recognise(np.zeros(24000, np.float32)) == []


def test_a_continuation_starts_after_the_whole_frames_of_the_prompt():
    codec = Codec.load("tiny", 4)
    wav = digits.load_clips()["rms"][0][0][:5000]
    prompt, new = continue_wav(Truth(codec, step=1), codec, wav, None)
    assert torch.equal(prompt, codec.encode(torch.from_numpy(wav[: 2 * 1920])[None, None]))
    assert new.shape[1] == 4 and (new < codec.codebook_size).all()
