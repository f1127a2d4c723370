"""A run folder: save, load, resume. Weights are safetensors, everything else is JSON.

    runs/NAME/run.json                       settings, and which step's files belong to the run
    runs/NAME/model-000900.safetensors       weights at that step
    runs/NAME/optimizer-000900.safetensors   AdamW's moments at that step
    runs/NAME/log.jsonl                      one line per logged step

run.json is replaced last and atomically, so a run folder always holds one complete checkpoint.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from nanomimi.data import read_json
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import LlamaConfig, RopeScaling
from nanomimi.lm import LanguageModel

FORMAT = 2
MODELS: dict[str, type[LanguageModel]] = {"flat": FlatLM, "hierarchical": HierarchicalLM}


def build(model: dict[str, Any]) -> LanguageModel:
    """The model that run.json's "model" describes, with new weights."""
    scaling = model["llama"].get("rope_scaling")
    llama = LlamaConfig(**{**model["llama"], "rope_scaling": scaling and RopeScaling(**scaling)})
    tokens = model["num_codebooks"], model["codebook_size"], model["max_frames"]
    return MODELS[model["arch"]](llama, *tokens, **model["options"])


def save(
    folder: Path, step: int, model: LanguageModel, optimizer: Optimizer | None, run: dict[str, Any]
) -> None:
    """Write a checkpoint. `run` has the entries "model" (see build), "config" and "data"."""
    paths = [_path(folder, kind, step) for kind in ("model", "optimizer")]
    _save_tensors(model.state_dict(), paths[0])
    if optimizer is not None:  # imported weights have none
        _save_tensors(_moments(model, optimizer), paths[1])
    new = folder / "run.json.tmp"
    new.write_text(json.dumps({"format": FORMAT, "step": step, **run}, indent=1) + "\n")
    new.replace(folder / "run.json")
    # A crash may have left files of other steps than the last one.
    for path in {*folder.glob("model-*"), *folder.glob("optimizer-*")} - {*paths}:
        path.unlink()


def read(folder: Path) -> dict[str, Any]:
    """run.json. Raises FileNotFoundError or ValueError where the folder is not a run."""
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a run (no run.json); run python train.py first")
    return read_json(path, FORMAT, "train the run again")


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[LanguageModel, dict[str, Any]]:
    """The run's model, with its weights, and run.json. Raises as read does."""
    run = read(folder)
    model = build(run["model"]).to(device)
    path = _path(folder, "model", run["step"])
    if not path.exists() and read(folder) != run:
        return load(folder, device)  # the run was saved in between
    model.load_state_dict(_load_tensors(path, model.state_dict(), device))
    return model, run


def load_optimizer(folder: Path, step: int, model: LanguageModel, optimizer: Optimizer) -> None:
    """Put the moments saved at `step` into a new optimizer of the model's parameters."""
    keys, like = ("exp_avg", "exp_avg_sq"), {}
    for name, parameter in model.named_parameters():
        like |= {f"{name}.{key}": parameter for key in keys} | {f"{name}.step": torch.zeros(())}
    moments = _load_tensors(_path(folder, "optimizer", step), like, model.embedding.weight.device)
    for name, parameter in model.named_parameters():
        state = {key: moments[f"{name}.{key}"] for key in ("step", *keys)}
        # Cloned: a loaded tensor may be a view of the file, and the optimizer writes into it.
        optimizer.state[parameter] = {key: tensor.clone() for key, tensor in state.items()}


class Log:
    """Lines above the progress bar and in log.jsonl, from the first process alone."""

    def __init__(self, path: Path, start: int, silent: bool) -> None:
        self.path, self.silent = path, silent
        if not silent:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Steps that were logged after the last checkpoint will be done again.
            lines = path.read_text(errors="replace").splitlines() if start else []
            kept = [line for line in lines if _step(line) <= start]
            path.write_text("".join(f"{line}\n" for line in kept))

    def say(self, text: str, **line: Any) -> None:
        """Print text, if any; write the line, if any, to log.jsonl."""
        if not self.silent:
            tqdm.write(text, end="\n" if text else "")
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n" if line else "")


def _step(line: str) -> float:
    """The step of a line of log.jsonl; infinite where a crash tore the line."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def _path(folder: Path, kind: str, step: int) -> Path:
    return folder / f"{kind}-{step:06d}.safetensors"


def _moments(model: LanguageModel, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    _require_finite(tensors, path)
    new = path.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
    new.replace(path)


def _require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        # The norm squares: a weight of 1e30, with which a model is lost as well, is found too.
        if not tensor.float().norm().isfinite():
            raise FloatingPointError(f"{path}: {name} is not finite; train again with a lower --lr")


def _load_tensors(
    path: Path, like: dict[str, Tensor], device: torch.device | str
) -> dict[str, Tensor]:
    """The file's tensors, which must have the names and shapes of `like`, in its dtypes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, though run.json names it; train the run again")
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); train the run again") from None
    shapes, expected = ({n: t.shape for n, t in each.items()} for each in (tensors, like))
    # AdamW would write beyond the end of a moment that is too small.
    for name in (name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        raise ValueError(
            f"{path}: {name} has the shape {shapes.get(name)}, not {expected.get(name)}; "
            "train the run again"
        )
    _require_finite(tensors, path)
    return {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}
