"""Audio files -> data/NAME: encode with Mimi, flatten, write.

    python prepare.py                               the bundled digits, with the bundled small Mimi
    python prepare.py ~/speech --out data/mine      your audio, with Kyutai's Mimi (downloaded once)
    python prepare.py a.wav more/ --codec tiny      your audio, offline

Audio is wav, flac, mp3, ogg or opus of any rate, mono or stereo. A file's group is its parent
folder: the speaker in most corpora. Files that cannot be read are listed at the end. After an
interruption, the same command goes on. train.py takes several data folders, so processes or
machines can prepare a large corpus in parts.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from nanomimi.audio import FORMATS, audio_files, read_audio
from nanomimi.codec import Codec
from nanomimi.config import Config, from_json, naming, option, run_script
from nanomimi.data import SPLITS, DatasetWriter, Split, TokenDataset
from nanomimi.distributed import catch_signals, lock, resolve_device
from nanomimi.tiny import digits


@dataclass(frozen=True)
class PrepareConfig(Config):
    audio: tuple[Path, ...] = option((), "audio; default: the bundled digits", positional=True)
    out: Path | None = option(None, "data folder; default: data/ and the first input's name")
    codec: str | None = option(None, "tiny, mimi or a file; default: mimi, tiny for digits")
    num_codebooks: int = option(8, "codebooks to keep; training can use fewer", at_least=1)
    val_fraction: float = option(0.1, "share held out; 1: to evaluate only", above=0, at_most=1)
    split_by: Literal["file", "group"] = option("file", "hold out files, or whole speakers")
    hours: float = option(4.0, "hours of digits to compose from the clips", above=0, at_most=1000)
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
    files = audio_files(config.audio)
    if config.audio and not files:
        raise ValueError(f"no audio ({FORMATS}) in {config.audio[0]}")
    out = config.out or Path("data") / (config.audio[0].resolve().stem if files else "digits")
    source = config.codec or ("mimi" if files else "tiny")
    codec = Codec.load(source, config.num_codebooks, resolve_device(config.device))
    names = ("num_codebooks", "val_fraction", "split_by", "hours", "seed")
    settings = {name: getattr(config, name) for name in names} | {"codec": codec.sha256}
    listed = repr([(str(file), file.stat().st_size) for file in files])
    settings["audio"] = hashlib.sha256(listed.encode()).hexdigest()
    with lock(out):
        journal = out / "unfinished.jsonl"
        if (out / "meta.json").exists() and not config.overwrite:
            for split in SPLITS:
                if TokenDataset([out], split, 1).meta["settings"] != settings:
                    raise ValueError(f"{out} holds other data; --overwrite them or change --out")
            print(f"{out} is complete; nothing is left to do")
        else:
            encode(config, files, codec, journal, settings)
            required = ("val",) if config.val_fraction == 1 else SPLITS
            try:
                write(journal, settings, out, codec, required)
            except ValueError:  # for which the same journal is no help
                journal.unlink()
                raise
        journal.unlink(missing_ok=True)


def encode(
    config: PrepareConfig, files: list[Path], codec: Codec, journal: Path, settings: dict[str, Any]
) -> None:
    """Append a line to the journal for every recording that it does not have yet."""
    recordings = from_files(files, config, codec.sample_rate) if files else from_digits(config)
    total, unit = (len(files), "file") if files else (round(config.hours * 3600), "s")
    with (
        naming(journal),
        open(journal, "a+b") as file,
        catch_signals() as caught,
        tqdm(total=total, unit=unit) as bar,
    ):
        done, seconds = recover(file, json.dumps(settings).encode() + b"\n", config.overwrite), 0.0
        bar.update(done if files else 0)
        for recording, codes in encode_all(itertools.islice(recordings, done, None), codec):
            if isinstance(codes, Tensor):
                line = {"split": recording.split, "file": recording.file, "group": recording.group}
                line["codes"] = codes.cpu().numpy().astype("<u4").tobytes().hex()
                seconds += codes.shape[1] / codec.frame_rate
            else:
                line = {"skipped": str(codes)}
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            rate = seconds / max(1e-9, bar.format_dict["elapsed"])
            bar.set_postfix_str(f"{rate:.0f} x real time", refresh=False)
            bar.update(1 if files else min(int(seconds), total) - bar.n)
            if caught():
                print("interrupted; the same command goes on")
                raise SystemExit(128 + caught())


def recover(journal: BinaryIO, head: bytes, overwrite: bool) -> int:
    """The number of recordings in the journal, which starts with `head`; a torn line is cut off."""
    journal.seek(0)
    found = journal.readline()
    if found != head:
        if found.endswith(b"\n") and not overwrite:
            raise ValueError(f"{journal.name} has other arguments; give those, or --overwrite")
        journal.truncate(0)
        journal.write(head)
        return 0
    lengths = [len(line) for line in journal if line.endswith(b"\n")]
    journal.truncate(len(head) + sum(lengths))
    return len(lengths)


def write(
    journal: Path, settings: dict[str, Any], out: Path, codec: Codec, required: Sequence[Split]
) -> None:
    """Turn the journal into the data folder."""
    example, skipped = {"split": SPLITS, "file": "", "group": "", "codes": ""}, 0
    with open(journal, "rb") as lines, DatasetWriter(out, codec, required, settings) as writer:
        next(lines)
        for text in lines:
            if text.startswith(b'{"skipped"'):
                skipped += 1
                print(f"skipped: {json.loads(text)['skipped']}")
                continue
            line = from_json(text, example, f"{journal} is damaged; remove it")
            codes = np.frombuffer(bytes.fromhex(line.pop("codes")), "<u4").astype(np.int64)
            writer.add(codes=torch.from_numpy(codes.reshape(codec.num_codebooks, -1)), **line)
    print(
        f"{out}: {writer.utterances['train']} utterances for training, {writer.utterances['val']} "
        f"for validation, {writer.seconds / 3600:.2f} h; {skipped} files skipped"
    )


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

    def recording(file: Path) -> Recording:
        split: Split = "val" if units[file] in held_out else "train"
        read = partial(read_audio, file, sample_rate)
        return Recording(split, str(file), str(file.parent), read)

    # Sorted files are neighbours by speaker; a training window must not hold one speaker alone.
    return (recording(files[i]) for i in rng.permutation(len(files)))


def from_digits(config: PrepareConfig) -> Iterator[Recording]:
    """Composed counting; a voice is a group, and the file's name tells what it says."""
    for u in digits.utterances(config.hours, config.val_fraction, config.seed):
        name = f"{u.voice} {''.join(map(str, u.digits))}"
        yield Recording(u.split, name, u.voice, lambda wav=u.wav: wav)


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
            while block := list(itertools.islice(recordings, 32 * cores)):
                yield from zip(block, pool.map(encode, block))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    run_script(PrepareConfig, prepare, __doc__)
