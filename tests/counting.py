"""Does a run count aloud, and in the prompt's voice? python -m tests.counting --run runs/digits

A hundred prompts of three digits go through all voices and starts. What the run makes of them is
cut at its pauses and recognised: a digit is right if it follows the one before it, a voice if it is
the prompt's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanomimi import checkpoint, sample, separator
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run
from nanomimi.tiny import digits
from nanomimi.tokens import before_end
from tests.recogniser import Label, Recogniser

PROMPTS = 100


@dataclass(frozen=True)
class CountingConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    seconds: float = option(5.0, "seconds of continuation", above=0)
    temperature: float = option(0.8, "temperature of the draws", at_least=0)
    top_k: int = option(30, "top-k of the draws", at_least=0)
    seed: int = option(0, "seed of prompts and draws", at_least=0)


def recogniser(codec: Codec) -> Recogniser:
    """Compares with the bundled clips as this codec renders them."""

    def through(clip: np.ndarray) -> np.ndarray:
        return codec.decode(codec.encode(torch.from_numpy(clip)[None, None]))[
            0, 0, : len(clip)
        ].numpy()

    return Recogniser(through)


def continuations(config: CountingConfig) -> Iterator[tuple[str, int, list[Label]]]:
    """Per prompt: its voice, its last digit, and the digits recognised behind it."""
    model, about = checkpoint.load(config.run)
    codec = Codec.load(about["data"]["codec"], model.num_codebooks)
    hear, rng = recogniser(codec), np.random.default_rng(config.seed)
    draw = partial(
        sample,
        temperature=config.temperature,
        top_k=config.top_k,
        generator=torch.Generator().manual_seed(config.seed),
    )
    frames = round(config.seconds * codec.frame_rate)
    voices = list(digits.load_clips().items())
    for i in range(PROMPTS):
        (name, voice), start = voices[i % len(voices)], i // len(voices) % 10
        wav = digits.speak(voice, [(start + k) % 10 for k in range(3)], rng)
        wav = torch.from_numpy(wav[: len(wav) // codec.frame_size * codec.frame_size])
        prompt = codec.encode(wav[None, None])[0]
        codes = torch.cat([separator(model.num_codebooks, model.codebook_size), prompt], dim=1)
        new = torch.stack(list(model.generate(codes[None], frames, draw)), dim=2)[0]
        codes = torch.cat([prompt, before_end(new, codec.codebook_size)], dim=1)
        heard = codec.decode(codes[None])[0, 0, prompt.shape[1] * codec.frame_size :].numpy()
        yield name, (start + 2) % 10, hear(heard) if len(heard) else []


def measure(config: CountingConfig) -> dict[str, float]:
    """Shares of right next digits and of right voices among the digits recognised."""
    right = own = total = silent = 0
    for voice, last, labels in tqdm(continuations(config), total=PROMPTS, unit="prompt"):
        silent += not labels
        for heard_voice, digit in labels:
            right += digit == (last + 1) % 10
            own += heard_voice == voice
            total, last = total + 1, digit
    return {
        "right_next_digit": right / max(1, total),
        "prompts_voice": own / max(1, total),
        "digits": total,
        "silent": silent,
    }


if __name__ == "__main__":
    run(CountingConfig, lambda config: print(measure(config)), __doc__)
