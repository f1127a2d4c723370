"""Configuration: one frozen dataclass per script becomes its command line.

A field is one line, with its type, its default and a help text that gives the unit:

    @dataclass(frozen=True)
    class TrainConfig(Config):
        lr: float = option(1e-3, "peak learning rate", above=0)

`--lr 3e-4` sets it; `TrainConfig(lr=3e-4)` does the same from Python. Bounds are checked in both
cases.
"""

import argparse
import contextlib
import math
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

C = TypeVar("C", bound="Config")


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A field that is the flag `--name`; its bounds are checked at construction."""
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    return field(default=default, metadata={"help": help, "bounds": bounds})


def argument(help: str) -> Any:
    """A field of type `tuple[T, ...]` that collects the positional arguments, if any."""
    return field(default=(), metadata={"help": help, "positional": True})


@dataclass(frozen=True)
class Config:
    """Base of the scripts' configurations. Raises ValueError where a value is out of bounds."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            choices = typing.get_args(f.type) if typing.get_origin(f.type) is Literal else None
            if choices and value not in choices:
                raise ValueError(f"--{f.name} must be one of {', '.join(choices)}; got {value!r}")
            for name, bound in f.metadata.get("bounds", {}).items():
                if bound is None or value is None:
                    continue
                holds = {
                    "at least": value >= bound,
                    "above": value > bound,
                    "at most": value <= bound,
                }
                if not holds[name]:
                    raise ValueError(f"--{f.name} must be {name} {bound}; got {value}")


def parse(
    config: type[C],
    argv: Sequence[str] | None = None,
    doc: str | None = None,
    defaults: dict[str, Any] | None = None,
) -> C:
    """Command line -> configuration.

    `argv` defaults to the process's own arguments, `defaults` replaces the fields' own. Ends the
    process with status 2 and one line on standard error where a flag is unknown or its value is not
    of the field's type.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    for f in fields(config):
        _add(parser, f)
    # argparse passes a string as default through the flag's type: text from JSON becomes a Path.
    parser.set_defaults(**defaults or {})
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def run(config: type[C], main: Callable[[C], Any], doc: str | None = None) -> None:
    """A script's last line: parse, call `main`, print an error that the user can mend as a line."""
    try:
        main(parse(config, doc=doc))
    except (ValueError, OSError) as error:
        # Text of the system's own errors ("[Errno 13] Permission denied: ...") is one line already.
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", status=130))


def _fail(message: str, status: int = 2) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the docstring as it is written, and every default."""


def _add(parser: argparse.ArgumentParser, f: Any) -> None:
    kind, help = f.type, f.metadata["help"]
    if f.metadata.get("positional"):
        parser.add_argument(f.name, nargs="*", type=typing.get_args(kind)[0], help=help)
        return
    if isinstance(kind, types.UnionType):  # X | None: the flag takes an X, its absence means None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    assert f.default is not MISSING
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif typing.get_origin(kind) is Literal:
        how = {"choices": typing.get_args(kind)}
    else:
        how = {"type": kind, "metavar": kind.__name__.upper()}
    parser.add_argument(f"--{f.name}", default=f.default, help=help, **how)


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError where the device is not to be had."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); try --device cpu") from None
    return torch.device(name)


@dataclass(frozen=True)
class Processes:
    """This process's place among those that torchrun started, and the device it works on."""

    device: torch.device
    rank: int = 0
    count: int = 1


@contextlib.contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Joins the processes that torchrun started, each with a GPU of its own, or stands alone."""
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


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the device is measured to multiply it clearly faster than float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    seconds = _product_seconds(device)
    faster = [seconds[torch.float32] > 1.3 * seconds[torch.bfloat16]]
    if dist.is_initialized():
        dist.broadcast_object_list(faster)  # processes of one run must not differ in precision
    return torch.bfloat16 if faster[0] else torch.float32


def _product_seconds(device: torch.device) -> dict[torch.dtype, float]:
    """The best of many square matrix products in either precision."""
    # A GPU answers smaller products in the time of a launch, whatever their precision.
    size = 512 if device.type == "cpu" else 4096
    ones = {
        dtype: torch.ones(size, size, device=device, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(ones, math.inf)
    for _ in range(30):
        # In turns, so that other work on the machine disturbs both alike.
        for dtype, a in ones.items():
            start = time.perf_counter()
            (a @ a).sum().item()  # .item() waits for a GPU
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best
