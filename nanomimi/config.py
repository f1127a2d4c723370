"""Configuration: the fields of one frozen dataclass per script are the script's flags.

    lr: float = option(1e-3, "peak learning rate", above=0)

`--lr 3e-4` sets this field; `TrainConfig(lr=3e-4)` does the same from Python. Both check type and
bounds. JSON files, which hold what is no flag, are read, checked and replaced here as well.
"""

import argparse
import contextlib
import json
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

C = TypeVar("C", bound="Config")
ONE_LINE = (ValueError, OSError, NotImplementedError, FloatingPointError)  # no traceback
BOUNDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le}


def option(default: Any, help: str, positional: bool = False, **bounds: float) -> Any:
    """A field that is the flag `--name`; `bounds` are at_least, above and at_most."""
    bounds = {name.replace("_", " "): bound for name, bound in bounds.items()}
    return field(default=default, metadata=dict(help=help, positional=positional, bounds=bounds))


@dataclass(frozen=True)
class Config:
    """Base of the scripts' configurations. Raises ValueError where a value does not fit."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not _fits(value, f.type):
                kind = getattr(f.type, "__name__", f.type)
                if typing.get_origin(f.type) is Literal:
                    kind = f"one of {', '.join(typing.get_args(f.type))}"
                raise ValueError(f"--{f.name} must be {kind}; got {value!r:.80}")
            for name, bound in f.metadata["bounds"].items():
                if value is not None and not BOUNDS[name](value, bound):
                    raise ValueError(f"--{f.name} must be {name} {bound}; got {value}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether the value is of the annotated type; numbers must fit 64 bits, or float32."""
    kinds = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in kinds
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, kinds[0]) for v in value)
    if kinds:  # X | None
        return any(_fits(value, k) for k in kinds)
    if kind in (int, float):
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return fits and abs(value) < (2**63 if kind is int else 2**127)
    return isinstance(value, kind)


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
    try:
        main(parse(config, doc=doc))
    except (*ONE_LINE, KeyboardInterrupt) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit({KeyboardInterrupt: 130, FloatingPointError: 1}.get(type(error), 2))


def read_json(path: Path, example: Any, remedy: str) -> Any:
    """A JSON file like `example` (see from_json). ValueError and OSError name it."""
    return from_json(read_file(path), example, f"{path} cannot be used; {remedy}")


def read_file(path: Path) -> bytes:
    """The content of a file. FileNotFoundError for a pipe, too: it would be waited for."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file")
    return path.read_bytes()


def from_json(text: bytes, example: Any, where: str) -> Any:
    """JSON like `example`, or a ValueError that starts with `where`."""
    try:
        value = json.loads(text)
        check_like(value, example, "the file")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} ({error})") from None
    return value


def check_like(value: Any, example: Any, name: str) -> None:
    """Raises ValueError where the value from JSON, called `name`, is not like the example.

    Keys and types are the same; with the key `...` in the example, other keys may come as well.
    Numbers are finite, and positive where the example's are. A list's items are like the example's
    first item, and there is one at least. A tuple lists the choices.
    """
    if isinstance(example, tuple):
        right, kind = value in example, " or ".join(map(str, example))
    else:
        right, kind = _fits(value, type(example)), type(example).__name__
    if right and type(example) in (int, float) and not (value > 0 or value == example):
        right, kind = False, f"positive {kind}" if example else f"{kind} of at least 0"
    if not right or value == [] != example:
        raise ValueError(f"{name} must be {kind}; got {value!r:.80}")
    if isinstance(example, dict):
        missing, unknown = example.keys() - value.keys() - {...}, value.keys() - example.keys()
        for key in sorted(missing if ... in example else missing | unknown):
            raise ValueError(f"{name} {'lacks' if key in missing else 'has'} the key {key}")
        for key in example.keys() & value.keys():
            check_like(value[key], example[key], key)
    for item in value if isinstance(example, list) else []:
        check_like(item, example[0], name)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing, such as a full disk, do not name the file. Inside, they do."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, whose file then replaces `path` at once or, on errors, vanishes."""
    new = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path):
            yield new
            with open(new, "rb") as file:
                os.fsync(file)  # or a power failure could leave the new name with no content
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


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
    if not text:  # which Path would take for the current folder
        raise argparse.ArgumentTypeError("give a path")
    return Path(text)
