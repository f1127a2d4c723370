"""Sounds compared: mel distance, a recogniser of digits and voices, pitch and formants."""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanomimi.audio import resample
from nanomimi.codec import Codec
from nanomimi.tiny.digits import FACTORS, SAMPLE_RATE, Voice

WINDOWS = {2048: 80, 1024: 64, 512: 40, 256: 32, 128: 20}  # samples: mel bands
FLOOR = 3e-4  # mean amplitude of a mel band, about -70 dB: lower levels count as silence
STEP = 0.05  # of the recogniser's grid of voice factors


def log_mel(wav: Tensor, window_size: int, bands: int) -> Tensor:
    """(B, S) -> (B, bands, windows): log mean amplitude of the mel bands."""
    weights = _mel_weights(window_size, bands).to(wav.device)
    return torch.log(FLOOR + weights @ _stft(wav, window_size).abs())


def mel_distance(wav: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of log-mels over the scales, in nepers; both (B, S)."""
    scales = [(log_mel(wav, *s) - log_mel(target, *s)).abs().mean() for s in WINDOWS.items()]
    return torch.stack(scales).mean()


def low_error(out: Tensor, wav: Tensor) -> Tensor:
    """Error below 1.5 kHz, in windows that resolve harmonics, as a share of energy; both (B, 1, S).

    Magnitudes, which show pitch, weigh most: phase costs bits. Crops of silence count little.
    """
    power = lambda x: x.abs().square().mean(dim=2).sum(dim=1)
    share = lambda a, b: (0.7 * power(a.abs() - b.abs()) + 0.3 * power(a - b)) / (power(b) + 1e-4)
    low = lambda size: [_stft(x[:, 0], size)[:, : size * 1500 // SAMPLE_RATE] for x in (out, wav)]
    return torch.stack([share(*low(size)) for size in (2048, 1024)]).mean()


def _stft(wav: Tensor, size: int) -> Tensor:
    """(B, S) -> (B, bins, windows), complex: weighted means, not sums."""
    window = torch.hann_window(size, device=wav.device)
    return torch.stft(wav, size, size // 4, window=window / window.sum(), return_complex=True)


@functools.cache
def _mel_weights(window_size: int, bands: int) -> Tensor:
    """(bands, window_size // 2 + 1): triangles equally spaced in mel, each with the sum one."""
    nyquist = SAMPLE_RATE / 2
    bins = torch.linspace(0, nyquist, window_size // 2 + 1)
    mels = torch.linspace(0, 2595 * math.log10(1 + nyquist / 700), bands + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    # A low band can be narrower than a bin and contain none; one bin is the least width.
    width = edges.diff().clamp(min=float(bins[1]))
    rise = 1 - (edges[1:-1, None] - bins) / width[:-1, None]
    fall = 1 - (bins - edges[1:-1, None]) / width[1:, None]
    weights = torch.minimum(rise, fall).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def clip_mel(wav: np.ndarray) -> np.ndarray:
    """(S,) -> (T, 40 bands), independent of loudness; a frame every 21 ms."""
    level = np.sqrt(np.mean(wav**2)) + 1e-9
    return log_mel(torch.from_numpy(0.1 * wav / level)[None], 2048, 40)[0].T.numpy()


def dtw(query: np.ndarray, references: list[np.ndarray]) -> np.ndarray:
    """Mean distance along the best warping path of query (T, 40) to each reference."""
    lengths = np.array([len(r) for r in references])
    padded = pad_sequence([torch.from_numpy(r) for r in references])  # (T', references, 40)
    distances = torch.cdist(torch.from_numpy(query), padded.flatten(0, 1), p=1) / padded.shape[2]
    best = np.full((max(lengths) + 1, len(references)), np.inf)
    best[0] = 0
    for frame in distances.unflatten(1, padded.shape[:2]).numpy():
        previous, best = best, np.full_like(best, np.inf)
        for j, step in enumerate(frame):
            best[j + 1] = step + np.minimum.reduce((previous[j], previous[j + 1], best[j]))
    return best[lengths, np.arange(len(references))] / (len(query) + lengths)


def segments(wav: np.ndarray, pause: float = 0.1) -> list[np.ndarray]:
    """Sounds of at least 0.1 s, each followed by a pause (in seconds): none is cut at the end."""
    block = SAMPLE_RATE // 100
    level = np.sqrt(np.mean(wav[: len(wav) // block * block].reshape(-1, block) ** 2, axis=1))
    # Low enough to keep the soft s of a low voice: without it, six sounds like two.
    loud = np.flatnonzero(level > 0.02 * np.percentile(level, 95)) if len(level) else level
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > pause * 100) + 1)
    runs = [r for r in runs if len(r) >= 10 and r[-1] + pause * 100 < len(level)]
    return [wav[int(r[0]) * block : int(r[-1] + 1) * block] for r in runs]


def make_recogniser(codec: Codec, voices: dict[str, Voice]) -> Callable:
    """A function: sounds (S,) of one voice -> the digit of each, and (voice, factor) of all.

    A digit is that of the nearest clip, as the codec renders it. The voice at a factor is the one
    whose clips are nearest in the mean over the sounds: one alone tells too little of a voice.
    """
    digits, references, speakers = [], [], {}  # (voice, factor): its first reference
    for voice, takes in voices.items():
        low, high = FACTORS.get(voice, (1.0, 1.0))
        for factor in np.arange(low, high + STEP / 2, STEP):
            speakers[voice, float(factor)] = len(references)
            for digit, clip in (pair for take in takes for pair in enumerate(take)):
                wav = resample(clip, SAMPLE_RATE, 100 * round(SAMPLE_RATE / factor / 100))
                digits.append(digit)
                references.append(clip_mel(render(codec, wav)))

    def recognise(sounds: list[np.ndarray]) -> tuple[list[int], tuple[str, float]]:
        away = np.stack([dtw(clip_mel(sound), references) for sound in sounds])
        nearest = np.minimum.reduceat(away, list(speakers.values()), axis=1).mean(axis=0).argmin()
        return [digits[i] for i in away.argmin(axis=1)], list(speakers)[nearest]

    return recognise


def render(codec: Codec, wav: np.ndarray) -> np.ndarray:
    """(S,) -> (S,): encoded and decoded."""
    codes = codec.encode(torch.from_numpy(wav)[None, None])
    return codec.decode(codes)[0, 0, : len(wav)].numpy()


def nearest_speaker(
    sounds: list[np.ndarray], said: list[int], profiles: dict[str, list[np.ndarray]]
) -> str:
    """The speaker whose profile[digit], F0 and formants, is nearest to sounds that say digits."""
    found = [pitch_and_formants(sound) for sound in sounds]
    away = lambda profile: sum(np.abs(f - profile[d]).sum() for f, d in zip(found, said))
    return min(profiles, key=lambda name: away(profiles[name]))


def pitch_and_formants(wav: np.ndarray) -> np.ndarray:
    """(S,) -> (4,) log Hz: F0 and three formants, medians over the most voiced half of the frames.

    F0 is the highest peak of the autocorrelation; formants are poles of linear prediction (LPC).
    """
    size, hop = SAMPLE_RATE // 20, SAMPLE_RATE // 100
    window = np.hanning(size)
    frames = sliding_window_view(np.pad(wav, (0, size)), size)[::hop] * window
    power, own = (np.abs(np.fft.rfft(x, 2 * size)) ** 2 for x in (frames, window))
    lags = np.arange(SAMPLE_RATE // 400, SAMPLE_RATE // 60)
    # The window's own decay is divided out. Of equal peaks, at multiples of a period, the first.
    peaks = np.fft.irfft(power)[:, lags] / (np.fft.irfft(own)[lags] * lags**0.1)
    voiced = peaks.max(axis=1) >= np.median(peaks.max(axis=1))
    f0 = np.median(SAMPLE_RATE / lags[peaks[voiced].argmax(axis=1)])
    # Autocorrelation of what is below 4 kHz, after pre-emphasis by 1 - 0.9 / z.
    low = power[voiced, : 8000 * size // SAMPLE_RATE + 1]
    r = np.fft.irfft(low * (1.81 - 1.8 * np.cos(np.linspace(0, np.pi, low.shape[1]))))
    order = np.arange(10)
    toeplitz = r[:, np.abs(order[:, None] - order)] + 1e-9 * np.eye(10)
    companion = np.tile(np.eye(10, k=-1), (len(r), 1, 1))
    companion[:, 0] = np.linalg.solve(toeplitz, r[:, 1:11, None])[..., 0]
    poles = np.linalg.eigvals(companion)
    hz = np.where(np.abs(poles) > 0.8, np.angle(poles), 0) * 4000 / np.pi
    formants = np.sort(np.where(hz > 150, hz, 4000))[:, :3]  # missing ones are at 4 kHz
    return np.log([f0, *np.median(formants, axis=0)])
