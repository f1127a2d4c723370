"""data/NAME -> runs/NAME: train a model on flattened Mimi tokens.

    python train.py                                             the digits, on two CPU cores
    python train.py --data data/mine --out runs/mine --n_layer 12 --n_embd 768 --lr 3e-4
    torchrun --nproc_per_node 8 train.py --data data/mine ...   the same batches, on eight GPUs
    python train.py --out runs/mine --resume                    go on where the run stopped

A step trains on batch_size x grad_accum windows of max_frames frames, over all processes together.
Losses are in nats per token; bits per second of audio compare runs of different codecs and numbers
of codebooks.
"""

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanomimi import checkpoint
from nanomimi.config import (
    Config,
    Processes,
    join_processes,
    option,
    parse,
    resolve_device,
    resolve_dtype,
    run,
)
from nanomimi.data import TokenDataset
from nanomimi.hierarchical import csm_depth
from nanomimi.likelihood import in_units
from nanomimi.llama import LlamaConfig

DEPTH_FLAGS = ("n_layer", "n_head", "n_embd", "n_hidden")


@dataclass(frozen=True)
class TrainConfig(Config):
    data: Path = option(Path("data/digits"), "folder written by prepare.py")
    out: Path = option(Path("runs/digits"), "run folder to write")
    arch: Literal["flat", "hierarchical"] = option("flat", "one Llama, or one inside another")
    num_codebooks: int = option(4, "codebooks to model, the first of those prepared", at_least=1)
    max_frames: int = option(128, "context in frames, 80 ms each", at_least=2)
    n_layer: int = option(4, "layers", at_least=1)
    n_head: int = option(4, "attention heads", at_least=1)
    n_kv_head: int | None = option(None, "key-value heads, default: n_head", at_least=1)
    n_embd: int = option(192, "width", at_least=2)
    n_hidden: int | None = option(None, "MLP's width, default: 8/3 n_embd", at_least=1)
    depth_n_layer: int | None = option(None, "hierarchical only: layers inside a frame", at_least=1)
    depth_n_head: int | None = option(None, "its attention heads", at_least=1)
    depth_n_embd: int | None = option(None, "its width", at_least=2)
    depth_n_hidden: int | None = option(None, "its MLP's width", at_least=1)
    rope_theta: float = option(10000.0, "base of the rotary position embedding", above=1)
    tied: bool = option(False, "let the head share the embedding's weights")
    batch_size: int = option(4, "windows per micro-step, over all processes", at_least=1)
    grad_accum: int = option(1, "micro-steps per step", at_least=1)
    max_steps: int = option(2400, "optimizer steps", at_least=1)
    lr: float = option(3e-3, "peak learning rate", above=0)
    schedule: Literal["cosine", "wsd"] = option("cosine", "cosine, or stable then decay")
    warmup_steps: int = option(100, "steps of linear warm-up", at_least=0)
    decay_fraction: float = option(0.2, "share of steps that wsd decays", above=0, at_most=1)
    min_lr: float = option(0.1, "final learning rate, as a fraction of lr", at_least=0, at_most=1)
    weight_decay: float = option(0.1, "AdamW's decay, on matrices only", at_least=0)
    grad_clip: float = option(1.0, "largest norm of the gradient", above=0)
    seed: int = option(0, "seed of the weights and of the order of the data", at_least=0)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: the faster")
    compile: bool | None = option(None, "compile the model; by default on a GPU only")
    log_every: int = option(20, "steps between log lines", at_least=1)
    eval_every: int = option(200, "steps between evaluations", at_least=1)
    eval_windows: int = option(64, "validation windows, the same at every evaluation", at_least=1)
    save_every: int = option(500, "steps between checkpoints", at_least=1)
    resume: bool = option(False, "go on with the run in --out, with its own settings")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then down to min_lr * lr at the last step: a cosine, or a line at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - 1 - config.warmup_steps)
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        height = min(
            1.0,
            (config.max_steps - 1 - step) / max(1, round(config.decay_fraction * config.max_steps)),
        )
    return config.lr * (config.min_lr + (1 - config.min_lr) * height)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train until max_steps; returns the last evaluation. Raises ValueError for unfit settings."""
    with join_processes(resolve_device(config.device)) as processes:
        device = processes.device
        dtype = resolve_dtype(config.dtype, device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        train_set, val_batches = _data(config, processes)
        about = _about(config, train_set.meta, dtype)

        torch.manual_seed(config.seed)
        model = checkpoint.build(about["model"]).to(device)
        optimizer = _optimizer(model, config)
        start = _start(config, about, model, optimizer)
        log = _Log(config, processes, about, start)
        log.say(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {device.type}, "
            f"{about['config']['dtype']}, processes: {processes.count}, "
            f"{train_set.meta['splits']['train']['seconds'] / 3600:.2f} h of audio for training"
        )
        if config.compile or (config.compile is None and device.type == "cuda"):
            model.compile()
        parallel = DistributedDataParallel(model) if processes.count > 1 else model

        results: dict[str, Any] = {}
        for step in range(start, config.max_steps):
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=device)
            for micro in range(config.grad_accum):
                tokens = _batch(train_set, step * config.grad_accum + micro, config, processes)
                with _gradients_shared(parallel, micro == config.grad_accum - 1):
                    with autocast:
                        mean = parallel(tokens.to(device)).mean() / config.grad_accum
                    mean.backward()
                loss += mean.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done, finished = step + 1, step + 1 == config.max_steps
            if done % config.log_every == 0 or finished:
                log.step(done, _mean_over_processes(loss), float(norm), lr)
            if done % config.eval_every == 0 or finished:
                with autocast:
                    results = validate(model, val_batches, train_set.meta)
                log.evaluation(done, results)
            if (done % config.save_every == 0 or finished) and processes.rank == 0:
                checkpoint.save(config.out, done, model, optimizer, about)
                log.say(f"saved {config.out} at step {done}")
        return results


@torch.no_grad()
def validate(model: nn.Module, batches: list[Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    """Mean nats per token and codebook; bits per second of audio beside the codec's own rate."""
    device = next(model.parameters()).device
    nats = torch.cat([model(tokens.to(device)).float().mean(dim=1) for tokens in batches]).mean(
        dim=0
    )
    return in_units(nats, meta)


