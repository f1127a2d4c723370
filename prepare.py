"""Audio files -> data/NAME: encode with Mimi, flatten, write.

    python prepare.py                               the bundled digits, with the bundled small Mimi
    python prepare.py ~/speech --out data/mine      your audio, with Kyutai's Mimi (downloaded once)
    python prepare.py a.wav more/ --codec tiny      your audio, offline

Audio is wav, flac, mp3, ogg or opus of any rate, mono or stereo. A file's group is its parent
folder: the speaker in most corpora. Files that cannot be read are named and skipped. After an
interruption the same command goes on. train.py takes several data folders, so processes or machines
can prepare a large corpus in parts.
"""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from nanomimi.audio import FORMATS, audio_files, read_audio
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.data import AGAIN, SPLITS, Split, TokenDataset
from nanomimi.distributed import resolve_device
from nanomimi.files import lock, read_json, replacing
from nanomimi.tiny import digits
from nanomimi.writer import DatasetWriter


@dataclass(frozen=True)
class PrepareConfig(Config):
    audio: tuple[Path, ...] = option((), "audio; default: the bundled digits", positional=True)
    out: Path | None = option(None, "data folder; default: data/ and the first input's name")
    codec: str | None = option(None, "tiny, mimi or a file; default: mimi, tiny for digits")
    num_codebooks: int = option(8, "codebooks to keep; training can use fewer", at_least=1)
    val_fraction: float = option(0.1, "share held out; 1: to evaluate only", above=0, at_most=1)
    split_by: Literal["file", "group"] = option("file", "hold out files, or whole speakers")
    hours: float = option(6.0, "hours of counting to compose from the bundled digits", above=0)
    max_digits: int = option(16, "digits of the longest utterance; the shortest: half", at_least=2)
    seed: int = option(0, "seed of the split, the order and the composed digits", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    overwrite: bool = option(False, "replace what other arguments have prepared in --out")


class Recording(NamedTuple):
    split: Split
    file: str
    group: str
    read: Callable[[], np.ndarray]  # -> samples (S,)


def prepare(config: PrepareConfig) -> None:
    """Write the data folder. Raises ValueError where nothing can be prepared."""
    files, skipped = audio_files(config.audio), 0
    if config.audio and not files:
        raise ValueError(f"no audio ({FORMATS}) in {config.audio[0]}")
    out = config.out or Path("data") / (config.audio[0].resolve().stem if files else "digits")
    source = config.codec or ("mimi" if files else "tiny")
    codec = Codec.load(source, config.num_codebooks, resolve_device(config.device))
    settings, path = describe(config, files, codec), out / "settings.json"
    index = out / "utterances.jsonl"
    resume = not config.overwrite and index.exists() and index.stat().st_size > 0
    if resume and not (path.exists() and read_json(path, {...: Any}, AGAIN) == settings):
        raise ValueError(f"{out} holds data of other arguments; change --out, or --overwrite them")
    if resume and (out / "meta.json").exists():
        for split in SPLITS:
            TokenDataset([out], split, config.num_codebooks)  # refuses damaged files
        print(f"{out} is complete; nothing is left to do")
        return
    recordings = from_files(files, config, codec.sample_rate) if files else from_digits(config)
    total, unit = (len(files), "file") if files else (round(config.hours * 3600), "s")
    splits = ("val",) if config.val_fraction == 1 else SPLITS
    with lock(out), DatasetWriter(out, codec, splits, resume) as writer:
        with replacing(path) as new:
            new.write_text(json.dumps(settings, indent=1) + "\n")
        done = deque(writer.files)  # by an interrupted preparation, in the same order
        left = (r for r in recordings if not (done and r.file == done[0] and done.popleft()))
        with tqdm(total=total, unit=unit, initial=len(done) if files else 0) as bar:
            for recording, codes in encode_all(left, codec):
                if isinstance(codes, Tensor):
                    writer.add(recording.split, codes, recording.file, recording.group)
                else:
                    skipped += 1
                    bar.write(f"skipped: {codes}")
                rate = writer.seconds / max(1e-9, bar.format_dict["elapsed"])
                bar.set_postfix_str(f"{rate:.0f} x real time", refresh=False)
                bar.update(1 if files else min(int(writer.seconds), total) - bar.n)
    train, val = writer.utterances.values()
    made = f"{train} utterances for training, {val} for validation, {writer.seconds / 3600:.2f} h"
    print(f"{out}: {made}; {skipped} files skipped")


def describe(config: PrepareConfig, files: list[Path], codec: Codec) -> dict[str, Any]:
    """What the data depend on. Files are told by names and sizes, clips by their positions."""
    names = ("num_codebooks", "val_fraction", "split_by", "hours", "max_digits", "seed")
    listed = repr([(str(file), file.stat().st_size) for file in files])
    clips = b"" if files else (digits.FOLDER / "index.csv").read_bytes()
    sources = {"codec": codec.sha256, "audio": hashlib.sha256(listed.encode() + clips).hexdigest()}
    return {name: getattr(config, name) for name in names} | sources


def from_files(files: list[Path], config: PrepareConfig, sample_rate: int) -> Iterator[Recording]:
    """Files in random order, each in the split of its file or group."""
    units = {f: f if config.split_by == "file" else f.parent for f in files}
    names, rng = sorted(set(units.values())), np.random.default_rng(config.seed)
    if len(names) == 1 and config.val_fraction < 1:
        raise ValueError(
            f"one {config.split_by} cannot be split into training and validation; give more, "
            "another --split_by, or --val_fraction 1 to evaluate only"
        )
    count = max(1, round(config.val_fraction * len(names)))
    held_out = {names[i] for i in rng.permutation(len(names))[:count]}
    # Sorted files are neighbours by speaker; a training window must not hold one speaker alone.
    for i in rng.permutation(len(files)):
        split: Split = "val" if units[files[i]] in held_out else "train"
        read = partial(read_audio, files[i], sample_rate)
        yield Recording(split, str(files[i]), str(files[i].parent), read)


def from_digits(config: PrepareConfig) -> Iterator[Recording]:
    """Composed counting; a voice at a factor, rounded to 0.05, is a group: one speaker."""
    for u in digits.utterances(config.hours, config.val_fraction, config.seed, config.max_digits):
        name = f"{u.kind}: {u.voice} {u.factor:.3f} {''.join(map(str, u.digits))}"
        group = f"{u.kind}: {u.voice} {round(20 * u.factor) / 20:.2f}"
        yield Recording(u.split, name, group, lambda wav=u.wav: wav)


def encode_all(
    recordings: Iterator[Recording], codec: Codec
) -> Iterator[tuple[Recording, Tensor | Exception]]:
    """Codes (Q, T) of every recording, in order, or why there are none."""
    # A clip keeps one core busy, so every core has a thread and a codec of its own.
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    codecs = [codec, *(codec.with_shared_weights() for _ in range(cores - 1))]

    def encode(recording: Recording) -> Tensor | Exception:
        own = codecs.pop()
        try:
            return own.encode(rearrange(torch.from_numpy(recording.read()), "s -> 1 1 s"))[0]
        except (ValueError, OSError) as error:
            return error
        finally:
            codecs.append(own)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            encoded = iter(())
            # Digits are composed here, while the threads encode the block before.
            while block := list(itertools.islice(recordings, 32 * cores)):
                before, encoded = encoded, zip(block, pool.map(encode, block))
                yield from before
            yield from encoded
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_script(PrepareConfig, prepare, __doc__)
