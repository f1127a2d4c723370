"""Audio files -> data/NAME: encode with Mimi, flatten, write.

    python prepare.py                               the bundled digits, with the bundled small Mimi
    python prepare.py ~/speech --out data/mine      your audio, with Kyutai's Mimi (downloaded once)
    python prepare.py a.wav more/ --codec tiny      your audio, offline

Audio is wav, flac, mp3, ogg or opus of any rate, mono or stereo. A file's group is its parent
folder: the speaker in most corpora. Files that cannot be read are listed at the end.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from nanomimi.audio import audio_files, read_chunks
from nanomimi.codec import Codec
from nanomimi.config import Config, Processes, argument, join_processes, option, resolve_device, run
from nanomimi.data import DatasetWriter, Split, merge
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
            skipped = _share(files, splits, config, codec, writer, processes)
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


def _share(
    files: list[Path],
    splits: list[Split],
    config: PrepareConfig,
    codec: Codec,
    writer: DatasetWriter,
    processes: Processes,
) -> list[str]:
    """Encode this process's share: consecutive files, so that the parts in order are the whole."""
    if not files:
        # A composed utterance depends on all before it; the codec is quick enough for one process.
        return _digits(config, codec, writer) if processes.rank == 0 else []
    first, end = (
        len(files) * rank // processes.count for rank in (processes.rank, processes.rank + 1)
    )
    return _files(files[first:end], splits[first:end], codec, writer, silent=processes.rank > 0)


def _files(
    files: list[Path], splits: list[Split], codec: Codec, writer: DatasetWriter, silent: bool
) -> list[str]:
    """Encode files; returns a line for each that could not be read."""
    skipped = []
    with tqdm(total=len(files), unit="file", disable=silent) as bar:
        for file, split in zip(files, splits):
            try:
                codes = codec.encode_chunks(read_chunks(file, codec.sample_rate))
            except (ValueError, OSError) as error:
                skipped.append(f"skipped: {error}")
            else:
                writer.add(split, codes, file=str(file), group=str(file.parent))
            _advance(bar, 1, writer)
    return skipped


def _digits(config: PrepareConfig, codec: Codec, writer: DatasetWriter) -> list[str]:
    """Compose and encode counting; a voice is a group, and the file's name tells what it says."""
    with tqdm(total=round(config.hours * 3600), unit="s") as bar:
        for u in digits.utterances(config.hours, config.val_fraction, config.seed):
            codes = codec.encode(torch.from_numpy(u.wav)[None, None])[0]
            writer.add(
                u.split, codes, file=f"{u.voice} {''.join(map(str, u.digits))}", group=u.voice
            )
            _advance(bar, int(writer.seconds) - bar.n, writer)
    return []


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
