"""Step 3, tokens <-> disk: one flat stream of token ids on disk, and windows cut from it.

data/NAME/train.bin, val.bin   separator, utterance, separator, ..., separator, as token ids
data/NAME/meta.json            what the ids in the .bin files mean, and how many there are
data/NAME/utterances.jsonl     per utterance: split, file, group, first_frame, num_frames
"""

import functools
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanomimi.files import Positive, read_json
from nanomimi.tokens import unflatten

FORMAT = 2
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
# The kinds of a line of utterances.jsonl and of meta.json.
UTTERANCE = {"split": Split, **dict.fromkeys(("file", "group"), str)}
UTTERANCE |= dict.fromkeys(("first_frame", "num_frames"), int)
META = {"format": Literal[FORMAT], **dict.fromkeys(("codec", "codec_sha256", "moshi"), str)}
META |= dict.fromkeys(("num_codebooks", "codebook_size", "sample_rate"), int)
META |= {"frame_rate": Positive, "dtype": Literal["uint16", "uint32"]}
META["splits"] = dict.fromkeys(SPLITS, dict.fromkeys(("utterances", "frames"), int))
AGAIN = "prepare the data again, with --overwrite"


class TokenDataset:
    """One split of data folders, one behind another, with their first `num_codebooks` codebooks.

    A window is max_frames + 1 consecutive frames: the first is context, the others are predicted.
    """

    def __init__(self, folders: Sequence[Path], split: Split, num_codebooks: int) -> None:
        """Raises FileNotFoundError or ValueError where the folders do not hold such data."""
        self.folders, self.split, self.num_codebooks = folders, split, num_codebooks
        if not folders:
            raise ValueError("no data folder is given; run python prepare.py and give --data")
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
                raise ValueError(f"{path} does not have {size} bytes (meta.json); {AGAIN}")
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
                    raise ValueError(f"{path} has ids outside of their codebooks; {AGAIN}")
        return torch.from_numpy(np.concatenate(pieces)).flatten()

    def codes(self, start: int, count: int) -> Tensor:
        """Codes (Q, count) of the same frames; END in separators."""
        tokens = self.frames(start, count)[None]
        return unflatten(tokens, self.num_codebooks, self.meta["codebook_size"])[0]

    def utterances(self) -> list[dict[str, Any]]:
        """The split's lines of utterances.jsonl: file, group, first_frame, num_frames."""
        lines = []
        for path, first, end in self.streams:
            index = path.with_name("utterances.jsonl")
            own = [u for u in read_json(index, list[UTTERANCE], AGAIN) if u["split"] == self.split]
            starts = [*(u["first_frame"] for u in own), end - first]
            if starts != list(accumulate((u["num_frames"] + 1 for u in own), initial=1)):
                raise ValueError(f"{index} does not fit {path.name}; {AGAIN}")
            lines += [{**u, "first_frame": first + u["first_frame"]} for u in own]
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
    return read_json(path, META, AGAIN)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, count: int, slack: int) -> tuple[int, np.ndarray]:
    """Phase and order of an epoch's windows."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(slack + 1)), rng.permutation(count)
