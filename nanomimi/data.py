"""Step 3, tokens <-> disk: a flat stream of token ids, mapped from disk, and windows cut from it.

data/NAME/train.bin, val.bin   separator, utterance, separator, ..., separator, as token ids
data/NAME/meta.json            what the numbers in the .bin files mean, and their lengths
data/NAME/utterances.jsonl     per utterance: split, file, group, first_frame, num_frames
"""

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from nanomimi.codec import Codec, moshi_version
from nanomimi.tokens import flatten, separator, unflatten

FORMAT = 1
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


class DatasetWriter:
    """Collects utterances into a data folder, whose files get their names when all are complete.

    with DatasetWriter(Path("data/mine"), codec) as writer:
        writer.add("train", codes, file="anna/1.wav", group="anna")
    """

    def __init__(self, out: Path, codec: Codec, part: bool = False) -> None:
        """`part`: one process's share of a data folder, which may lack a split; see merge."""
        self.out, self.codec, self.part = out, codec, part
        largest_id = codec.num_codebooks * (codec.codebook_size + 1) - 1
        self.dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
        self.frames = dict.fromkeys(SPLITS, 0)
        self.utterances = dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "DatasetWriter":
        self.out.mkdir(parents=True, exist_ok=True)
        self._bins: dict[Split, BinaryIO] = {s: open(self._new(f"{s}.bin"), "wb") for s in SPLITS}
        self._index = open(self._new("utterances.jsonl"), "w")
        for split in SPLITS:
            self._write(split, separator(self.codec.num_codebooks, self.codec.codebook_size))
        return self

    def add(self, split: Split, codes: Tensor, file: str, group: str) -> None:
        """Append one utterance, codes (Q, T)."""
        # In front of it: all earlier frames, a separator behind each utterance, one at the start.
        first_frame = self.frames[split] + self.utterances[split] + 1
        self._write(split, codes)
        self._write(split, separator(self.codec.num_codebooks, self.codec.codebook_size))
        line = {
            "split": split,
            "file": file,
            "group": group,
            "first_frame": first_frame,
            "num_frames": codes.shape[1],
        }
        self._index.write(json.dumps(line) + "\n")
        self.frames[split] += codes.shape[1]
        self.utterances[split] += 1

    @property
    def seconds(self) -> float:
        """Seconds of audio so far."""
        return sum(self.frames.values()) / self.codec.frame_rate

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._bins.values(), self._index):
            file.close()
        names = [f"{s}.bin" for s in SPLITS] + ["utterances.jsonl", "meta.json"]
        empty = [s for s in SPLITS if not self.utterances[s] and not self.part]
        if kind is not None or empty:
            for name in names:
                self._new(name).unlink(missing_ok=True)
            if kind is None:
                raise ValueError(
                    f"nothing was prepared: no utterance for {' and '.join(empty)}; give at least "
                    "two readable files of audio"
                )
            return
        self._new("meta.json").write_text(json.dumps(self._meta(), indent=1) + "\n")
        # meta.json goes first and comes last: a replacement that is interrupted is no data folder.
        (self.out / "meta.json").unlink(missing_ok=True)
        for name in names:
            self._new(name).replace(self.out / name)

    def _meta(self) -> dict[str, Any]:
        codec = self.codec
        return {
            "format": FORMAT,
            "codec": codec.name,
            "codec_sha256": codec.sha256,
            "moshi": moshi_version(),
            "num_codebooks": codec.num_codebooks,
            "codebook_size": codec.codebook_size,
            "frame_rate": codec.frame_rate,
            "sample_rate": codec.sample_rate,
            "dtype": self.dtype.name,
            "splits": {
                s: {
                    "utterances": self.utterances[s],
                    "frames": self.frames[s],
                    "seconds": self.frames[s] / codec.frame_rate,
                }
                for s in SPLITS
            },
        }

    def _write(self, split: Split, codes: Tensor) -> None:
        tokens = flatten(codes[None], self.codec.codebook_size)[0]
        self._bins[split].write(tokens.cpu().numpy().astype(self.dtype).tobytes())

    def _new(self, name: str) -> Path:
        return self.out / f"{name}.tmp"


def merge(parts: Sequence[Path], writer: DatasetWriter) -> None:
    """Append the utterances of data folders, in order, and delete the folders."""
    for part in parts:
        data = {split: TokenDataset(part, split) for split in SPLITS}
        for line in _utterances(part):
            codes = data[line["split"]].codes(line["first_frame"], line["num_frames"])
            writer.add(line["split"], codes, line["file"], line["group"])
        shutil.rmtree(part)


