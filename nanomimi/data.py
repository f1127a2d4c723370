"""Step 3, tokens <-> disk: one flat stream of token ids on disk, and windows cut from it.

data/NAME/train.bin, val.bin   separator, utterance, separator, ..., separator, as token ids
data/NAME/meta.json            what the ids in the .bin files mean, and how many there are
data/NAME/utterances.jsonl     per utterance: split, file, group, first_frame, num_frames
"""

import functools
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from nanomimi.codec import Codec
from nanomimi.tokens import flatten, separator, unflatten

FORMAT = 2
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")


class DatasetWriter:
    """Writes utterances into a data folder.

    with DatasetWriter(Path("data/mine"), codec) as writer:
        writer.add("train", codes, file="anna/1.wav", group="anna")

    Files appear under their final names only once all are complete.
    """

    def __init__(self, out: Path, codec: Codec, required: Sequence[Split] = SPLITS) -> None:
        """`required`: the splits that may not stay empty."""
        self.out, self.codec, self.required = out, codec, required
        largest_id = codec.num_codebooks * (codec.codebook_size + 1) - 1
        self.dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
        self.frames, self.utterances = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def __enter__(self) -> "DatasetWriter":
        self.out.mkdir(parents=True, exist_ok=True)
        self._bins: dict[Split, BinaryIO] = {s: open(self._new(f"{s}.bin"), "wb") for s in SPLITS}
        self._index = open(self._new("utterances.jsonl"), "w")
        for split in SPLITS:
            self._write(split, separator(self.codec.num_codebooks, self.codec.codebook_size))
        return self

    def add(self, split: Split, codes: Tensor, file: str, group: str) -> None:
        """Append one utterance, codes (Q, T). Evaluations compare groups: speakers."""
        # One separator stands at the start, one after each utterance.
        first = self.frames[split] + self.utterances[split] + 1
        place = {"first_frame": first, "num_frames": codes.shape[1]}
        line = {"split": split, "file": file, "group": group, **place}
        self._index.write(json.dumps(line) + "\n")
        self._write(split, codes)
        self._write(split, separator(self.codec.num_codebooks, self.codec.codebook_size))
        self.frames[split] += codes.shape[1]
        self.utterances[split] += 1

    @property
    def seconds(self) -> float:
        return sum(self.frames.values()) / self.codec.frame_rate

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._bins.values(), self._index):
            file.close()
        names = [f"{s}.bin" for s in SPLITS] + ["utterances.jsonl", "meta.json"]
        empty = [s for s in self.required if not self.utterances[s]]
        if kind is not None or empty:
            for name in names:
                self._new(name).unlink(missing_ok=True)
            if kind is None:
                raise ValueError(f"nothing was prepared: no utterance for {' or '.join(empty)}")
            return
        self._new("meta.json").write_text(json.dumps(self.meta(), indent=1) + "\n")
        # meta.json goes first and comes last, so an interrupted replacement is not taken for data.
        (self.out / "meta.json").unlink(missing_ok=True)
        for name in names:
            self._new(name).replace(self.out / name)

    def meta(self) -> dict[str, Any]:
        copied = "num_codebooks codebook_size frame_rate sample_rate".split()
        counts = lambda split: {"utterances": self.utterances[split], "frames": self.frames[split]}
        return {
            "format": FORMAT,
            "codec": self.codec.name,
            "codec_sha256": self.codec.sha256,
            "moshi": version("moshi"),
            **{name: getattr(self.codec, name) for name in copied},
            "dtype": self.dtype.name,
            "splits": {split: counts(split) for split in SPLITS},
        }

    def _write(self, split: Split, codes: Tensor) -> None:
        tokens = flatten(codes[None], self.codec.codebook_size)[0]
        self._bins[split].write(tokens.cpu().numpy().astype(self.dtype).tobytes())

    def _new(self, name: str) -> Path:
        return self.out / f"{name}.tmp"