class _Log:
    """Lines of fixed width on the terminal, and log.jsonl; the first process alone speaks."""

    def __init__(
        self, config: TrainConfig, processes: Processes, about: dict[str, Any], start: int
    ) -> None:
        self.config, self.silent = config, processes.rank > 0
        self.frames = config.batch_size * config.grad_accum * config.max_frames  # per step
        self.hours = self.frames / about["data"]["frame_rate"] / 3600  # of audio per step
        self.start, self.last = start, start
        self.began = self.since = time.time()
        self.path = config.out / "log.jsonl"
        if not self.silent:
            config.out.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if start else []
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            self.path.write_text("".join(f"{line}\n" for line in kept))

    def say(self, line: str) -> None:
        if not self.silent:
            print(line, flush=True)

    def step(self, done: int, loss: float, norm: float, lr: float) -> None:
        now = time.time()
        tokens = (done - self.last) * self.frames * self.config.num_codebooks
        rate = tokens / (now - self.since)
        left = (now - self.began) / (done - self.start) * (self.config.max_steps - done)
        self.last, self.since = done, now
        self.say(
            f"step {done:6d}/{self.config.max_steps} | loss {loss:6.3f} nats/token | "
            f"gradient {norm:6.2f} | lr {lr:.1e} | {rate:9,.0f} tokens/s | "
            f"{done * self.hours:8.2f} h of audio | {left // 60:3.0f}:{left % 60:02.0f} left"
        )
        self._write(
            {
                "step": done,
                "loss": loss,
                "gradient_norm": norm,
                "lr": lr,
                "tokens_per_second": rate,
                "hours_of_audio": done * self.hours,
            }
        )

    def evaluation(self, done: int, results: dict[str, Any]) -> None:
        codebooks = " ".join(f"{n:.2f}" for n in results["nats_per_codebook"])
        self.say(
            f"     validation | loss {results['nats_per_token']:6.3f} nats/token | "
            f"per codebook {codebooks} | {results['bits_per_second']:.0f} bit/s "
            f"of {results['codec_bits_per_second']:.0f}"
        )
        self._write({"step": done, "validation": results})
        self.since = time.time()  # evaluations do not count as training time

    def _write(self, line: dict[str, Any]) -> None:
        if not self.silent:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def _data(config: TrainConfig, processes: Processes) -> tuple[TokenDataset, list[Tensor]]:
    """The training set and the fixed validation batches, or ValueError where they do not fit."""
    if config.batch_size % processes.count:
        raise ValueError(
            f"--batch_size must be a multiple of the {processes.count} processes; "
            f"got {config.batch_size}"
        )
    train_set = TokenDataset(config.data, "train", config.num_codebooks)
    _batch(train_set, 0, config, processes)  # too little data fails here, before a run is made
    val_set = TokenDataset(config.data, "val", config.num_codebooks)
    return train_set, val_set.eval_batches(
        config.batch_size, config.max_frames, config.eval_windows
    )


