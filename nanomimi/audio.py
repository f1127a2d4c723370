"""Step 0, files <-> wav: mono samples at the codec's rate. The only file that imports sphn."""

import contextlib
import re
import sys
import wave
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sphn

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
FORMATS = ", ".join(suffix[1:] for suffix in AUDIO_SUFFIXES)
STDOUT = Path("-")


def audio_files(paths: Iterable[Path]) -> list[Path]:
    """Audio files below folders, sorted, and files given themselves, or FileNotFoundError."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give folders or files of audio")
        inside = (f for f in path.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES and f.is_file())
        files += sorted(inside) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def read_audio(path: Path, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """The file, or its first `max_seconds`, as (S,) float32 at `sample_rate`, channels averaged.

    An hour of stereo at 44.1 kHz takes about 2 GB. Raises FileNotFoundError and ValueError.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    with _sphn_errors(path):
        pcm, rate = (sphn.read_opus if path.suffix.lower() == ".opus" else sphn.read)(str(path))
        # Only these headers give the exact length; Xing and Info are those of an mp3.
        exact = re.search(b"^RIFF|^fLaC|Xing|Info", path.open("rb").read(4096))
        announced = sphn.FileReader(str(path)).duration_sec if exact else 0.0
    if not pcm.size:
        raise ValueError(f"{path} has no samples")
    if not 4000 <= rate <= 384_000:
        raise ValueError(f"{path} has a sample rate of {rate} Hz; 4 to 384 kHz are possible")
    if pcm.shape[1] < round(announced * rate):
        raise ValueError(f"{path} is truncated: its header announces {announced:.1f} s")
    if not -100 < pcm.min() <= pcm.max() < 100:  # false for NaN
        raise ValueError(f"{path} has samples that are not finite or far outside -1 to 1")
    pcm = pcm if max_seconds is None else pcm[:, : round(max_seconds * rate)]
    return resample(pcm[0] if len(pcm) == 1 else pcm.mean(axis=0), rate, sample_rate)


@contextlib.contextmanager
def _sphn_errors(path: Path) -> Iterator[None]:
    """As ValueErrors. sphn is in Rust; its panics are a BaseException that cannot be imported."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split(": ", 1)[-1].split())
        raise ValueError(f"{path} cannot be read as audio ({reason}); give {FORMATS}") from None


def resample(wav: np.ndarray, source: int, target: int) -> np.ndarray:
    """(S,) at `source` Hz -> (ceil(S * target / source),) at `target` Hz, by a Fourier
    transform that is cut or padded: no delay, and nothing above half of the lower rate is left.
    """
    if source == target:
        return wav
    # A minute at a time bounds the memory. The transform is circular, so every minute gets a second
    # of its neighbours on both sides, and loses it afterwards.
    padded, pieces = np.pad(wav, (source, source + -len(wav) % source)), []
    for start in range(0, len(padded) - 2 * source, 60 * source):
        block = padded[start : start + 62 * source]
        out = np.fft.irfft(np.fft.rfft(block), len(block) // source * target)
        pieces.append(out[target:-target] * np.float32(target / source))
    return np.concatenate(pieces)[: -(-len(wav) * target // source)]


def trim_silence(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """(S,) from 0.2 s before its first sound to 0.2 s after its last, its loudest 20 ms at -14 dB.

    A sound is what is within 26 dB of the loudest. All silence: (0,).
    """
    margin = sample_rate // 5
    power = np.convolve(wav**2, np.full(sample_rate // 50, 50 / sample_rate), "same")
    loud = np.flatnonzero(power > max(1e-7, power.max() / 400))
    if not len(loud):
        return wav[:0]
    sound = np.pad(wav, margin)[loud[0] : loud[-1] + 2 * margin]
    return sound * np.float32(0.2 / power.max() ** 0.5)


def write_wav(path: Path, wav: np.ndarray, sample_rate: int) -> None:
    """Write (S,) float32 in [-1, 1] as 16-bit wav."""
    with open_wav(path, sample_rate) as write:
        write(wav)


@contextlib.contextmanager
def open_wav(path: Path, sample_rate: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends (S,) float32 to a 16-bit wav, or to STDOUT, there as s16le."""
    pcm = lambda wav: (np.clip(wav, -1, 1) * 32767).round().astype("<i2").tobytes()
    if path == STDOUT:
        yield lambda wav: (sys.stdout.buffer.write(pcm(wav)), sys.stdout.buffer.flush())
        return
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, sample_rate, 0, "NONE", ""))  # mono, 2 bytes a sample
        yield lambda wav: file.writeframesraw(pcm(wav))
