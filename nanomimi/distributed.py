"""Processes, their signals, device and precision."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def resolve_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one. Raises ValueError where the device cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"--device {name} cannot be used ({reason}); try --device cpu") from None


@contextlib.contextmanager
def init_processes(name: str) -> Iterator[tuple[torch.device, int, int]]:
    """Joins torchrun's processes, if any. Yields this one's device and rank, and their number."""
    device = resolve_device(name)
    if "RANK" not in os.environ:
        yield device, 0, 1
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGTERM and SIGINT, instead of ending the process at once."""
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()  # only the main thread may set handlers
    old = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def resolve_dtype(name: str, device: torch.device, amx: bool = True) -> torch.dtype:
    """`auto`: bfloat16 on a GPU and, if `amx`, on a CPU with AMX.

    Without special instructions, a CPU takes up to forty times as long in bfloat16 as in float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and amx and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def compile_model(
    model: nn.Module, parallel: nn.Module, tokens: Tensor, autocast: torch.autocast
) -> None:
    """Compile `model` in place by a first pass through `parallel`, or say why it stays eager."""
    model.compile()  # in place, so that the names of the weights stay the same
    try:
        with getattr(parallel, "no_sync", contextlib.nullcontext)(), autocast:
            parallel(tokens).mean().backward()
    except RuntimeError as error:  # dynamo's and inductor's are; the model's own would come again
        model.compile(disable=True)
        print(f"training is not compiled ({' '.join(str(error).split())[:120]})")
    model.zero_grad(set_to_none=True)
