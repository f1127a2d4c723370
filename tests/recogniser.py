"""An ear for the tests: which digits does a wav say, and in which bundled voice?

Segments lie between pauses; a segment is what its nearest bundled clip is, by dynamic time warping
(DTW) over log-mel frames. It shares no code with the package but the clips.
"""

from collections.abc import Callable, Sequence

import numpy as np

from nanomimi.tiny import digits

HOP, WINDOW, BANDS = 480, 1024, 40  # samples, samples, mel bands
Label = tuple[str, int]  # voice, digit


def log_mel(wav: np.ndarray) -> np.ndarray:
    """(S,) -> (T, BANDS), independent of loudness."""
    wav = np.pad(wav / (np.sqrt(np.mean(wav**2)) + 1e-9), WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(wav, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = lambda hz: 2595 * np.log10(1 + hz / 700)
    bins = mel(np.fft.rfftfreq(WINDOW, 1 / digits.SAMPLE_RATE))
    centres = np.linspace(mel(60), mel(8000), BANDS)
    bank = np.clip(1 - np.abs(bins - centres[:, None]) / (centres[1] - centres[0]), 0, None)
    return np.log(power @ bank.T + 1.0)


def dtw(query: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """Mean distance along the best warping path of query (T, BANDS) to each reference."""
    lengths = np.array([len(r) for r in references])
    padded = np.zeros((len(references), lengths.max(), query.shape[1]))
    for row, reference in zip(padded, references):
        row[: len(reference)] = reference
    distance = np.abs(query[:, None, None] - padded[None]).mean(-1)  # (T, references, T')
    previous = np.full((len(references), lengths.max() + 1), np.inf)
    previous[:, 0] = 0
    for row in distance:
        current = np.full_like(previous, np.inf)
        for j in range(row.shape[1]):
            before = np.minimum(np.minimum(previous[:, j], previous[:, j + 1]), current[:, j])
            current[:, j + 1] = row[:, j] + before
        previous = current
    return previous[np.arange(len(references)), lengths] / (len(query) + lengths)


def segments(wav: np.ndarray, pause: float = 0.1) -> list[np.ndarray]:
    """The stretches of sound between pauses (in seconds), at least 0.1 s long."""
    block = digits.SAMPLE_RATE // 100
    level = np.sqrt(np.mean(wav[: len(wav) // block * block].reshape(-1, block) ** 2, axis=1))
    # Low enough to keep the soft s of a dark voice: without it six sounds like two.
    loud = np.flatnonzero(level > 0.02 * np.percentile(level, 95))
    if not len(loud):
        return []
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > pause * 100) + 1)
    return [wav[r[0] * block : (r[-1] + 1) * block] for r in runs if len(r) >= 10]


class Recogniser:
    """Knows every clip as the codec renders it: `through` maps (S,) to its reconstruction."""

    def __init__(self, through: Callable[[np.ndarray], np.ndarray]) -> None:
        self.labels: list[Label] = []
        self.references: list[np.ndarray] = []
        for voice, takes in digits.load_clips().items():
            for take in takes:
                self.labels += [(voice, digit) for digit in range(10)]
                self.references += [log_mel(through(clip)) for clip in take]

    def nearest(self, segment: np.ndarray) -> Label:
        return self.labels[int(dtw(log_mel(segment), self.references).argmin())]

    def __call__(self, wav: np.ndarray) -> list[Label]:
        return [self.nearest(s) for s in segments(wav)]
