"""Configuration: the fields of one frozen dataclass per script are the script's flags.

    lr: float = option(1e-3, "peak learning rate", above=0)

`--lr 3e-4` sets this field; `TrainConfig(lr=3e-4)` does the same from Python. Both check bounds.
"""

import argparse
import operator
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from nanomimi.files import fits

C = TypeVar("C", bound="Config")
BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le}


def option(default: Any, help: str, positional: bool = False, **bounds: float) -> Any:
    """A field that is the flag `--name`; `bounds` are at_least, above and at_most."""
    bounds = {name.replace("_", " "): bound for name, bound in bounds.items()}
    return field(default=default, metadata=dict(help=help, positional=positional, bounds=bounds))


@dataclass(frozen=True)
class Config:
    """Base of the scripts' configurations. Raises ValueError where a value is out of bounds."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not fits(value, f.type):
                kinds = typing.get_args(f.type) or (f.type,)
                kind = " or ".join(getattr(each, "__name__", str(each)) for each in kinds)
                raise ValueError(f"--{f.name} must be {kind}; got {value!r:.80}")
            for name, bound in f.metadata["bounds"].items():
                if value is not None and not BOUNDS[name](value, bound):
                    raise ValueError(f"--{f.name} must be {name} {bound}; got {value}")


def parse(config: type[C], argv: list[str] | None = None, doc: str = "", defaults: Any = None) -> C:
    """Command line -> configuration. `defaults` replaces the defaults of those that are fields."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=_Help, allow_abbrev=False)
    for f in fields(config):
        _add(parser, f)
    # argparse passes a string default through the flag's type: text from JSON becomes a Path.
    names = {f.name for f in fields(config)}
    parser.set_defaults(**{k: v for k, v in (defaults or {}).items() if k in names})
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def run_script(config: type[C], main: Callable[[C], Any], doc: str | None = None) -> None:
    """A script's last line: parse, call `main`, print errors that a user can fix as one line."""
    values = None
    try:
        values = parse(config, doc=doc)
        main(values)
    except (ValueError, OSError, ArithmeticError, NotImplementedError, KeyboardInterrupt) as error:
        # A full disk is reported without the file's name.
        full = isinstance(error, OSError) and error.errno and error.filename is None
        place = f" (in {values.out})" if full and hasattr(values, "out") else ""
        text = " ".join(str(error).split()) or "interrupted"
        print(f"{Path(sys.argv[0]).name}: {text}{place}", file=sys.stderr)
        sys.exit({KeyboardInterrupt: 130, FloatingPointError: 1}.get(type(error), 2))


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the docstring as it is written, and every default."""


def _add(parser: argparse.ArgumentParser, f: Any) -> None:
    kind, positional, how = f.type, f.metadata["positional"], {"help": f.metadata["help"]}
    if isinstance(kind, types.UnionType):  # X | None: the flag takes an X, its absence means None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is tuple:
        kind, how["nargs"] = typing.get_args(kind)[0], "*" if positional else "+"
    if kind is bool:
        how["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(kind) is Literal:
        how["choices"] = typing.get_args(kind)
    else:
        how["type"] = _path if kind is Path else kind
    parser.add_argument(f.name if positional else f"--{f.name}", default=f.default, **how)


def _path(text: str) -> Path:
    if not text:  # Path("") is the current folder
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
