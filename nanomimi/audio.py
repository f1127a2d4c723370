"""Step 0, files <-> wav: mono samples at the codec's rate. The only file that imports sphn."""

import contextlib
import functools
import sys
import wave
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sphn

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
PIPE = Path("-")  # standard output in the place of a file
CHUNK_SECONDS = 10  # what is read and encoded at once: memory stays constant however long the audio


def audio_files(paths: Iterable[Path]) -> list[Path]:
    """The audio files below folders, sorted, and files named themselves, or FileNotFoundError."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give folders or files of audio")
        inside = (f for f in path.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES and f.is_file())
        files += sorted(inside) if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def read_audio(path: Path, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """The file, or its first `max_seconds`, as mono (S,) float32. Raises as read_chunks does."""
    needed = None if max_seconds is None else round(max_seconds * sample_rate)
    pieces, length = [], 0
    for chunk in read_chunks(path, sample_rate):
        pieces.append(chunk)
        length += len(chunk)
        if needed is not None and length >= needed:
            break
    return np.concatenate(pieces)[:needed]


def read_chunks(path: Path, sample_rate: int) -> Iterator[np.ndarray]:
    """The file in pieces (S,) float32 of CHUNK_SECONDS at `sample_rate`, channels averaged.

    wav and flac are read piece by piece; mp3, ogg and opus, where positions or lengths are not
    exact, are held in memory whole. Raises FileNotFoundError, and ValueError where the file is not
    audio, has no samples or ends before the length that its header announces.
    """
    read, length, rate = _open(path)
    step = CHUNK_SECONDS * rate
    for start in range(0, length, step):
        # A second more on either side lets the resampler run over the seams of the pieces.
        before = min(start, rate)
        wav = resample(read(start - before, start + step + rate), rate, sample_rate)
        end = -(-min(step, length - start) * sample_rate // rate)
        yield wav[before * sample_rate // rate :][:end]


def resample(wav: np.ndarray, source: int, target: int) -> np.ndarray:
    """(S,) at `source` Hz -> (ceil(S * target / source),) at `target` Hz, in time with it."""
    if source == target:
        return wav
    delay = _resampling_delay(source, target)
    # Enough silence behind the last sample to push it through the resampler.
    padded = np.pad(wav, (0, delay * source // target + source // 10))
    return sphn.resample(padded[None], source, target)[0][
        delay : delay + -(-len(wav) * target // source)
    ]


def write_wav(path: Path, wav: np.ndarray, sample_rate: int) -> None:
    """Write (S,) float32 in [-1, 1] as 16-bit wav."""
    with open_wav(path, sample_rate) as write:
        write(wav)


@contextlib.contextmanager
def open_wav(path: Path, sample_rate: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that appends (S,) float32 to a 16-bit wav, or to standard output (PIPE).

    Standard output gets the samples alone, little-endian, at once: what players call s16le.
    """

    def pcm(wav: np.ndarray) -> bytes:
        return (np.clip(wav, -1, 1) * 32767).round().astype("<i2").tobytes()

    if path == PIPE:
        yield lambda wav: (sys.stdout.buffer.write(pcm(wav)), sys.stdout.buffer.flush())
        return
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        yield lambda wav: file.writeframesraw(pcm(wav))


@functools.cache
def _resampling_delay(source: int, target: int) -> int:
    """sphn's resampler answers late, by an amount that its rates decide: ask with an impulse."""
    impulse = np.zeros((1, 2 * source), np.float32)
    impulse[0, source] = 1
    return int(np.abs(sphn.resample(impulse, source, target)[0]).argmax()) - target


def _open(path: Path) -> tuple[Callable[[int, int], np.ndarray], int, int]:
    """-> read(start, stop) -> mono (S,), length in samples, sample rate."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix.lower() in (".wav", ".flac"):
            return _open_seekable(path)
        pcm, rate = (
            sphn.read_opus(str(path)) if path.suffix.lower() == ".opus" else sphn.read(str(path))
        )
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as audio ({str(error).split(': ', 1)[-1]}); "
            f"supported are {', '.join(AUDIO_SUFFIXES)}"
        ) from None
    mono = pcm[0] if len(pcm) == 1 else pcm.mean(axis=0)
    if not len(mono):
        raise ValueError(f"{path} has no samples")
    return lambda start, stop: mono[start:stop], len(mono), rate


def _open_seekable(path: Path) -> tuple[Callable[[int, int], np.ndarray], int, int]:
    reader = sphn.FileReader(str(path))
    rate, length = reader.sample_rate, round(reader.duration_sec * reader.sample_rate)
    if not length:
        raise ValueError("no samples")

    def read(start: int, stop: int) -> np.ndarray:
        stop = min(stop, length)
        # Half a sample is added because seconds are rounded down to a sample.
        try:
            pcm = reader.decode((start + 0.5) / rate, (stop - start + 0.5) / rate)
        except ValueError:
            pcm = np.zeros((1, 0), np.float32)
        if pcm.shape[1] < stop - start:
            raise ValueError(
                f"{path} ends before the {reader.duration_sec:.1f} s that its header announces; "
                "it is truncated"
            )
        return pcm.mean(axis=0)[: stop - start]

    return read, length, rate
