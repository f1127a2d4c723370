"""The optimizer: AdamW and, for the matrices inside layers, Muon.

Few directions of a matrix have large gradients, and the others hardly learn. Muon (Keller Jordan,
kellerjordan.github.io/posts/muon) replaces the momentum U S V^T by U V^T, which moves all alike.
The rows of embeddings and heads are learned apart: AdamW keeps these tables, and the norms.
"""

import torch
from torch import Tensor, nn, optim


def make_optimizer(model: nn.Module, kind: str, lr: float, weight_decay: float) -> optim.Optimizer:
    """`kind`: muon, or adamw for everything. The betas are those of the paper."""
    matrices, tables, scales = [], [], []
    for name, p in model.named_parameters():
        inside = kind == "muon" and "layers." in name and p.ndim == 2
        (matrices if inside else tables if p.ndim >= 2 else scales).append(p)
    # Decay pulls weights to zero. That regularises matrices, but the scales of norms belong near 1.
    groups = [{"params": tables}, {"params": scales, "weight_decay": 0.0}]
    groups += [{"params": matrices, "momentum": 0.95}] if matrices else []
    return Muon(groups, lr, (0.9, 0.95), weight_decay=weight_decay, fused=True)


class Muon(optim.AdamW):
    """AdamW, and Muon for groups that have a momentum. Rate and decay are shared."""

    @torch.no_grad()
    def step(self) -> None:
        for group in (group for group in self.param_groups if "momentum" in group):
            for shape in {p.shape for p in group["params"]}:  # of one shape: a batched product
                same = [p for p in group["params"] if p.shape == shape]
                for p in same:
                    buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    p.grad.lerp_(buffer, group["momentum"])  # Nesterov: one gradient ahead
                updates = orthogonalise(torch.stack([p.grad for p in same]))
                # Of AdamW's size (root mean square 0.2), they share its rate (arXiv 2502.16982).
                updates *= 0.2 * max(shape) ** 0.5
                for p, update in zip(same, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                    p.grad = None  # AdamW passes over it
        super().step()


def orthogonalise(x: Tensor, iterations: int = 3) -> Tensor:
    """(B, M, N) = U S V^T -> roughly U V^T, by products alone (a Newton-Schulz iteration)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller square
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above one
    for _ in range(iterations):  # a s + b s^3 + c s^5 lifts small singular values s towards one
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x
