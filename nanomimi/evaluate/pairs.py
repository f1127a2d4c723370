"""Step 7b, pairs of wavs: is the right one the likelier one? In the layout of SALMon (2409.07437):

    FOLDER/PART/sample_<i>_<k>.wav     k ascending: first the positive, then the negative of pair i

As in SALMon's official code, a clip's score is the mean over all its tokens; a tie counts half.
Pairs that differ in words (sWUGGY, sBLIMP, StoryCloze) are also judged by codebook 0 alone.
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
    """Per part, the share of pairs whose positive is likelier, and its standard error: by all
    codebooks, and by codebook 0 alone.
    """
    start = separator(codec.num_codebooks, codec.codebook_size)

    def score(path: Path) -> list[float]:
        wav = torch.from_numpy(read_audio(path, codec.sample_rate)[None, None])  # (1, 1, S)
        codes = torch.cat([start, codec.encode(wav)[0].cpu()], dim=1)
        plan = windows(codes.shape[1], max_frames)
        pieces = ((codes[:, begin:stop], first - begin) for begin, first, stop in plan)
        nats = torch.cat(list(scorer(pieces)))
        return [nats.mean().item(), nats[:, 0].mean().item()]

    results = {}
    for part, pairs in parts.items():
        bar = tqdm(pairs, part, unit="pair")
        nats = np.array([[score(path) for path in pair] for pair in bar])  # (pairs, 2, 2)
        right = (np.sign(nats[:, 1] - nats[:, 0]) + 1) / 2
        (whole, first), errors = right.mean(axis=0), right.std(axis=0) / np.sqrt(len(right))
        results[part] = {
            "accuracy": whole.item(),
            "standard_error": errors[0].item(),
            "accuracy_of_codebook_0": first.item(),
            "standard_error_of_codebook_0": errors[1].item(),
            "pairs": len(right),
        }
    return results
