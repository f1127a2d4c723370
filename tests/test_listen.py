"""The listener's numbers are those of continuations whose digits and voices are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomimi import Codec
from nanomimi.audio import resample, write_wav
from nanomimi.tiny import digits
from nanomimi.tiny import listen as listen_module
from nanomimi.tiny.listen import HUMAN, ListenConfig, continue_wav, listen, make_prompts, rate
from nanomimi.tiny.sound import make_recogniser, nearest_speaker, pitch_and_formants
from nanomimi.tiny.sound import render, segments
from nanomimi.tokens import separator

RATE = digits.SAMPLE_RATE
RIGHT, FIRST, VOICE = "right next digit", "first digit right", "prompt's voice"


class Truth:
    """A model whose continuation is what the codec makes of `say`, and then END."""

    def __init__(self, codec: Codec, say: np.ndarray) -> None:
        self.num_codebooks, self.codebook_size = codec.num_codebooks, codec.codebook_size
        self.codec, self.say = codec, say

    def generate(self, prompt, num_frames, sampler):
        assert torch.equal(prompt[0, :, :1], separator(self.num_codebooks, self.codebook_size))
        yield from self.codec.encode(torch.from_numpy(self.say)[None, None]).unbind(2)
        yield torch.full((1, self.num_codebooks), self.codebook_size)
        yield torch.zeros(1, self.num_codebooks, dtype=torch.long)  # after END: not audible


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load("tiny", 4)


def blip(number: int) -> np.ndarray:
    """A tone that stands for a digit, a voice or whatever the number says."""
    t = np.arange(RATE // 4) / RATE
    return 0.3 * np.sin(2 * np.pi * (500 + 100 * number) * t).astype(np.float32)


def number_of(sound: np.ndarray) -> int:
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), RATE))
    return round((int(spectrum.argmax()) - 500) / 100)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """listen(config), where the model answers every prompt with the blips of `answer(prompt)`, and
    the recogniser hears blip d as digit d in the voice and factor of `voice(prompt)`.
    """
    asked = []

    def prompts(*args):
        for u in make_prompts(*args):
            asked.append(u)
            yield u

    class Sounds:
        """A codec that decodes to a prompt of two frames and the answer."""

        num_codebooks, frame_size = 6, 1920

        def decode(self, codes):
            gap = np.zeros(RATE // 5, np.float32)
            pieces = [x for number in self.answer(asked[-1]) for x in (gap, blip(number))]
            wav = np.concatenate([np.ones(2 * self.frame_size, np.float32), *pieces, gap])
            return torch.from_numpy(wav)[None, None]

    def call(answer, voice, **flags) -> dict:
        sounds, patch = Sounds(), monkeypatch.setattr
        sounds.answer = answer
        patch(listen_module.checkpoint, "load", lambda _: (sounds, {"data": {"codec": ""}}))
        patch(listen_module.Codec, "load", lambda *_: sounds)
        patch(listen_module, "make_prompts", prompts)
        continued = torch.zeros(1, 6, 2), torch.zeros(1, 6, 1)
        continue_wav = lambda *args: call.samplers.append(args[-1]) or continued
        patch(listen_module, "continue_wav", continue_wav)
        hear = lambda sounds: (list(map(number_of, sounds)), voice(asked[-1]))
        recogniser = lambda _, voices: call.voices.update(voices) or hear
        patch(listen_module.sound, "make_recogniser", recogniser)
        rates = listen(ListenConfig(run=tmp_path, trials=8, **flags))
        kept = json.loads((tmp_path / "listen.json").read_text())
        assert kept == {", ".join(row): list(numbers) for row, numbers in rates.items()}
        return rates

    call.samplers, call.voices = [], {}
    return call


def test_sounds_are_compared_with_the_plain_take_of_every_voice(run):
    run(lambda u: [0], lambda u: (u.voice, u.factor))
    clips = digits.load_clips()
    assert run.voices.keys() == clips.keys()
    for name, takes in run.voices.items():
        plain = clips[name][{9: 4, 3: 1}[len(clips[name])]]
        assert len(takes) == 1 and all(map(np.array_equal, takes[0], plain))


def test_draws_have_the_temperature(run):
    logits = torch.randn(50, 9)
    for temperature in (0.0, 0.8):
        run(lambda u: [0], lambda u: (u.voice, u.factor), temperature=temperature)
        greedy = torch.equal(run.samplers[-1](logits), logits.argmax(dim=-1))
        assert greedy == (temperature == 0)


@pytest.mark.parametrize("kind", [digits.KNOWN, digits.UNHEARD])
def test_digits_and_voices_are_compared_with_the_prompt(run, kind):
    right = lambda u: [(u.digits[-1] + i) % 10 for i in (1, 2, 4)]  # the third one is wrong
    near = run(right, lambda u: (u.voice, u.factor - 0.07))
    assert near[kind, RIGHT][::2] == (pytest.approx(2 / 3), 24)
    assert near[kind, FIRST] == (1.0, 0.0, 8)
    assert near[kind, VOICE] == (1.0, 0.0, 8)
    assert run(right, lambda u: (u.voice, u.factor + 0.08))[kind, VOICE] == (0.0, 0.0, 8)
    assert run(right, lambda u: ("nobody", u.factor))[kind, VOICE] == (0.0, 0.0, 8)


def test_no_sound_is_no_right_first_digit_and_no_digit(run):
    silent = run(lambda u: [], lambda u: None)
    assert silent[digits.KNOWN, FIRST] == (0.0, 0.0, 8)
    assert silent[digits.KNOWN, RIGHT][0] == 0 and silent[digits.KNOWN, VOICE] == (0.0, 0.0, 8)


def test_prompts_are_three_digits_of_both_kinds_with_voices_that_belong_to_them():
    made = list(make_prompts(20, {}, seed=0))
    assert [u.kind for u in made] == [digits.KNOWN, digits.UNHEARD] * 20
    assert all(b == (a + 1) % 10 for u in made for a, b in zip(u.digits, u.digits[1:]))
    assert {len(u.digits) for u in made} == {3} and len({u.digits for u in made}) > 5
    assert "kal" not in {u.voice for u in made[::2]} and "kal" in {u.voice for u in made[1::2]}


def test_the_standard_error_is_that_of_independent_prompts():
    alone = [[True]] * 30 + [[False]] * 70
    share, error, trials = rate(alone)
    assert (share, trials) == (0.3, 100) and error == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
    # Five trials that always agree are worth one.
    assert rate([hits * 5 for hits in alone])[:2] == pytest.approx((share, error))
    assert rate([[], []])[:2] == (0, 0)


def test_the_recogniser_hears_digit_voice_and_factor(codec):
    """Through the codec, in a take that it has no reference of."""
    voices = {name: digits.load_clips()[name] for name in ("rms", "slt")}
    half = {name: [take[2:5] for take in takes[::2]] for name, takes in voices.items()}
    hear, right = make_recogniser(codec, half), []
    for name, factor in (("rms", 1.0), ("rms", 1.2), ("slt", 0.8), ("slt", 1.0)):
        clips = [resample(d, RATE, round(RATE / factor / 100) * 100) for d in voices[name][1][2:5]]
        said, (voice, heard) = hear([render(codec, clip) for clip in clips])
        right += [digit == i for i, digit in enumerate(said)]
        assert voice == name and abs(heard - factor) < 0.08
    assert len(right) == 12 and np.mean(right) >= 0.9
    # The voice is judged from all sounds: one in another voice changes nothing, first or last.
    rms, slt = (render(codec, voices[name][1][2]) for name in ("rms", "slt"))
    assert hear([slt, rms, rms])[1][0] == hear([rms, rms, slt])[1][0] == "rms"


def vowel(f0: float, formants: tuple[float, ...], seconds: float = 0.5) -> np.ndarray:
    """Pulses that fall by 6 dB an octave, as a voice's do, and a resonance for every formant."""
    wav = np.zeros(round(seconds * RATE))
    wav[np.arange(0, len(wav), RATE / f0).astype(int)] = 1
    n = np.arange(RATE // 10)
    wav = np.convolve(wav, 0.97**n)
    for formant in formants:  # 80 Hz wide
        pole = np.exp((-np.pi * 80 + 2j * np.pi * formant) / RATE)
        wav = np.convolve(wav, np.imag(pole ** (n + 1)))
    wav = wav[: round(seconds * RATE)]
    return (0.5 * wav / np.abs(wav).max()).astype(np.float32)


VOWELS = {"a": (700, 1200, 2500, 3500), "i": (300, 2200, 2900, 3500), "er": (500, 1500, 2500, 3500)}


@pytest.mark.parametrize("f0", [85, 120, 180])
@pytest.mark.parametrize("name", VOWELS)
def test_pitch_and_formants_are_those_of_a_vowel(f0, name):
    found = np.exp(pitch_and_formants(vowel(f0, VOWELS[name])))
    assert found[0] == pytest.approx(f0, rel=0.02)
    assert found[1:] == pytest.approx(VOWELS[name][:3], rel=0.06)


def test_the_pitch_of_a_tone_is_its_frequency():
    for hz in (80, 130, 250, 350):
        tone = np.sin(2 * np.pi * hz * np.arange(RATE) / RATE).astype(np.float32)
        assert np.exp(pitch_and_formants(tone))[0] == pytest.approx(hz, rel=0.02)


def test_the_nearest_speaker_is_the_one_with_the_same_pitch_and_formants():
    """For each vowel as a digit: speakers differ in pitch, or in formants alone."""
    speakers = {"low": (100, 1.0), "high": (160, 1.0), "short": (100, 1.2)}
    said = lambda f0, size: [vowel(f0, tuple(size * f for f in VOWELS[v])) for v in VOWELS]
    profiles = {n: [pitch_and_formants(v) for v in said(*how)] for n, how in speakers.items()}
    for name, (f0, size) in speakers.items():
        sounds = said(1.05 * f0, size)
        assert nearest_speaker(sounds[1:], [1, 2], profiles) == name


@pytest.fixture
def people(tmp_path) -> Path:
    """Anna in twelve takes and Ben in one say all digits, Carl says one."""
    (tmp_path / "anna").mkdir()
    for digit in range(10):
        for take in range(12):
            write_wav(tmp_path / "anna" / f"{digit}_{take}.wav", blip(digit), RATE)
        write_wav(tmp_path / f"{digit}_ben_0.wav", 0.1 * blip(digit), RATE)
    write_wav(tmp_path / "1_carl_0.wav", blip(1), RATE)
    return tmp_path


def test_people_are_read_from_both_layouts(people):
    voices = digits.read_voices(people)
    assert {name: len(takes) for name, takes in voices.items()} == {"anna": 10, "ben": 1}
    for takes in voices.values():
        assert [number_of(clip) for clip in takes[0]] == list(range(10))
        assert np.abs(takes[0][3]).max() == pytest.approx(0.7, abs=0.01)
    with pytest.raises(ValueError, match="two speakers of all digits"):
        digits.read_voices(people / "anna")


def test_peoples_voices_are_told_by_the_nearest_speaker(people, run, monkeypatch):
    """Here always Anna. One answer in two is silence: no digit, and nobody's voice."""
    monkeypatch.setattr(listen_module.sound, "render", lambda codec, wav: wav)
    asked = []

    def nearest(sounds, said, profiles):
        assert list(map(number_of, sounds)) == said and set(profiles) == {"anna", "ben"}
        assert all(len(profile) == 10 and profile[3].shape == (4,) for profile in profiles.values())
        return "anna"

    def answer(u):
        if u.kind != HUMAN:
            return []
        asked.append(u)
        assert list(map(number_of, segments(u.wav))) == list(u.digits)
        return [(u.digits[-1] + 1) % 10] * (len(asked) % 2)

    monkeypatch.setattr(listen_module.sound, "nearest_speaker", nearest)
    result = run(answer, lambda u: ("", 1.0), prompts=people)
    annas = [u.voice == "anna" for u in asked[::2]]
    assert 0 < sum(annas) < len(annas) == 4
    assert result[HUMAN, FIRST][::2] == (0.5, 8)
    assert result[HUMAN, VOICE][::2] == (sum(annas) / 8, 8)


def test_a_continuation_starts_after_the_whole_frames_of_the_prompt(codec):
    wav = digits.load_clips()["rms"][0][0]
    prompt, new = continue_wav(Truth(codec, wav), codec, wav[:5000], None)
    assert torch.equal(prompt, codec.encode(torch.from_numpy(wav[: 2 * 1920])[None, None]))
    assert torch.equal(new, codec.encode(torch.from_numpy(wav)[None, None]))
