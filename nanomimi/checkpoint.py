"""A run folder: save, load, resume. Weights are safetensors, everything else is JSON.

    runs/NAME/run.json                     what the run is, and which step's files belong to it
    runs/NAME/model-000900.safetensors     weights at that step
    runs/NAME/optimizer-000900.safetensors AdamW's moments
    runs/NAME/log.jsonl                    one line per logged step

run.json is replaced last and in one move, so a run folder always holds one complete checkpoint.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import LlamaConfig, RopeScaling

FORMAT = 1


def build(model: dict[str, Any]) -> nn.Module:
    """The model that run.json's "model" describes, with fresh weights."""
    tokens = model["num_codebooks"], model["codebook_size"], model["max_frames"]
    if model["arch"] == "flat":
        return FlatLM(_llama(model["llama"]), *tokens, model["tied"])
    assert model["arch"] == "hierarchical", model["arch"]
    return HierarchicalLM(_llama(model["llama"]), _llama(model["depth"]), *tokens)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
) -> None:
    """Write a checkpoint. `about` holds what JSON can say of the run: "model", "config", "data"."""
    previous = read(folder)["step"] if (folder / "run.json").exists() else None
    _save_tensors(model.state_dict(), folder / f"model-{step:06d}.safetensors")
    _save_tensors(_moments(model, optimizer), folder / f"optimizer-{step:06d}.safetensors")
    new = folder / "run.json.tmp"
    new.write_text(json.dumps({"format": FORMAT, "step": step, **about}, indent=1) + "\n")
    new.replace(folder / "run.json")
    if previous is not None and previous != step:
        for kind in ("model", "optimizer"):
            (folder / f"{kind}-{previous:06d}.safetensors").unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any]:
    """run.json. Raises FileNotFoundError or ValueError where the folder is not a run."""
    path = folder / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is not a run (no run.json); run python train.py first, or name another"
        )
    try:
        run = json.loads(path.read_text())
    except json.JSONDecodeError:
        run = None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}; train the run again")
    return run


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The run's model, with its weights, and run.json. Raises as read does."""
    run = read(folder)
    model = build(run["model"]).to(device)
    model.load_state_dict(_load_tensors(folder / f"model-{run['step']:06d}.safetensors", device))
    return model, run


def load_optimizer(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the moments saved at `step` into a fresh optimizer over the model's parameters."""
    device = next(model.parameters()).device
    moments = _load_tensors(folder / f"optimizer-{step:06d}.safetensors", device)
    for name, parameter in model.named_parameters():
        state = {key: moments[f"{name}.{key}"].clone() for key in ("exp_avg", "exp_avg_sq")}
        # AdamW keeps its count of steps on the CPU unless it is fused on a GPU.
        optimizer.state[parameter] = {"step": moments[f"{name}.step"].clone(), **state}


def _llama(shape: dict[str, Any]) -> LlamaConfig:
    scaling = shape.get("rope_scaling")
    return LlamaConfig(**{**shape, "rope_scaling": scaling and RopeScaling(**scaling)})


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    new = path.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
    new.replace(path)


def _load_tensors(path: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, though run.json names it; train the run again")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); train the run again") from None
