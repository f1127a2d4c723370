"""Voices that count: hours of utterances composed from the bundled clips, the same in every run.

In an utterance, one voice counts upwards modulo ten from a random digit, for 4 to 8 digits. The
take of every digit, the pauses and the loudness vary. Training and validation share the clips but
not the sequences: if 7 8 9 0 by some voice is in validation, it is not an utterance in training.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomimi.audio import read_audio

FOLDER = Path(__file__).parent / "digits"
SAMPLE_RATE = 24000  # of the clips, and the unit of index.csv
PAUSE = (0.12, 0.30)  # seconds between digits; longer than the silence inside "six" or "eight"
GAIN = (-4.0, 0.0)  # dB

Voice = list[list[np.ndarray]]  # clips[take][digit] is (S,) float32


@dataclass(frozen=True)
class Utterance:
    """One composed utterance; `wav` is (S,) float32 at SAMPLE_RATE."""

    split: str  # "train" or "val"
    voice: str
    digits: tuple[int, ...]
    wav: np.ndarray


def load_clips() -> dict[str, Voice]:
    """The bundled clips: voice -> take -> digit -> (S,) float32 at SAMPLE_RATE."""
    voices: dict[str, Voice] = {}
    wavs: dict[str, np.ndarray] = {}
    with open(FOLDER / "index.csv", newline="") as index:
        for row in csv.DictReader(index):
            name, start, length = row["voice"], int(row["start"]), int(row["length"])
            if name not in wavs:
                wavs[name] = read_audio(FOLDER / f"{name}.ogg", SAMPLE_RATE)
            takes = voices.setdefault(name, [])
            if int(row["take"]) == len(takes):
                takes.append([])
            takes[-1].append(wavs[name][start : start + length])
    return voices


def speak(voice: Voice, digits: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """(S,) float32: the digits in random takes, with random pauses around and between them."""
    pieces = []
    for digit in digits:
        pieces += [_pause(rng), voice[rng.integers(len(voice))][digit]]
    wav = np.concatenate([*pieces, _pause(rng)])
    return wav * np.float32(10 ** (rng.uniform(*GAIN) / 20))


def utterances(hours: float, val_fraction: float, seed: int) -> Iterator[Utterance]:
    """Utterances that count, at least `hours` of audio in all; equal arguments give equal audio."""
    voices, rng = load_clips(), np.random.default_rng(seed)
    sequences = [(v, start, n) for v in voices for start in range(10) for n in range(4, 9)]
    rng.shuffle(sequences)
    num_val = round(val_fraction * len(sequences))
    seconds = 0.0
    while seconds < hours * 3600:
        choice = rng.integers(len(sequences))
        name, start, n = sequences[choice]
        digits = tuple((int(start) + i) % 10 for i in range(int(n)))
        wav = speak(voices[name], digits, rng)
        seconds += len(wav) / SAMPLE_RATE
        yield Utterance("val" if choice < num_val else "train", name, digits, wav)


def _pause(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(int(rng.uniform(*PAUSE) * SAMPLE_RATE), np.float32)
