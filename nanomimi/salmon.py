"""Step 8, the pairs of SALMon (arXiv 2409.07437): is the consistent clip the likelier one?

    FOLDER/PART/sample_<i>_<k>.wav     k ascending: first the positive, then the negative of pair i

As in the official code a clip's score is the mean over all its tokens, and a tie counts half.
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nanomimi.audio import read_chunks
from nanomimi.codec import Codec
from nanomimi.likelihood import Score, windows
from nanomimi.tokens import separator

PARTS = (
    "sentiment_consistency",
    "speaker_consistency",
    "gender_consistency",
    "bg_domain_consistency",
    "bg_all_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "bg_alignment",
)


def parts(folder: Path) -> dict[str, list[list[Path]]]:
    """The pairs (positive, negative) of every part that lies in the folder.

    Raises FileNotFoundError where there is none, ValueError where a clip lacks its partner.
    """
    found = {part: _pairs(folder / part) for part in PARTS if (folder / part).is_dir()}
    if not found:
        raise FileNotFoundError(f"{folder} has none of SALMon's parts ({', '.join(PARTS)})")
    return found


def judge(
    score: Score, codec: Codec, parts: dict[str, list[list[Path]]], max_frames: int
) -> dict[str, Any]:
    """Of every part, the share of pairs whose positive is likelier, and its standard error."""
    start = separator(codec.num_codebooks, codec.codebook_size)

    def nats_per_token(path: Path) -> float:
        spoken = codec.encode_chunks(read_chunks(path, codec.sample_rate)).cpu()
        codes = torch.cat([start, spoken], dim=1)
        plan = windows(codes.shape[1], max_frames)
        pieces = ((codes[:, begin:stop], first - begin) for begin, first, stop in plan)
        return torch.cat(list(score(pieces))).mean().item()

    results = {}
    for part, pairs in parts.items():
        bar = tqdm(pairs, part, unit="pair")
        nats = np.array([[nats_per_token(path) for path in pair] for pair in bar])
        right = (np.sign(nats[:, 1] - nats[:, 0]) + 1) / 2
        results[part] = {
            "accuracy": right.mean().item(),
            "standard_error": right.std().item() / math.sqrt(len(right)),
            "pairs": len(right),
        }
    return results


def _pairs(folder: Path) -> list[list[Path]]:
    samples: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in folder.iterdir():
        if match := re.fullmatch(r"sample_(\d+)_(\d+)\.wav", path.name):
            samples[int(match[1])][int(match[2])] = path
    unpaired = [i for i, files in samples.items() if len(files) != 2]
    if unpaired or not samples:
        which = f"sample {unpaired[0]} has not two files" if unpaired else "no sample_I_K.wav"
        raise ValueError(f"{folder} is not a part of SALMon ({which}); download it again")
    return [[files[k] for k in sorted(files)] for _, files in sorted(samples.items())]
