"""A run folder: save, load, resume. Weights are safetensors, everything else is JSON.

    runs/NAME/run.json                       settings, and which step's files belong to the run
    runs/NAME/model-000900.safetensors       weights at that step
    runs/NAME/optimizer-000900.safetensors   AdamW's moments at that step
    runs/NAME/log.jsonl                      one line per logged step

run.json is replaced last and atomically, so a run folder always holds one complete checkpoint.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nanomimi.config import check_like, from_json, naming, read_file, read_json, replacing
from nanomimi.data import META
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import LlamaConfig, RopeScaling
from nanomimi.lm import LanguageModel

FORMAT = 2
MODELS: dict[str, type[LanguageModel]] = {"flat": FlatLM, "hierarchical": HierarchicalLM}
SIZES = {"num_codebooks": 1, "codebook_size": 1, "max_frames": 1}
RUN = {  # an example of run.json; build knows what belongs to an architecture
    "format": (FORMAT,),
    "step": 0,  # of imported weights
    "model": {"arch": tuple(MODELS), **SIZES, "llama": {...: 0}, "options": {...: 0}},
    "config": {"data": [""], ...: 0},
    "data": {**META, "splits": [META["splits"]]},
}


def build(model: dict[str, Any]) -> LanguageModel:
    """The model that run.json's "model" describes, with new weights, or ValueError."""
    kind, scaling = MODELS[model["arch"]], model["llama"].get("rope_scaling")
    head_dim = model["llama"].get("head_dim") and 2
    llama = LlamaConfig(1, 1, 1, 2, 1, rope_scaling=scaling and RopeScaling(1.0), head_dim=head_dim)
    optional = {f.name for f in fields(llama) if f.default is None} - model["llama"].keys()
    check_like(model["llama"], {k: v for k, v in asdict(llama).items() if k not in optional}, "llama")
    options = {name: kind.OPTIONS[name] for name in kind.OPTIONS if name in model["options"]}
    check_like(model["options"], options, "options")
    llama = LlamaConfig(**{**model["llama"], "rope_scaling": scaling and RopeScaling(**scaling)})
    tokens = model["num_codebooks"], model["codebook_size"], model["max_frames"]
    return kind(llama, *tokens, **model["options"])


def save(
    folder: Path, step: int, model: LanguageModel, optimizer: Optimizer | None, run: dict[str, Any]
) -> None:
    """Write a checkpoint. `run` has the entries "model" (see build), "config" and "data"."""
    save_tensors(model.state_dict(), _path(folder, "model", step))
    if optimizer is not None:  # imported weights have none
        save_tensors(moments(model, optimizer), _path(folder, "optimizer", step))
    with replacing(folder / "run.json") as new:
        new.write_text(json.dumps({"format": FORMAT, "step": step, **run}, indent=1) + "\n")
    delete_others(folder, step)


def delete_others(folder: Path, step: int) -> None:
    """Delete the files of all other steps: a crash may have left more than those of the last."""
    for path in folder.iterdir():
        match = re.fullmatch(r"(?:model|optimizer)-(\d{6,})\.safetensors(\.tmp)?", path.name)
        if match and (int(match[1]) != step or match[2]):
            path.unlink()


def read(folder: Path) -> dict[str, Any]:
    """run.json. Raises FileNotFoundError or ValueError where the folder is not a run."""
    path, remedy = folder / "run.json", "train the run again"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a run (no run.json); run python train.py first")
    return read_json(path, RUN, remedy)


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[LanguageModel, dict[str, Any]]:
    """The run's model, with its weights, and run.json. Raises as read does."""
    run = read(folder)
    try:
        with torch.device("meta"):  # shapes alone
            model = build(run["model"])
        tensors = load_tensors(_path(folder, "model", run["step"]), model.state_dict(), device)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be used; train the run again ({error})") from None
    except FileNotFoundError:
        if read(folder)["step"] == run["step"]:
            raise
        return load(folder, device)  # the run was saved meanwhile
    model.load_state_dict(tensors, assign=True)
    return model, run


def load_optimizer(folder: Path, step: int, model: LanguageModel, optimizer: Optimizer) -> None:
    """Put the moments saved at `step` into a new optimizer, to go on in the same folder."""
    path = _path(folder, "optimizer", step)
    saved = load_tensors(path, moments(model, optimizer), model.embedding.weight.device)
    restore_moments(saved, model, optimizer)
    delete_others(folder, step)


def _path(folder: Path, kind: str, step: int) -> Path:
    return folder / f"{kind}-{step:06d}.safetensors"


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """AdamW's state, by the names of the model's parameters; zeros before a parameter's update."""
    zero = torch.zeros_like
    zeros = lambda p: dict(step=torch.zeros(()), exp_avg=zero(p), exp_avg_sq=zero(p))
    states = ((name, optimizer.state[p] or zeros(p)) for name, p in model.named_parameters())
    return {f"{name}.{key}": value for name, state in states for key, value in state.items()}


def restore_moments(saved: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """The inverse of `moments`."""
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: saved[f"{name}.{key}"] for key in keys}


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Replace the .safetensors file, or raise OSError and leave it as it was."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as new:
        try:
            save_file(tensors, new, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error})") from None


def load_tensors(
    path: Path, like: Mapping[str, Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """The file's tensors in the dtypes of `like`. Raises FileNotFoundError, and as check_tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though run.json names it; train the run again")
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    check_tensors(tensors, like, path)
    # Copied: a loaded tensor may be a view of the file, and the optimizer writes into it.
    return {name: t.to(like[name].dtype, copy=True) for name, t in tensors.items()}


def check_tensors(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], path: Path) -> None:
    """ValueError where names, shapes or dtypes differ, or a number is not finite.

    Weights may be in 16 bits, as imported ones are.
    """
    for name in sorted(tensors.keys() ^ like.keys()):
        raise ValueError(f"{path} {'has' if name in tensors else 'lacks'} the tensor {name}")
    for name, tensor in tensors.items():
        kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (tensor, like[name])]
        if kinds[0].replace("bfloat16", "float32").replace("float16", "float32") != kinds[1]:
            raise ValueError(f"{path}: {name} is {kinds[0]}, not {kinds[1]}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")


class Log:
    """Lines above the progress bar and in log.jsonl, from the first process alone."""

    def __init__(self, path: Path, start: int, silent: bool) -> None:
        self.path, self.silent = path, silent
        if not silent:
            # Steps that were logged after the last checkpoint will be done again.
            lines = read_file(path).splitlines() if path.exists() else []
            kept = [text for text in lines if _step(text) <= start]
            with replacing(path) as new:
                new.write_bytes(b"".join(text + b"\n" for text in kept))

    def say(self, text: str, **line: Any) -> None:
        """Print text, if any; write the line, if any, to log.jsonl."""
        if not self.silent:
            tqdm.write(text, end="\n" if text else "")
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n" if line else "")


def _step(text: bytes) -> float:
    """The step of a line of log.jsonl; infinite where a crash has torn it."""
    try:
        return from_json(text, {"step": 1, ...: 0}, "log.jsonl")["step"]
    except ValueError:
        return math.inf
