"""Step 6, logits -> token: temperature, top-k, top-p, and a generator for repeatable draws."""

from collections.abc import Callable

import torch
from torch import Tensor


def make_sampler(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, device: str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """A function that draws one class per row: logits (B, V) -> (B,) int64.

    Temperature 0 takes the likeliest. Each sampler has its own generator, so draws are repeatable.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def sample_token(logits: Tensor) -> Tensor:
        if temperature < 1e-6:  # logits / 1e-320 would be infinite
            return logits.argmax(dim=-1)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        probabilities = keep_top_p(keep_top_k(probabilities, top_k), top_p)
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / noise).argmax(dim=-1)  # as multinomial draws, in fewer kernels

    return sample_token


def keep_top_k(probabilities: Tensor, top_k: int) -> Tensor:
    """Zero all but the `top_k` largest of every row (0: keep all), without normalising."""
    if top_k == 0 or top_k >= probabilities.shape[-1]:
        return probabilities
    smallest_kept = probabilities.topk(top_k, dim=-1).values[..., -1:]
    return probabilities.where(probabilities >= smallest_kept, 0)


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Nucleus (arXiv 1904.09751): the fewest classes whose share of a row reaches `top_p`."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True)
    share_before = (ordered.cumsum(dim=-1) - ordered) / ordered.sum(dim=-1, keepdim=True)
    ordered = ordered.where(share_before < top_p, 0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)
