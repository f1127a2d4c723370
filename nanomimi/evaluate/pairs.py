"""Step 7b, pairs of wavs: is the right one the likelier one? In the layout of SALMon (2409.07437):

    FOLDER/PART/sample_<i>_<k>.wav     k ascending: first the positive, then the negative of pair i

As in SALMon's official code, a clip's score is the mean over all its tokens; a tie counts half.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nanomimi.audio import read_audio
from nanomimi.codec import Codec
from nanomimi.evaluate.likelihood import Scorer, windows
from nanomimi.tokens import separator

Parts = dict[str, list[list[Path]]]  # the pairs of each part: [positive, negative]


def find_pairs(folder: Path) -> Parts:
    """Raises FileNotFoundError where there is no pair, ValueError where a clip has no partner."""
    samples: dict[tuple[str, int], dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*/sample_*.wav")):
        if match := re.fullmatch(r"sample_(\d+)_(\d+)\.wav", path.name):
            samples[path.parent.name, int(match[1])][int(match[2])] = path
    if not samples:
        raise FileNotFoundError(f"{folder} has no pairs (PART/sample_I_K.wav); give such a folder")
    parts: Parts = defaultdict(list)
    for (part, i), files in sorted(samples.items()):
        if len(files) != 2:
            raise ValueError(f"{folder / part}: sample {i} needs two files; has {len(files)}")
        parts[part].append([files[k] for k in sorted(files)])
    return parts


def judge(scorer: Scorer, codec: Codec, parts: Parts, max_frames: int) -> dict[str, Any]:
    """Per part, the share of pairs whose positive is likelier, and its standard error."""
    start = separator(codec.num_codebooks, codec.codebook_size)

    def nats_per_token(path: Path) -> float:
        wav = torch.from_numpy(read_audio(path, codec.sample_rate)[None, None])  # (1, 1, S)
        codes = torch.cat([start, codec.encode(wav)[0].cpu()], dim=1)
        plan = windows(codes.shape[1], max_frames)
        pieces = ((codes[:, begin:stop], first - begin) for begin, first, stop in plan)
        return torch.cat(list(scorer(pieces))).mean().item()

    results = {}
    for part, pairs in parts.items():
        bar = tqdm(pairs, part, unit="pair")
        nats = np.array([[nats_per_token(path) for path in pair] for pair in bar])
        right = (np.sign(nats[:, 1] - nats[:, 0]) + 1) / 2
        results[part] = {
            "accuracy": right.mean().item(),
            "standard_error": (right.std() / np.sqrt(len(right))).item(),
            "pairs": len(right),
        }
    return results