class TokenDataset:
    """One split of a data folder, seen through its first `num_codebooks` codebooks (0: all).

    A window is max_frames + 1 consecutive frames: the first is context, the others are predicted.
    """

    def __init__(self, folder: Path, split: Split, num_codebooks: int = 0) -> None:
        self.meta = read_meta(folder)
        self.path, self.stored = folder / f"{split}.bin", self.meta["num_codebooks"]
        self.num_codebooks = num_codebooks or self.stored
        if not 1 <= self.num_codebooks <= self.stored:
            raise ValueError(
                f"--num_codebooks must be 1 to {self.stored}, as {folder} was prepared with; "
                f"got {num_codebooks}"
            )
        counts = self.meta["splits"][split]
        self.num_frames = counts["frames"] + counts["utterances"] + 1
        size = self.num_frames * self.stored * np.dtype(self.meta["dtype"]).itemsize
        if not self.path.exists() or self.path.stat().st_size != size:
            raise ValueError(
                f"{self.path} does not have the {size} bytes that meta.json says; prepare it again"
            )

    def frames(self, start: int, count: int) -> Tensor:
        """Tokens (count * Q,) int64 of `count` frames from frame `start` of the stream on."""
        # Mapped anew each time: a map that lives on keeps every page that was ever touched.
        stream = np.memmap(self.path, self.meta["dtype"], "r", shape=(self.num_frames, self.stored))
        tokens = stream[start : start + count, : self.num_codebooks]
        return torch.from_numpy(tokens.astype(np.int64)).flatten()

    def codes(self, start: int, count: int) -> Tensor:
        """Codes (Q, count) of the same frames; END in separators."""
        tokens = self.frames(start, count)[None]
        return unflatten(tokens, self.num_codebooks, self.meta["codebook_size"])[0]

    def utterances(self) -> list[dict[str, Any]]:
        """The split's lines of utterances.jsonl: file, group, first_frame, num_frames."""
        return [line for line in _utterances(self.path.parent) if line["split"] == self.path.stem]

    def train_batch(
        self,
        index: int,
        batch_size: int,
        max_frames: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Tensor:
        """Rank's share of batch `index`: tokens (batch_size / world_size, (max_frames + 1) * Q).

        A pure function of its arguments, so that a resumed run sees what an uninterrupted one would
        have seen and several processes see together what one would see alone. Every epoch draws a
        fresh phase and a fresh order of the windows, and shows each window once.
        """
        count, slack = self._num_windows(max_frames)
        share = batch_size // world_size
        starts = []
        for i in range(index * batch_size + rank * share, index * batch_size + (rank + 1) * share):
            epoch, place = divmod(i, count)
            phase, order = _epoch(seed, epoch, count, slack)
            starts.append(phase + int(order[place]) * max_frames)
        return torch.stack([self.frames(s, max_frames + 1) for s in starts])

    def eval_batches(self, batch_size: int, max_frames: int, num_windows: int) -> list[Tensor]:
        """Up to `num_windows` fixed windows, evenly spread: batches (B, (max_frames + 1) * Q)."""
        self._num_windows(max_frames)
        available = (self.num_frames - 1) // max_frames
        chosen = np.linspace(0, available - 1, min(num_windows, available)).round().astype(int)
        windows = [self.frames(int(w) * max_frames, max_frames + 1) for w in chosen]
        return [
            torch.stack(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)
        ]

    def _num_windows(self, max_frames: int) -> tuple[int, int]:
        """Windows per epoch, and how far all of them can be shifted together."""
        predicted = self.num_frames - 1
        if predicted < max_frames:
            raise ValueError(
                f"{self.path} has {self.num_frames} frames, fewer than one window of --max_frames "
                f"{max_frames} + 1; lower --max_frames or prepare more audio"
            )
        # One window fewer than fit, so that the phase can take every value below max_frames.
        count = max(1, predicted // max_frames - 1)
        return count, min(max_frames - 1, predicted - count * max_frames)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a data folder. Raises FileNotFoundError or ValueError where it is not ours."""
    path = folder / "meta.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is not a prepared data folder (no meta.json); run python prepare.py, "
            "or give another --data"
        )
    try:
        meta = json.loads(path.read_text())
    except json.JSONDecodeError:
        meta = None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}; prepare the data again")
    return meta


def _utterances(folder: Path) -> list[dict[str, Any]]:
    with open(folder / "utterances.jsonl") as index:
        return [json.loads(line) for line in index]


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int, slack: int) -> tuple[int, np.ndarray]:
    """Phase and order of an epoch's windows."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(slack + 1)), rng.permutation(count)
