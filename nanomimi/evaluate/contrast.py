"""Step 7c, two models -> their difference in d' at equal likelihood, and how sure it is.

d' grows as a model gets better at everything, so models are compared where they predict equally
well: each seed gives a curve, d' over nats per frame, of the models along its training up to the
least nats. A difference is the mean gap of two curves over the nats that they share.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanomimi.evaluate.likelihood import d_prime, resample

Runs = Sequence[Sequence[Path]]  # per seed, evaluated run folders along a training


def contrast(first: Runs, second: Runs, kind: str, seed: int = 0) -> dict[str, Any]:
    """d' of `first` minus d' of `second`. Seeds are paired. The bootstrap draws seeds, and groups
    of the trials, which are the same for every run. Without common nats, all but p = 1 is NaN.
    """
    drawn = resample(json.loads((first[0][0] / "trials.json").read_text())[kind]["groups"], seed)
    weights = np.vstack([np.ones(drawn.shape[1]), drawn])  # the first: nothing is drawn
    curves = [[_curve(runs, kind, weights) for runs in side] for side in (first, second)]
    gaps = np.array([_gap(a, b) for a, b in zip(*curves, strict=True)])  # (seeds, draws + 1)
    seeds = np.random.default_rng(seed).integers(len(gaps), size=(len(drawn), len(gaps)))
    draws = gaps[seeds, 1 + np.arange(len(drawn))[:, None]].mean(axis=1)
    tail = min((draws <= 0).mean(), (draws >= 0).mean()) if np.isfinite(gaps).all() else 0.5
    return {
        "difference": gaps[:, 0].mean().item(),
        "interval": np.percentile(draws, [2.5, 97.5]).tolist(),
        "interval_90": np.percentile(draws, [5, 95]).tolist(),  # of the test of equivalence
        "p": float(max(2 * tail, 1 / len(draws))),
    }


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's correction: the k-th smallest of n values times n - k + 1, made monotonic."""
    adjusted, largest = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.get)):
        adjusted[name] = largest = min(1.0, max(largest, (len(p) - k) * p[name]))
    return adjusted


def nats_per_frame(run: Path, kind: str) -> float:
    """Of the held-out utterances of that kind."""
    held_out = json.loads((run / "evaluation.json").read_text())["held_out"]
    return held_out.get("nats_per_frame_by_kind", {}).get(kind, held_out["nats_per_frame"])


def _curve(runs: Sequence[Path], kind: str, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nats (points,), ascending, and d' (points, draws)."""
    nats = np.array([nats_per_frame(run, kind) for run in runs])
    # Later models learn the training's voices by heart, and pass the same nats a second time.
    order = nats[: nats.argmin() + 1].argsort()
    read = lambda run: np.array(json.loads((run / "trials.json").read_text())[kind]["d"])
    return nats[order], np.array([d_prime(read(runs[i]).sum(axis=1), weights) for i in order])


def _gap(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """(draws,): the mean difference of two piecewise linear curves over their common nats."""
    low, high = max(a[0][0], b[0][0]), min(a[0][-1], b[0][-1])
    if low > high:
        return np.full(a[1].shape[1], np.nan)
    at = np.linspace(low, high, 50)
    mean = lambda x, y: np.mean([np.interp(at, x, e) for e in np.eye(len(x))], axis=1) @ y
    return mean(*a) - mean(*b)
