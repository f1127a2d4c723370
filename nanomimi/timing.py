"""What bench.py and the experiment measure with: turns of contenders, and what they cost."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

Turn = Callable[[], dict[str, float]]  # works once and returns named seconds


def interleave(
    turns: dict[str, Turn], rounds: int, name: str, quiet: bool = False
) -> dict[str, dict[str, float]]:
    """Median seconds of every part of every turn, after one round of warming up."""
    seen: dict[str, list[dict[str, float]]] = {key: [] for key in turns}
    for _ in tqdm(range(rounds + 1), name, unit="round", leave=False, disable=quiet):
        for key, turn in turns.items():
            seen[key].append(turn())
    return {
        key: {part: statistics.median(t[part] for t in times[1:]) for part in times[0]}
        for key, times in seen.items()
    }


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time until the device has done the work."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of ten products of large square matrices."""
    size = 1536 if device.type == "cpu" else 8192
    a = b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def train_turn(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Turn:
    """Steps of forward, backward, clipping and fused AdamW, in `dtype` by autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = torch.zeros(())

    def forward() -> None:
        nonlocal loss
        with _autocast(tokens, dtype):
            loss = model(tokens).mean()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: {
        "forward": seconds(forward, tokens.device),
        "backward": seconds(lambda: loss.backward(), tokens.device),
        "optimizer": seconds(update, tokens.device),
    }


def greedy(logits: Tensor) -> Tensor:
    """The likeliest code (B,); END, the last class, would stop generation early."""
    return logits[:, :-1].argmax(dim=-1)


def speak_turn(model: nn.Module, prompt: Tensor, frames: int) -> Turn:
    """Greedy generation of frames behind prompt, codes (B, Q, T)."""
    work = lambda: list(model.generate(prompt, frames, greedy))
    return lambda: {"generate": seconds(work, prompt.device)}


def training_flops(model: nn.Module, tokens: Tensor) -> int:
    """Of forward and backward, two per multiply-add, attention in full, as torch counts them."""
    # Only the plain form of attention is made of products that the counter knows on a CPU. It is
    # large, and windows cost the same, so one is counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens[:1]).mean().backward()
    model.zero_grad(set_to_none=True)
    return len(tokens) * counter.get_total_flops()


def peak_bytes(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> int:
    """Most memory in a training step: weights, gradients, AdamW's moments, and what passes keep."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(2):  # the moments exist from the second step on
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            with _autocast(tokens, dtype):
                loss = model(tokens).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return tracker.get_tracker_snapshot("peak")[tokens.device]["Total"]


def _autocast(tokens: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)
