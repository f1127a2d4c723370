"""A run folder: save, load, resume. Weights are safetensors, everything else is JSON.

    runs/NAME/run.json                       settings, and which step's files belong to the run
    runs/NAME/model-000900.safetensors       weights at that step
    runs/NAME/optimizer-000900.safetensors   the optimizer's moments at that step
    runs/NAME/log.jsonl                      one line per logged step

run.json is replaced last and atomically, so a run folder always holds one complete checkpoint.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from nanomimi.data import META
from nanomimi.delay import DelayLM
from nanomimi.files import fits, load_tensors, read_json, replacing, save_tensors
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import LlamaConfig, RopeScaling
from nanomimi.lm import LanguageModel

FORMAT = 2
MODELS = {"flat": FlatLM, "hierarchical": HierarchicalLM, "delay": DelayLM}
AGAIN = "train the run again"
RUN = {  # the kind of run.json
    "format": Literal[FORMAT],
    "step": int,
    "model": {
        "arch": Literal[tuple(MODELS)],
        **dict.fromkeys(("num_codebooks", "codebook_size", "max_frames"), int),
        "llama": LlamaConfig,
        "options": {...: Any},
    },
    "config": {"data": list[str], ...: Any},
    "data": META | {"splits": list[META["splits"]]},
}


def build(model: dict[str, Any]) -> LanguageModel:
    """The model that run.json's "model" describes, with new weights. ValueError for none."""
    kind, scaling, given = MODELS[model["arch"]], model["llama"]["rope_scaling"], model["options"]
    if not fits(given, {name: kind.OPTIONS.get(name, ()) for name in given}):
        raise ValueError(f"options {given} do not fit {model['arch']}")
    llama = LlamaConfig(**{**model["llama"], "rope_scaling": scaling and RopeScaling(**scaling)})
    tokens = model["num_codebooks"], model["codebook_size"], model["max_frames"]
    return kind(llama, *tokens, **given)


def save(
    folder: Path, step: int, model: LanguageModel, optimizer: Optimizer | None, run: dict[str, Any]
) -> None:
    """Write a checkpoint. `run` has the entries "model" (see build), "config" and "data"."""
    save_tensors(model.state_dict(), _path(folder, "model", step))
    if optimizer is not None:  # imported weights have none
        save_tensors(moments(model, optimizer), _path(folder, "optimizer", step))
    with replacing(folder / "run.json") as new:
        new.write_text(json.dumps({"format": FORMAT, "step": step, **run}, indent=1) + "\n")
    _delete_others(folder, step)


def read(folder: Path) -> dict[str, Any]:
    """run.json. Raises FileNotFoundError or ValueError where the folder is not a run."""
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"{folder} is not a run (no run.json); run python train.py first")
    return read_json(folder / "run.json", RUN, AGAIN)


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[LanguageModel, dict[str, Any]]:
    """The run's model, with its weights, and run.json. Raises as read does."""
    run = read(folder)
    path = _path(folder, "model", run["step"])
    try:
        with torch.device("meta"):  # shapes alone
            model = build(run["model"])
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder}/run.json cannot be used; {AGAIN} ({error})") from None
    if not path.exists() and read(folder) != run:
        return load(folder, device)  # the run was saved in between
    tensors = load_tensors(path, model.state_dict(), AGAIN, device)
    model.load_state_dict(tensors, assign=True)
    return model.eval(), run


def resume(folder: Path, run: dict[str, Any], model: LanguageModel, optimizer: Optimizer) -> int:
    """Load weights and moments; returns their step. ValueError where it is another run."""
    device = model.embedding.weight.device
    saved_model, saved = load(folder, device)
    for part in ("model", "data"):
        if saved[part] != run[part]:
            raise ValueError(
                f"--resume: the flags change the {part} in {folder}/run.json; leave them out"
            )
    model.load_state_dict(saved_model.state_dict())
    path = _path(folder, "optimizer", saved["step"])
    restore(load_tensors(path, moments(model, optimizer), AGAIN, device), model, optimizer)
    _delete_others(folder, saved["step"])
    return saved["step"]


def moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the names of the parameters; zeros before the first step."""
    found, names = {}, {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        keys = ["momentum_buffer"] if "momentum" in group else ["exp_avg", "exp_avg_sq"]
        for parameter in group["params"]:
            zeros = {key: torch.zeros_like(parameter) for key in keys}
            zeros |= {"step": torch.zeros(())} if "exp_avg" in zeros else {}
            state = optimizer.state[parameter] or zeros
            found |= {f"{names[parameter]}.{key}": value for key, value in state.items()}
    return found


def restore(saved: dict[str, Tensor], model: nn.Module, optimizer: Optimizer) -> None:
    """The inverse of `moments`."""
    parameters = dict(model.named_parameters())
    for name, value in saved.items():
        owner, _, key = name.rpartition(".")
        if owner in parameters:
            optimizer.state[parameters[owner]][key] = value


class Log:
    """Lines above the progress bar and in log.jsonl, from the first process alone."""

    def __init__(self, path: Path, start: int, silent: bool) -> None:
        self.path, self.silent = path, silent
        if not silent:
            # Steps that were logged after the last checkpoint will be done again.
            lines = path.read_bytes().splitlines() if start and path.is_file() else []
            kept = [line for line in lines if _step(line) <= start]
            with replacing(path) as new:
                new.write_bytes(b"".join(line + b"\n" for line in kept))

    def say(self, text: str, **line: Any) -> None:
        """Print text, if any; write the line, if any, to log.jsonl."""
        if not self.silent:
            tqdm.write(text, end="\n" if text else "")
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n" if line else "")


def _step(line: bytes) -> float:
    """The step of a line of log.jsonl; infinite where a crash tore the line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf


def _delete_others(folder: Path, step: int) -> None:
    """Delete the files of other steps. A crash may have left more than those of the last one."""
    kept = {_path(folder, kind, step) for kind in ("model", "optimizer")}
    for path in {*folder.glob("model-*"), *folder.glob("optimizer-*")} - kept:
        path.unlink()


def _path(folder: Path, kind: str, step: int) -> Path:
    return folder / f"{kind}-{step:06d}.safetensors"
