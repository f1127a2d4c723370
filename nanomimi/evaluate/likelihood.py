"""Step 7a, codes -> nats -> which of two clips is likelier: all that is judged by likelihood alone.

Consistency is measured by swapping prefixes. A1 and A2 are clips of one group (speaker), B1 and B2
of another. A separator stands before and after a prefix, as between utterances in training, and
only the suffixes A2 and B2 are scored, in nats per frame:

    d = [nats(A2 | B1) - nats(A2 | A1)] + [nats(B2 | A1) - nats(B2 | B1)]     right if d > 0

Every suffix is compared with itself: its words and its difficulty cancel, and what a prefix tells
about its own group is left. d' = mean(d) / sd(d) over trials does not grow with the scale of d.
"""

import itertools
from collections import defaultdict
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
    """Likelihood of a whole split: every frame once, separators included; by kind where several."""
    plan = windows(data.num_frames, max_frames)
    pieces = ((data.codes(start, stop - start), first - start) for start, first, stop in plan)
    nats = torch.cat(list(tqdm(scorer(pieces), "held out", len(plan), unit="window")))
    context, parts = [max_frames // 2, max_frames], defaultdict(list)  # frames before a scored one
    for line in data.utterances():  # each with the separator after it
        first = line["first_frame"] - 1  # frame 0 has no nats
        parts[kind_of(line["group"])].append(nats[first : first + line["num_frames"] + 1])
    by_kind = {kind: torch.cat(rows).sum(dim=1).mean().item() for kind, rows in parts.items()}
    result = {**summarize(nats.mean(dim=0), data.meta), "frames": len(nats), "context": context}
    return result | ({"nats_per_frame_by_kind": by_kind} if len(by_kind) > 1 else {})


def kind_of(group: str) -> str:
    """"KIND: NAME" is the group NAME of a kind of utterances that is reported apart."""
    return group.rpartition(": ")[0] or "all"


class Trial(NamedTuple):
    """(prefix, suffix) of A and of B, codes (Q, T); intervals resample `groups`."""

    clips: tuple[Sequence[Tensor], Sequence[Tensor]]
    groups: tuple[str, ...]


def prefix_swap(scorer: Scorer, trials: Sequence[Trial], longest: int, end: Tensor) -> np.ndarray:
    """d (trials, Q); prefix and suffix have at most `longest` frames, `end` is the separator."""
    sequences = (sequence for trial in trials for sequence in _swaps(trial, longest, end))
    bar = tqdm(scorer(sequences), "consistency", 4 * len(trials), unit="sequence")
    nats = torch.stack([suffix.mean(dim=0) for suffix in bar])
    own_a, swapped_a, own_b, swapped_b = rearrange(nats, "(n four) q -> four n q", four=4)
    return (swapped_a - own_a + swapped_b - own_b).numpy()


def _swaps(trial: Trial, longest: int, end: Tensor) -> Iterator[Piece]:
    """A2 after A1 and after B1, B2 after B1 and after A1; all of the same length."""
    before, after = (min(longest, *(clip[i].shape[1] for clip in trial.clips)) for i in (0, 1))
    for own, other in (trial.clips, trial.clips[::-1]):
        for prefix in (own[0], other[0]):
            yield torch.cat([end, prefix[:, -before:], end, own[1][:, :after]], dim=1), before + 2


def summary(d: np.ndarray, groups: Sequence[tuple[str, ...]], seed: int) -> dict[str, Any]:
    """What d (trials, Q) says: d', accuracy (a tie counts half), margin; 95% intervals."""
    total, right, weights = d.sum(axis=1), (np.sign(d.sum(axis=1)) + 1) / 2, resample(groups, seed)
    mean = lambda x: (weights @ x) / weights.sum(axis=1)
    interval = lambda draws: np.percentile(draws, [2.5, 97.5]).tolist()
    return {
        "d_prime": float(d_prime(total)),
        "d_prime_interval": interval(d_prime(total, weights)),
        "accuracy": right.mean().item(),
        "accuracy_interval": interval(mean(right)),
        "margin": total.mean().item(),
        "margin_interval": interval(mean(total)),
        "margin_per_codebook": d.mean(axis=0).tolist(),
        "trials": len(d),
        "groups": len({group for names in groups for group in names}),
    }


def d_prime(d: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over standard deviation of d (trials,); with weights (draws, trials), of each draw."""
    weights = np.ones(len(d)) if weights is None else weights
    mean, square = (weights @ x / weights.sum(axis=-1) for x in (d, d**2))
    return mean / np.sqrt(np.maximum(square - mean**2, 1e-18))


def resample(groups: Sequence[tuple[str, ...]], seed: int, draws: int = 2000) -> np.ndarray:
    """Weights (draws, trials) of a bootstrap that draws groups instead of trials. A trial counts
    as often as its group is drawn; with two groups, as often as the product says.
    """
    names, index = np.unique(groups, return_inverse=True)
    draw = np.random.default_rng(seed).multinomial
    drawn = draw(len(names), np.full(len(names), 1 / len(names)), draws)
    weights = drawn[:, index.reshape(len(groups), -1)].prod(axis=2).astype(float)
    return weights[weights.any(axis=1)]
