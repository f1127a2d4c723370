"""Step 7a, codes -> nats -> which of two clips is likelier: all that is judged by likelihood alone.

Consistency is measured by swapping prefixes. A1 and A2 are clips of one group (speaker), B1 and B2
of another; only the suffixes A2 and B2 are scored:

    d = [nats(A2 | B1) - nats(A2 | A1)] + [nats(B2 | A1) - nats(B2 | B1)]     right if d > 0

Every sequence contains one splice, and every suffix is compared with itself: the splice, the words
and the difficulty of a clip cancel, and what a prefix tells about its own group is left.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi.data import TokenDataset
from nanomimi.lm import LanguageModel, summarize
from nanomimi.tokens import flatten

Piece = tuple[Tensor, int]  # codes (Q, n), and the first of these frames to score
Scorer = Callable[[Iterable[Piece]], Iterator[Tensor]]  # `score` with its model and batch size


@torch.inference_mode()
def score(model: LanguageModel, batch_size: int, pieces: Iterable[Piece]) -> Iterator[Tensor]:
    """For each piece, in order: nats (n - first, Q) float64 of its frames from `first` on."""
    device, end, pieces = next(model.parameters()).device, model.codebook_size, iter(pieces)
    while batch := list(itertools.islice(pieces, batch_size)):
        frames = [rearrange(codes, "q n -> n q") for codes, _ in batch]
        # DelayLM reads END after the last frame. Other models do not see what follows a frame.
        codes = rearrange(nn.utils.rnn.pad_sequence(frames, True, end), "b n q -> b q n")
        nats = model(flatten(codes, end).to(device)).cpu().double()
        yield from (row[first - 1 : len(f) - 1] for row, f, (_, first) in zip(nats, frames, batch))


def windows(num_frames: int, max_frames: int) -> list[tuple[int, int, int]]:
    """(start, first, stop) of windows that score each of the frames 1 to num_frames - 1 once.

    A window holds the frames start to stop - 1, at most max_frames + 1, and scores from `first` on.
    At least max_frames // 2 frames precede a scored one, where the stream has so many.
    """
    plan = [(0, 1, min(num_frames, max_frames + 1))]
    while (first := plan[-1][2]) < num_frames:
        stop = min(num_frames, first - max_frames // 2 + max_frames + 1)
        plan.append((stop - max_frames - 1, first, stop))
    return plan


def held_out(scorer: Scorer, data: TokenDataset, max_frames: int) -> dict[str, Any]:
    """Likelihood of a whole split: every frame once, separators included."""
    plan = windows(data.num_frames, max_frames)
    pieces = ((data.codes(start, stop - start), first - start) for start, first, stop in plan)
    nats = torch.cat(list(tqdm(scorer(pieces), "held out", len(plan), unit="window")))
    context = [max_frames // 2, max_frames]  # frames before a scored one
    return {**summarize(nats.mean(dim=0), data.meta), "frames": len(nats), "context": context}


class Trial(NamedTuple):
    """(prefix, suffix) of A and of B, codes (Q, T); the interval resamples `groups`."""

    clips: tuple[Sequence[Tensor], Sequence[Tensor]]
    groups: tuple[str, ...]


def prefix_swap(scorer: Scorer, trials: Sequence[Trial], longest: int, seed: int) -> dict[str, Any]:
    """Accuracy (a tie counts half), its 95% interval, and mean d per token; `longest` in frames."""
    sequences = (sequence for trial in trials for sequence in _swaps(trial, longest))
    bar = tqdm(scorer(sequences), "consistency", 4 * len(trials), unit="sequence")
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


def _swaps(trial: Trial, longest: int) -> Iterator[Piece]:
    """A2 after A1 and after B1, B2 after B1 and after A1; all of the same length."""
    before, after = (min(longest, *(clip[i].shape[1] for clip in trial.clips)) for i in (0, 1))
    for own, other in (trial.clips, trial.clips[::-1]):
        for prefix in (own[0], other[0]):
            yield torch.cat([prefix[:, -before:], own[1][:, :after]], dim=1), before


def bootstrap(right: np.ndarray, groups: Sequence[tuple[str, ...]], seed: int) -> list[float]:
    """95% interval of the mean of `right` when groups are resampled instead of trials. A
    trial counts as often as its group is drawn; with two groups, as often as the product says.
    """
    names, index = np.unique(groups, return_inverse=True)
    draw = np.random.default_rng(seed).multinomial
    drawn = draw(len(names), np.full(len(names), 1 / len(names)), 2000)
    weights = drawn[:, index.reshape(len(groups), -1)].prod(axis=2)
    weights = weights[weights.any(axis=1)]
    return np.percentile(weights @ right / weights.sum(axis=1), [2.5, 97.5]).tolist()
