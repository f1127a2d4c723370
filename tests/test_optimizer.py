"""Muon against the singular value decomposition and against torch's, which computes in bfloat16."""

import pytest
import torch

from nanomimi.optimizer import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 20), (3, 20, 8)])
def test_singular_vectors_stay_and_singular_values_grow_to_about_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(dim=1, keepdim=True).sqrt()
    for iterations in range(6):
        torch.testing.assert_close(orthogonalise(x, iterations), u * s[:, None] @ v)
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    assert 0.6 < s.min() and s.max() < 1.25


def test_updates_are_those_of_torch():
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in [(8, 8), (8, 8), (24, 8), (8, 24), (5,)]]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    groups = [{"params": ours[:4], "momentum": 0.95}, {"params": ours[4:]}]
    optimizers = [Muon(groups, 0.01, (0.9, 0.95), weight_decay=0.1)]
    optimizers += [torch.optim.AdamW(theirs[4:], 0.01, (0.9, 0.95), weight_decay=0.1)]
    same = dict(ns_steps=3, adjust_lr_fn="match_rms_adamw", weight_decay=0.1)
    optimizers += [torch.optim.Muon(theirs[:4], 0.01, **same)]
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=draw)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, x in zip(ours, theirs, start):
        assert (a - b).norm() < 0.01 * (b - x).norm()
    assert torch.equal(ours[4], theirs[4])
