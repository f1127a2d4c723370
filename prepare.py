"""Audio files -> data/NAME: encode with Mimi, flatten, write.

    python prepare.py                               the bundled digits, with the bundled small Mimi
    python prepare.py ~/speech --out data/mine      your audio, with Kyutai's Mimi (downloaded once)
    python prepare.py a.wav more/ --codec tiny      your audio, offline
    torchrun --nproc_per_node 8 prepare.py ~/speech the files shared by eight processes

Audio is wav, flac, mp3, ogg or opus of any rate, mono or stereo. A file's group is its parent
folder: the speaker in most corpora. Files that cannot be read are listed at the end.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomimi.audio import audio_files, read_chunks
from nanomimi.codec import Codec
from nanomimi.config import Config, Processes, argument, join_processes, option, resolve_device, run
from nanomimi.data import DatasetWriter, Split, merge
from nanomimi.encoding import BLOCK, Recording, encode_all
from nanomimi.tiny import digits


@dataclass(frozen=True)
class PrepareConfig(Config):
    audio: tuple[Path, ...] = argument("folders or files of audio; none: the bundled digits")
    out: Path | None = option(None, "data folder; default: data/ and the first input's name")
    codec: str | None = option(None, "tiny, mimi or a file; default: mimi, tiny for digits")
    num_codebooks: int = option(8, "codebooks to keep; training can use fewer", at_least=1)
    val_fraction: float = option(0.1, "share held out for validation", above=0, at_most=0.5)
    split_by: Literal["file", "group"] = option("file", "hold out files, or whole speakers")
    hours: float = option(4.0, "hours of counting to compose from the bundled digits", above=0)
    seed: int = option(0, "seed of the split and of the composed digits", at_least=0)
    device: str = option("auto", "auto, cpu or cuda")


def prepare(config: PrepareConfig) -> None:
    """Write the data folder. Raises ValueError where nothing can be prepared."""
    files = audio_files(config.audio)
    if config.audio and not files:
        raise ValueError(
            f"no audio (wav, flac, mp3, ogg, opus) in {', '.join(map(str, config.audio))}"
        )
    splits = _split(files, config)
    out = config.out or Path("data") / (
        config.audio[0].resolve().stem if config.audio else "digits"
    )
    source = config.codec or ("mimi" if files else "tiny")
    start = time.time()
    with join_processes(resolve_device(config.device)) as processes:
        codec = Codec.load(source, config.num_codebooks, processes.device)
        parts = [out / f"part-{rank}" for rank in range(processes.count)]
        alone = processes.count == 1
        with DatasetWriter(out if alone else parts[processes.rank], codec, not alone) as writer:
            skipped = _share(list(zip(files, splits)), config, codec, writer, processes)
        if not alone:
            shares: list[list[str]] = [[]] * processes.count
            dist.all_gather_object(shares, skipped)  # and so nobody merges before all are done
            if processes.rank > 0:
                return
            skipped = [line for share in shares for line in share]
            with DatasetWriter(out, codec) as writer:
                merge(parts, writer)
    print("\n".join(skipped), end="\n" if skipped else "")
    print(
        f"{out}: {writer.utterances['train']} utterances for training, "
        f"{writer.utterances['val']} for validation, {writer.seconds / 3600:.2f} h "
        f"in {time.time() - start:.0f} s"
        + (f"; {len(skipped)} of {len(files)} files skipped" if skipped else "")
    )


def _files(files: list[tuple[Path, Split]], sample_rate: int) -> Iterator[Recording]:
    for file, split in files:
        chunks = partial(read_chunks, file, sample_rate)
        yield Recording(split, file=str(file), group=str(file.parent), chunks=chunks)


def _digits(config: PrepareConfig) -> Iterator[Recording]:
    """Composed counting; a voice is a group, and the file's name tells what it says."""
    for u in digits.utterances(config.hours, config.val_fraction, config.seed):
        name = f"{u.voice} {''.join(map(str, u.digits))}"
        yield Recording(u.split, file=name, group=u.voice, chunks=lambda wav=u.wav: [wav])


def _share(
    files: list[tuple[Path, Split]],
    config: PrepareConfig,
    codec: Codec,
    writer: DatasetWriter,
    by: Processes,
) -> list[str]:
    """Encode this process's share of all; returns a line for each file that could not be read.

    The shares are consecutive files, so that the parts, one behind another, are the whole.
    """
    # Whole blocks, so that a GPU's batches do not depend on the number of processes.
    block = 1 if by.device.type == "cpu" else BLOCK
    blocks = -(-len(files) // block)
    first, end = (
        min(len(files), blocks * rank // by.count * block) for rank in (by.rank, by.rank + 1)
    )
    recordings = _files(files[first:end], codec.sample_rate)
    total, unit = end - first, "file"
    if not files:
        # A composed utterance depends on all before it, so the first process makes them all.
        recordings, total, unit = _digits(config), round(config.hours * 3600), "s"
        if by.rank > 0:
            return []
    skipped = []
    with tqdm(total=total, unit=unit, disable=by.rank > 0) as bar:
        for recording, codes in encode_all(recordings, codec):
            if isinstance(codes, Tensor):
                writer.add(recording.split, codes, recording.file, recording.group)
            else:
                skipped.append(f"skipped: {codes}")
            _advance(bar, 1 if files else int(writer.seconds) - bar.n, writer)
    return skipped


def _advance(bar: tqdm, amount: int, writer: DatasetWriter) -> None:
    speed = writer.seconds / max(1e-9, bar.format_dict["elapsed"])
    text = f"{writer.seconds / 3600:.2f} h, {speed:.0f} x real time"
    bar.set_postfix_str(text, refresh=False)
    bar.update(min(amount, bar.total - bar.n))


def _split(files: list[Path], config: PrepareConfig) -> list[Split]:
    """A split for every file, so that no file (or no group) is on both sides."""
    units = [f if config.split_by == "file" else f.parent for f in files]
    names = sorted(set(units))
    if len(names) == 1:
        raise ValueError(
            f"one {config.split_by} ({names[0]}) cannot be split into training and validation; "
            "give at least two" + (" or --split_by file" if config.split_by == "group" else "")
        )
    order = np.random.default_rng(config.seed).permutation(len(names))
    held_out = {names[i] for i in order[: max(1, round(config.val_fraction * len(names)))]}
    return ["val" if unit in held_out else "train" for unit in units]


if __name__ == "__main__":
    run(PrepareConfig, prepare, __doc__)
