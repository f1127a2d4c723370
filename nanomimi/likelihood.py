"""Step 7, codes -> nats -> which of two is likelier: all that is judged by likelihood alone.

Consistency is measured by swapping prefixes. A1 and A2 are clips of one group (speaker), B1 and B2
of another; only the suffixes A2 and B2 are scored:

    d = [nats(A2 | B1) - nats(A2 | A1)] + [nats(B2 | A1) - nats(B2 | B1)]      right if d > 0

Every sequence holds one splice, and every suffix is compared with itself, so the splice, the words
and the difficulty of a clip cancel: what is left is what a prefix tells of its own group.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi.data import TokenDataset
from nanomimi.tokens import flatten

RESAMPLINGS = 2000  # of the bootstrap
Piece = tuple[Tensor, int]  # codes (Q, n), and the first of these frames to score
Score = Callable[[Iterable[Piece]], Iterator[Tensor]]  # nats_of with its model and batch size


@torch.inference_mode()
def nats_of(model: nn.Module, batch_size: int, pieces: Iterable[Piece]) -> Iterator[Tensor]:
    """For each piece, in order: nats (n - first, Q) float64 of its frames from `first` on."""
    device, pieces = next(model.parameters()).device, iter(pieces)
    while batch := list(itertools.islice(pieces, batch_size)):
        frames = [rearrange(codes, "q n -> n q") for codes, _ in batch]
        # The models are causal: what fills up the shorter pieces on the right changes nothing.
        codes = rearrange(nn.utils.rnn.pad_sequence(frames), "n b q -> b q n")
        nats = model(flatten(codes, model.codebook_size).to(device)).cpu().double()
        yield from (row[first - 1 : len(f) - 1] for row, f, (_, first) in zip(nats, frames, batch))


def windows(num_frames: int, max_frames: int) -> list[tuple[int, int, int]]:
    """(start, first, stop) of windows that score each of the frames 1 to num_frames - 1 once.

    A window holds the frames start to stop - 1, max_frames + 1 at most, and scores from `first` on.
    At least max_frames // 2 frames stand before a scored one, where the stream has so many.
    """
    plan = [(0, 1, min(num_frames, max_frames + 1))]
    while (first := plan[-1][2]) < num_frames:
        stop = min(num_frames, first - max_frames // 2 + max_frames + 1)
        plan.append((stop - max_frames - 1, first, stop))
    return plan


def held_out(score: Score, data: TokenDataset, max_frames: int) -> dict[str, Any]:
    """Likelihood of a whole split: every frame once, separators too."""
    plan = windows(data.num_frames, max_frames)
    pieces = ((data.codes(start, stop - start), first - start) for start, first, stop in plan)
    nats = torch.cat(list(tqdm(score(pieces), "held out", len(plan), unit="window")))
    return {
        **in_units(nats.mean(dim=0), data.meta),
        "frames": len(nats),
        "left_context_frames": [max_frames // 2, max_frames],
    }


def in_units(nats_per_codebook: Tensor, meta: dict[str, Any]) -> dict[str, Any]:
    """Mean nats (Q,) of the tokens of a frame, in the units of all reports."""
    per_frame, num_codebooks = nats_per_codebook.sum().item(), len(nats_per_codebook)
    return {
        "nats_per_token": per_frame / num_codebooks,
        "nats_per_codebook": nats_per_codebook.tolist(),
        "nats_per_frame": per_frame,
        "bits_per_second": per_frame / math.log(2) * meta["frame_rate"],
        "codec_bits_per_second": num_codebooks
        * math.log2(meta["codebook_size"])
        * meta["frame_rate"],
    }


@dataclass(frozen=True)
class Trial:
    """(prefix, suffix) of A and of B, codes (Q, T); the interval resamples `groups`."""

    a: tuple[Tensor, Tensor]
    b: tuple[Tensor, Tensor]
    groups: tuple[str, ...]


def prefix_swap(
    score: Score, trials: Sequence[Trial], longest: int, seed: int, name: str
) -> dict[str, Any]:
    """Accuracy (chance: 0.5) with its 95% interval, and the mean of d in nats per token.

    `longest` bounds prefix and suffix in frames. A tie counts half.
    """
    sequences = (sequence for trial in trials for sequence in _swaps(trial, longest))
    bar = tqdm(score(sequences), name, 4 * len(trials), unit="sequence")
    nats = torch.stack([suffix.mean(dim=0) for suffix in bar])
    own_a, swapped_a, own_b, swapped_b = rearrange(nats, "(n four) q -> four n q", four=4)
    d = swapped_a - own_a + swapped_b - own_b
    right = (torch.sign(d.sum(dim=1)).numpy() + 1) / 2
    return {
        "accuracy": right.mean().item(),
        "interval": bootstrap(right, [trial.groups for trial in trials], seed),
        "margin": d.mean().item(),
        "margin_per_codebook": d.mean(dim=0).tolist(),
        "trials": len(trials),
        "groups": len({group for trial in trials for group in trial.groups}),
    }


def bootstrap(right: np.ndarray, groups: Sequence[tuple[str, ...]], seed: int) -> list[float]:
    """95% interval of the mean of `right` when not trials but groups are drawn anew.

    A trial counts as often as its group is drawn; with two groups, as often as the product says.
    """
    names = sorted({name for trial in groups for name in trial})
    index = np.array([[names.index(name) for name in trial] for trial in groups])
    draw = np.random.default_rng(seed).multinomial
    drawn = draw(len(names), np.full(len(names), 1 / len(names)), RESAMPLINGS)
    weights = drawn[:, index].prod(axis=2)
    weights = weights[weights.any(axis=1)]
    return np.percentile(weights @ right / weights.sum(axis=1), [2.5, 97.5]).tolist()


def _swaps(trial: Trial, longest: int) -> Iterator[Piece]:
    """A2 behind A1 and behind B1, B2 behind B1 and behind A1; all of the same length."""
    clips = (trial.a, trial.b)
    before, after = (min(longest, *(clip[i].shape[1] for clip in clips)) for i in (0, 1))
    for own, other in (clips, clips[::-1]):
        for prefix in (own[0], other[0]):
            yield torch.cat([prefix[:, -before:], own[1][:, :after]], dim=1), before
