"""Voices that count: hours of utterances composed from the bundled clips, the same in every run.

In an utterance, one voice counts upwards modulo ten from a random digit, at one pitch. The rate of
every digit, the pauses and the loudness vary, and so does the *voice factor*: playing the utterance
faster or slower moves pitch and formants together and makes many speakers of a voice.

Never in training: the voice kal, the middle fifth of every other voice's factors, and every voice's
take at plain rate and pitch. Validation has these takes alone, half in voices and at factors of
training (KNOWN), half in kal or at held-out factors (UNHEARD). Training hears all digit sequences.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomimi.audio import audio_files, read_audio, resample

FOLDER = Path(__file__).parent / "digits"
SAMPLE_RATE = 24000  # of the clips, and the unit of index.csv
PAUSE = (0.12, 0.30)  # seconds between digits; longer than the silence inside "six" or "eight"
GAIN = (-4.0, 0.0)  # dB
TRAIN, KNOWN, UNHEARD = "train", "known voices, unheard takes", "unheard voices"  # the kinds
# Voice factors at which a speech recogniser hears about 90% of the clips right: see README.md.
FACTORS = dict(awb=(0.9, 1.3), rms=(0.9, 1.3), kal=(0.9, 1.3), ked=(0.9, 1.25), slt=(0.75, 1.05))
FACTORS |= dict(kh0=(0.8, 1.05), lh0=(0.8, 1.05))
# A man of middle pitch. ked, made in the same way, is in training: only the speaker is unheard.
HELD_OUT_VOICE = "kal"

Voice = list[list[np.ndarray]]  # clips[take][digit] is (S,) float32
Rng = np.random.Generator


@dataclass(frozen=True)
class Utterance:
    """One composed utterance; `wav` is (S,) float32 at SAMPLE_RATE."""

    split: str  # "train" or "val"
    kind: str  # TRAIN, KNOWN or UNHEARD
    voice: str
    factor: float
    digits: tuple[int, ...]
    wav: np.ndarray


def load_clips() -> dict[str, Voice]:
    """The bundled clips: voice -> take -> digit -> (S,) float32 at SAMPLE_RATE."""
    wavs = {name: read_audio(FOLDER / f"{name}.ogg", SAMPLE_RATE) for name in FACTORS}
    voices: dict[str, Voice] = {name: [] for name in FACTORS}
    for row in csv.DictReader((FOLDER / "index.csv").read_text().splitlines()):
        takes, start, length = voices[row["voice"]], int(row["start"]), int(row["length"])
        if int(row["take"]) == len(takes):
            takes.append([])
        takes[-1].append(wavs[row["voice"]][start : start + length])
    return voices


def read_voices(folder: Path) -> dict[str, Voice]:
    """People in ten takes at most, of SPEAKER/DIGIT_TAKE.wav or DIGIT_SPEAKER_TAKE.wav."""
    said = defaultdict(lambda: [[] for _ in range(10)])
    for path in audio_files([folder]):
        if name := re.fullmatch(r"(\d)_(?:(.+)_)?\d+", path.stem):
            wav = read_audio(path, SAMPLE_RATE)
            wav *= 0.7 / max(1e-3, np.abs(wav).max())  # the peak of the bundled clips
            said[name[2] or path.parent.name][int(name[1])].append(wav)
    voices = {name: list(zip(*clips))[:10] for name, clips in said.items() if all(clips)}
    if len(voices) < 2:
        raise ValueError(f"{folder} needs two speakers of all digits, in SPEAKER/DIGIT_TAKE.wav")
    return voices


def speak(voice: Voice, digits: Sequence[int], rng: Rng, factor: float = 1.0) -> np.ndarray:
    """(S,) float32: the digits in random takes, with random pauses around and between them."""
    rate = 100 * round(SAMPLE_RATE / factor / 100)  # a round number: its Fourier transform is fast
    # Resampling shortens the pauses by the factor: they end as long as PAUSE says.
    pause = lambda: np.zeros(int(rng.uniform(*PAUSE) * factor * SAMPLE_RATE), np.float32)
    pieces = [piece for d in digits for piece in (pause(), voice[rng.integers(len(voice))][d])]
    wav = resample(np.concatenate([*pieces, pause()]), SAMPLE_RATE, rate)
    return wav * np.float32(10 ** (rng.uniform(*GAIN) / 20))


def utter(voices: dict[str, Voice], digits: Sequence[int], kind: str, rng: Rng) -> Utterance:
    """The digits in a random voice, with a factor and takes that belong to the kind."""
    name = str(rng.choice([name for name in voices if name != HELD_OUT_VOICE]))
    # In shares of the voice's range; 1.4 stands for 0.4, so training and KNOWN get one interval.
    shares = (0.4, 0.6) if kind == UNHEARD else (0.6, 1.4)
    if kind == UNHEARD and rng.random() < 0.5:
        name, shares = HELD_OUT_VOICE, (0.0, 1.0)
    low, high = FACTORS[name]
    factor = low + (high - low) * (rng.uniform(*shares) % 1)
    takes, middle = voices[name], len(voices[name]) // 2
    row = 3 * int(rng.integers(len(takes) // 3))  # an utterance has one pitch
    own = [i for i in range(row, row + 3) if i != middle] if kind == TRAIN else [middle]
    wav = speak([takes[i] for i in own], digits, rng, factor)
    return Utterance("train" if kind == TRAIN else "val", kind, name, factor, tuple(digits), wav)


def utterances(
    hours: float, val_fraction: float, seed: int, max_digits: int = 16
) -> Iterator[Utterance]:
    """Utterances that count, at least `hours` of audio in all; equal arguments give equal audio."""
    voices, rng, seconds = load_clips(), np.random.default_rng(seed), 0.0
    while seconds < hours * 3600:
        kind = (KNOWN, UNHEARD)[rng.integers(2)] if rng.random() < val_fraction else TRAIN
        start, count = int(rng.integers(10)), int(rng.integers(max_digits // 2, max_digits + 1))
        yield (u := utter(voices, [(start + i) % 10 for i in range(count)], kind, rng))
        seconds += len(u.wav) / SAMPLE_RATE
