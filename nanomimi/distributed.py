"""Processes, signals, device and precision."""

import contextlib
import fcntl
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

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


class Processes(NamedTuple):
    """This process among those that torchrun started, and the device it works on."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, so that all of them act alike."""
        if self.world_size == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)


@contextlib.contextmanager
def init_processes(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started, each with its own GPU; without torchrun, one."""
    if "RANK" not in os.environ:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder, if needed. Raises ValueError where another process holds its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process; change --out") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], int]]:
    """Yields a function: the number of the first SIGTERM or SIGINT that has arrived, or 0.

    A second SIGINT interrupts at once, but under torchrun, which repeats the terminal's.
    """
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT and "RANK" not in os.environ:
            raise KeyboardInterrupt
        caught.append(number)

    # Only the main thread may set handlers.
    main = threading.current_thread() is threading.main_thread()
    old = {n: signal.signal(n, catch) for n in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def resolve_dtype(name: str, device: torch.device, measure: bool = True) -> torch.dtype:
    """`auto`: bfloat16 where the device multiplies matrices clearly faster in it.

    With `measure` false, only on a GPU: float32 gives the same numbers on every CPU.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if device.type != "cpu" or not measure:
        return torch.float32
    # CPUs are measured: with matrix instructions bfloat16 wins, without them it may lose tenfold.
    seconds = {dtype: math.inf for dtype in (torch.float32, torch.bfloat16)}
    for i in range(30):
        for dtype in seconds:  # in turns, so that other work on the machine disturbs both alike
            a = torch.ones(512, 512, dtype=dtype, device=device)
            start = time.perf_counter()
            a @ a
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
        if i > 2 and seconds[torch.bfloat16] > 3 * seconds[torch.float32]:
            break  # all thirty products would take ten seconds here
    fast = [seconds[torch.float32] > 1.3 * seconds[torch.bfloat16]]
    if dist.is_initialized():
        dist.broadcast_object_list(fast)  # processes of one run must agree
    return torch.bfloat16 if fast[0] else torch.float32


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