class TokenDataset:
    """One split of data folders, one behind another, with their first `num_codebooks` codebooks.

    A window is max_frames + 1 consecutive frames: the first is context, the others are predicted.
    """

    def __init__(self, folders: Sequence[Path], split: Split, num_codebooks: int) -> None:
        """Raises FileNotFoundError or ValueError where the folders do not hold such data."""
        self.folders, self.split, self.num_codebooks = folders, split, num_codebooks
        metas = [read_meta(folder) for folder in folders]
        self.meta = {**metas[0], "splits": [meta["splits"] for meta in metas]}
        self.stored, self.dtype = self.meta["num_codebooks"], np.dtype(self.meta["dtype"])
        if not 1 <= num_codebooks <= self.stored:
            raise ValueError(
                f"--num_codebooks must be 1 to {self.stored} with {folders[0]}; got {num_codebooks}"
            )
        self.streams: list[tuple[Path, int, int]] = []  # .bin, its first frame, the frame after it
        self.num_frames = 0
        for folder, meta in zip(folders, metas):
            if any(meta[key] != metas[0][key] for key in ("codec_sha256", "num_codebooks")):
                raise ValueError(f"{folder} has another codec or --num_codebooks than {folders[0]}")
            path, counts = folder / f"{split}.bin", meta["splits"][split]
            frames = counts["frames"] + counts["utterances"] + 1
            size = frames * self.stored * self.dtype.itemsize
            if not path.exists() or path.stat().st_size != size:
                raise ValueError(f"{path} does not have {size} bytes (meta.json); prepare it again")
            self.streams.append((path, self.num_frames, self.num_frames + frames))
            self.num_frames += frames

    def frames(self, start: int, count: int) -> Tensor:
        """Tokens (count * Q,) int64 of `count` frames from frame `start` of the stream on."""
        pieces, classes = [], self.meta["codebook_size"] + 1
        for path, first, end in self.streams:
            if first < start + count and start < end:
                # Mapped anew each time: a map that is kept keeps every page that was ever read.
                stream = np.memmap(path, self.dtype, "r", shape=(end - first, self.stored))
                piece = stream[max(0, start - first) : start + count - first, : self.num_codebooks]
                pieces.append(piece.astype(np.int64))
                # As unsigned integers, ids of a codebook before their own are large.
                codes = (pieces[-1] - classes * np.arange(self.num_codebooks)).view(np.uint64)
                if codes.max() >= classes:
                    raise ValueError(f"{path} has ids outside of their codebooks; prepare it again")
        return torch.from_numpy(np.concatenate(pieces)).flatten()

    def codes(self, start: int, count: int) -> Tensor:
        """Codes (Q, count) of the same frames; END in separators."""
        tokens = self.frames(start, count)[None]
        return unflatten(tokens, self.num_codebooks, self.meta["codebook_size"])[0]

    def utterances(self) -> list[dict[str, Any]]:
        """The split's lines of utterances.jsonl: file, group, first_frame, num_frames."""
        lines = []
        for path, first, _ in self.streams:
            for text in (path.parent / "utterances.jsonl").read_text().splitlines():
                if (line := json.loads(text))["split"] == self.split:
                    lines.append({**line, "first_frame": first + line["first_frame"]})
        return lines

    def train_batch(
        self, index: int, batch_size: int, max_frames: int, seed: int,
        rank: int = 0, world_size: int = 1,
    ) -> Tensor:
        """Rank's share of batch `index`: tokens (batch_size / world_size, (max_frames + 1) * Q).

        A pure function of its arguments: a resumed run sees the batches of an uninterrupted one,
        and several processes together those of one. Every epoch shows each window once, in a new
        order and at a new phase.
        """
        count, slack = self._num_windows(max_frames)
        share, starts = batch_size // world_size, []
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
        return list(torch.stack(windows).split(batch_size))

    def _num_windows(self, max_frames: int) -> tuple[int, int]:
        """Windows per epoch, and how far all of them can be shifted together."""
        predicted = self.num_frames - 1
        if predicted < max_frames:
            raise ValueError(
                f"{self.streams[0][0]} has {self.num_frames} frames, not --max_frames "
                f"{max_frames} + 1; lower --max_frames or prepare more audio"
            )
        # One window fewer than fit, so that the phase can take every value below max_frames.
        count = max(1, predicted // max_frames - 1)
        return count, min(max_frames - 1, predicted - count * max_frames)


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a data folder. Raises FileNotFoundError or ValueError where it is not ours."""
    path = folder / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no data folder (no meta.json); run python prepare.py")
    return read_json(path, FORMAT, "prepare the data again")


def read_json(path: Path, format: int, remedy: str) -> dict[str, Any]:
    """A JSON object that says of which format it is, or ValueError."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict) or content.get("format") != format:
        raise ValueError(f"{path} is not of format {format}; {remedy}")
    return content


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int, slack: int) -> tuple[int, np.ndarray]:
    """Phase and order of an epoch's windows."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(slack + 1)), rng.permutation(count)
