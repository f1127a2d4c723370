"""Files that crashes and strangers cannot turn into wrong results: checked JSON, whole files."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Positive = Annotated[float, "above 0, and of a size that such numbers have"]


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """The content of a .json, or of all lines of a .jsonl, if it is of the kind (see fits).

    Raises FileNotFoundError, and ValueError with the file and the remedy.
    """
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path} is missing or not a file; {remedy}")
    text = path.read_bytes()
    with contextlib.suppress(ValueError, RecursionError):
        text = b"[%s]" % b",".join(text.splitlines()) if path.suffix == ".jsonl" else text
        if fits(content := json.loads(text), kind):
            return content
    raise ValueError(f"{path} is damaged or of another format; {remedy}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value, of JSON say, is of the kind, and its numbers of 64 bits and finite.

    A kind is a type or a dict of keys and their kinds; with the key `...` other keys are allowed.
    """
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        kind = get_type_hints(kind, include_extras=True)
    if isinstance(kind, dict):
        missing = kind.keys() - {...} - value.keys() if isinstance(value, dict) else True
        if missing or (... not in kind and value.keys() - kind.keys()):
            return False
        return all(fits(value[key], kind[key]) for key in kind.keys() - {...})
    if isinstance(kind, UnionType):
        return any(fits(value, each) for each in args)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(fits(each, args[0]) for each in value)
    if origin is Annotated:
        return fits(value, args[0]) and 0 < value < 1e9
    if origin is Literal:
        return value in args
    if kind in (int, float):  # abs is false for NaN
        return type(value) in (int, kind) and abs(value) < (2**63 if kind is int else 1e300)
    return isinstance(value, kind)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to. Its file then replaces `path` at once or, on errors, vanishes."""
    new = path.with_name(f"{path.name}.tmp")
    try:
        yield new
        with open(new, "r+b") as file:
            os.fsync(file)  # or a power failure could leave the name without the content
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps it from other processes that write into it, or ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process; change --out") from None
        except (ImportError, OSError):
            pass  # Windows and some network file systems have no such locks
        yield


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Replace a .safetensors file; FloatingPointError where a number is not finite."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _require_finite(tensors, path)
    with replacing(path) as new:
        save_file(tensors, new)


def load_tensors(
    path: Path, like: dict[str, Tensor], remedy: str, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The file's tensors, which must have the names and shapes of `like`, in its dtypes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file; {remedy}")
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged; {remedy} ({error})") from None
    shapes, expected = ({n: t.shape for n, t in each.items()} for each in (tensors, like))
    # AdamW would write beyond the end of a moment that is too small.
    for name in (name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        raise ValueError(
            f"{path}: {name} has the shape {shapes.get(name)}, not {expected.get(name)}; {remedy}"
        )
    _require_finite(tensors, path)
    # Copied: a loaded tensor may be a view of the file, and the optimizer writes into it.
    return {name: tensor.to(like[name].dtype, copy=True) for name, tensor in tensors.items()}


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        # The norm squares: a weight of 1e30, with which a model is lost as well, is found too.
        if not tensor.float().norm().isfinite():
            raise FloatingPointError(f"{path}: {name} is not finite; train again with a lower --lr")
