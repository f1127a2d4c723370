"""Step 3a, tokens -> disk: writes what data.py reads."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from nanomimi.codec import Codec
from nanomimi.data import AGAIN, FORMAT, SPLITS, Split
from nanomimi.files import replacing
from nanomimi.tokens import flatten, separator


class DatasetWriter:
    """Writes utterances into a data folder.

    with DatasetWriter(Path("data/mine"), codec) as writer:
        writer.add("train", codes, file="anna/1.wav", group="anna")

    meta.json is written last: a folder without it does not hold data.
    """

    def __init__(
        self, out: Path, codec: Codec, required: Sequence[Split] = SPLITS, resume: bool = False
    ) -> None:
        """`required`: the splits that may not stay empty; `resume`: keep the utterances that an
        interrupted writer has left. Their `files` are not to be added again.
        """
        self.out, self.codec, self.required, self.resume = out, codec, required, resume
        largest_id = codec.num_codebooks * (codec.codebook_size + 1) - 1
        self.dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
        self.frames, self.utterances = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        self.files: list[str] = []

    def __enter__(self) -> "DatasetWriter":
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "meta.json").unlink(missing_ok=True)
        index = self.out / "utterances.jsonl"
        found = index.read_bytes() if self.resume and index.exists() else b""
        # The last line may be torn.
        whole = [line for line in found.splitlines(keepends=True) if line.endswith(b"\n")]
        for line in whole:
            self._count(json.loads(line))
        self._index = self._open("utterances.jsonl", len(b"".join(whole)))
        self._bins: dict[Split, BinaryIO] = {}
        for split in SPLITS:
            frames = self.frames[split] + self.utterances[split] + 1
            size = frames * self.codec.num_codebooks * self.dtype.itemsize
            self._bins[split] = self._open(f"{split}.bin", size if whole else 0)
            if not whole:
                self._write(split, separator(self.codec.num_codebooks, self.codec.codebook_size))
        return self

    def add(self, split: Split, codes: Tensor, file: str, group: str) -> None:
        """Append one utterance, codes (Q, T). Evaluations compare groups: speakers."""
        # One separator stands at the start, one after each utterance.
        first = self.frames[split] + self.utterances[split] + 1
        place = {"first_frame": first, "num_frames": codes.shape[1]}
        line = {"split": split, "file": file, "group": group, **place}
        self._write(split, codes)
        self._write(split, separator(self.codec.num_codebooks, self.codec.codebook_size))
        # After the tokens: a line says that its utterance is complete.
        self._index.write(json.dumps(line).encode() + b"\n")
        self._index.flush()
        self._count(line)

    @property
    def seconds(self) -> float:
        return sum(self.frames.values()) / self.codec.frame_rate

    def __exit__(self, kind: type | None, *_: object) -> None:
        for file in (*self._bins.values(), self._index):
            file.close()
        if kind is not None:
            return
        if empty := [s for s in self.required if not self.utterances[s]]:
            raise ValueError(f"nothing was prepared: no utterance for {' or '.join(empty)}")
        with replacing(self.out / "meta.json") as new:
            new.write_text(json.dumps(self.meta(), indent=1) + "\n")

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

    def _count(self, line: dict[str, Any]) -> None:
        self.files.append(line["file"])
        self.frames[line["split"]] += line["num_frames"]
        self.utterances[line["split"]] += 1

    def _open(self, name: str, size: int) -> BinaryIO:
        """The file, cut off after `size` bytes."""
        path = self.out / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size or (path.exists() and not path.is_file()):  # a pipe would be waited for
            raise ValueError(f"{path} is damaged; remove it, or {AGAIN}")
        file = open(path, "ab")
        file.truncate(size)
        return file

    def _write(self, split: Split, codes: Tensor) -> None:
        tokens = flatten(codes[None], self.codec.codebook_size)[0]
        self._bins[split].write(tokens.cpu().numpy().astype(self.dtype).tobytes())
        self._bins[split].flush()