def _batch(data: TokenDataset, index: int, config: TrainConfig, processes: Processes) -> Tensor:
    return data.train_batch(
        index, config.batch_size, config.max_frames, config.seed, processes.rank, processes.count
    )


def _gradients_shared(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Processes average their gradients once per step, in its last backward pass."""
    if last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def _mean_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


def _about(config: TrainConfig, meta: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What run.json says; "model" is what checkpoint.build needs."""
    llama = LlamaConfig(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head or config.n_head,
        n_embd=config.n_embd,
        # Three matrices of 8/3 n_embd hold as many weights as a plain MLP's two of 4 n_embd.
        n_hidden=config.n_hidden or 64 * math.ceil(config.n_embd * 8 / 3 / 64),
        rope_theta=config.rope_theta,
    )
    model = {
        "arch": config.arch,
        "num_codebooks": config.num_codebooks,
        "codebook_size": meta["codebook_size"],
        "max_frames": config.max_frames,
        "llama": asdict(llama),
    }
    depth = {name: getattr(config, f"depth_{name}") for name in DEPTH_FLAGS}
    depth = {name: value for name, value in depth.items() if value is not None}
    if config.arch == "flat":
        if depth:
            raise ValueError(f"--depth_{next(iter(depth))} needs --arch hierarchical")
        model["tied"] = config.tied
    else:
        if config.tied:
            raise ValueError("--tied needs --arch flat: the hierarchical heads have two widths")
        model["depth"] = asdict(csm_depth(llama, **depth))
    # The precision that auto chose is saved, so that a resumed run cannot choose another.
    settings = asdict(replace(config, dtype=str(dtype).removeprefix("torch.")))
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    return {"model": model, "config": plain, "data": meta}


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def _start(
    config: TrainConfig, about: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """The step to start at; with --resume, after putting the saved weights and moments in place."""
    if not config.resume:
        if (config.out / "run.json").exists():
            raise ValueError(
                f"{config.out} holds a run already; go on with it (--resume), choose another "
                "--out, or delete it"
            )
        return 0
    saved, run = checkpoint.load(config.out, next(model.parameters()).device)
    for part, flag in (("model", "model's shape"), ("data", "data")):
        if run[part] != about[part]:
            raise ValueError(
                f"--resume: the {flag} in {config.out}/run.json is not the one asked for; leave "
                "out the flags that change it, or start a new run with another --out"
            )
    model.load_state_dict(saved.state_dict())
    checkpoint.load_optimizer(config.out, run["step"], model, optimizer)
    return run["step"]


def main(config: TrainConfig) -> None:
    if config.resume:
        saved = checkpoint.read(config.out)["config"]
        config = parse(TrainConfig, doc=__doc__, defaults={**saved, "resume": True})
    train(config)


if __name__ == "__main__":
    run(TrainConfig, main, __doc__)
