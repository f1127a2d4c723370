"""data/NAME -> runs/NAME: train a model on flattened Mimi tokens.

    python train.py                                             the digits, on two CPU cores
    python train.py --data data/mine --out runs/mine --n_layer 12 --n_embd 768 --lr 3e-4
    python train.py --init_from meta-llama/Llama-3.2-1B ...     start from a text Llama, or a run
    torchrun --nproc_per_node 8 train.py --data data/mine ...   the same batches, on eight GPUs
    python train.py --out runs/mine --resume                    continue a run that was stopped

A step trains on batch_size x grad_accum windows of max_frames frames, over all processes together.
The loss is in nats per token; bits per second of audio compare runs of different codecs and Q.
"""

import contextlib
import json
import math
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nanomimi import checkpoint, weights
from nanomimi.config import Config, option, parse, run_script
from nanomimi.corruption import Corruption
from nanomimi.data import SPLITS, TokenDataset
from nanomimi.distributed import catch_signals, compile_model, init_processes, resolve_dtype
from nanomimi.files import lock
from nanomimi.llama import LlamaConfig
from nanomimi.lm import summarize
from nanomimi.optimizer import make_optimizer


@dataclass(frozen=True)
class TrainConfig(Config):
    data: tuple[Path, ...] = option((Path("data/digits"),), "folders written by prepare.py")
    out: Path = option(Path("runs/digits"), "run folder to write")
    arch: Literal["flat", "hierarchical", "delay"] = option("flat", "see step 5 of the package")
    init_from: str | None = option(None, "run, or a Llama in a folder or on the hub, to start from")
    num_codebooks: int = option(4, "codebooks to model, the first of those prepared", at_least=1)
    max_frames: int = option(128, "context in frames, 80 ms each", at_least=2)
    n_layer: int = option(4, "layers", at_least=1)
    n_head: int = option(4, "attention heads", at_least=1)
    n_kv_head: int | None = option(None, "key-value heads, default: n_head", at_least=1)
    n_embd: int = option(128, "width", at_least=2)
    n_hidden: int | None = option(None, "width of the MLP, default: 8/3 n_embd", at_least=1)
    rope_theta: float = option(10000.0, "base of the rotary position embedding", above=1)
    tied: bool | None = option(None, "flat only: the head shares the embedding's weights")
    start_positions: int | None = option(None, "flat only: see weights.py", at_least=1)
    depth_n_layer: int | None = option(None, "hierarchical only: layers inside a frame", at_least=1)
    depth_n_head: int | None = option(None, "its attention heads", at_least=1)
    depth_n_embd: int | None = option(None, "its width", at_least=2)
    depth_n_hidden: int | None = option(None, "width of its MLP", at_least=1)
    depth_fraction: float | None = option(None, "share of frames for it", above=0, at_most=1)
    codebook_weights: tuple[float, ...] = option((), "of each codebook's loss; default: equal")
    batch_size: int = option(4, "windows per micro-step, over all processes", at_least=1)
    grad_accum: int = option(1, "micro-steps per step", at_least=1)
    max_steps: int = option(1600, "optimizer steps", at_least=1)
    lr: float = option(3e-3, "peak learning rate", above=0)
    schedule: Literal["cosine", "wsd"] = option("cosine", "cosine, or stable and then decay")
    warmup_steps: int = option(100, "steps of linear warm-up", at_least=0)
    decay_fraction: float = option(0.2, "share of steps in which wsd decays", above=0, at_most=1)
    min_lr: float = option(0.1, "final learning rate, as a fraction of lr", at_least=0, at_most=1)
    optimizer: Literal["muon", "adamw"] = option("muon", "muon: for the layers' matrices alone")
    weight_decay: float = option(0.1, "weight decay, on matrices only", at_least=0)
    corruption: float = option(0.0, "share of the input to corrupt", at_least=0, at_most=1)
    grad_clip: float = option(1.0, "largest norm of the gradient", above=0)
    seed: int = option(0, "seed of the weights and of the order of the data", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: the faster one")
    compile: bool | None = option(None, "compile the model; default: on a GPU only")
    log_every: int = option(20, "steps between log lines", at_least=1)
    eval_every: int = option(200, "steps between validations", at_least=1)
    eval_windows: int = option(64, "validation windows, the same every time", at_least=1)
    save_every: int = option(500, "steps between checkpoints", at_least=1)
    keep_every: int | None = option(None, "steps between models that stay: OUT/step-N", at_least=1)
    resume: bool = option(False, "continue the run in --out, with its own settings")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then down to min_lr * lr at the last step: a cosine, or a line at the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, last - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    else:
        height = min(1.0, (last - step) / max(1, round(config.decay_fraction * config.max_steps)))
    return config.lr * (config.min_lr + (1 - config.min_lr) * height)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train until max_steps; returns the last validation.

    Raises ValueError for unfit settings, FloatingPointError where training diverges, SystemExit
    after SIGTERM or SIGINT, once the step is saved.
    """
    with contextlib.ExitStack() as stack:
        device, rank, world_size = stack.enter_context(init_processes(config.device))
        dtype = resolve_dtype(config.dtype, device)
        # Autocast computes products in bfloat16; weights and the residual stream stay in float32.
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)
        train_set, val_batches = load_data(config, world_size)
        run = describe(config, train_set.meta, dtype)

        torch.manual_seed(config.seed)
        model, started = weights.start(run, None if config.resume else config.init_from, device)
        model.corrupt = Corruption(config.corruption, model.num_codebooks, model.codebook_size)
        if rank == 0:
            stack.enter_context(lock(config.out))
        caught = stack.enter_context(catch_signals())
        optimizer = make_optimizer(model, config.optimizer, config.lr, config.weight_decay)
        start = 0
        if config.resume:
            start = checkpoint.resume(config.out, run, model, optimizer)
        elif (config.out / "run.json").exists():
            raise ValueError(f"{config.out} holds a run already; --resume it or change --out")
        log = checkpoint.Log(config.out / "log.jsonl", start, silent=rank > 0)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        log.say(f"{millions:.2f}M parameters{started}, {device}, {dtype}, processes: {world_size}")
        parallel = DistributedDataParallel(model) if world_size > 1 else model
        if config.compile or (config.compile is None and device.type == "cuda"):
            shape = config.batch_size // world_size, (config.max_frames + 1) * config.num_codebooks
            tokens = torch.zeros(shape, dtype=torch.long, device=device)
            compile_model(model, parallel, tokens, autocast)

        # With the mean one: the loss stays one of nats per token.
        shares = torch.tensor(config.codebook_weights or [1.0] * config.num_codebooks)
        shares = (shares / shares.mean()).to(device)
        results: dict[str, Any] = {}
        frames_per_step = config.grad_accum * config.batch_size * config.max_frames
        steps = range(start, config.max_steps)
        bar = tqdm(steps, total=config.max_steps, initial=start, unit="step", disable=rank > 0)
        for step in bar:
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=device)
            for micro in range(config.grad_accum):
                # A batch is a pure function of its index: the position in the data needs no state.
                index, last = step * config.grad_accum + micro, micro == config.grad_accum - 1
                tokens = train_set.train_batch(
                    index, config.batch_size, config.max_frames, config.seed, rank, world_size
                )
                if device.type == "cuda":  # a copy from pinned memory does not wait for the GPU
                    tokens = tokens.pin_memory().to(device, non_blocking=True)
                # Processes average their gradients once a step, in its last backward pass.
                with contextlib.nullcontext() if world_size == 1 or last else parallel.no_sync():
                    with autocast:
                        nats = parallel(tokens.to(device)) * shares
                        mean = nats.mean() / config.grad_accum
                    mean.backward()
                loss += mean.detach()
            # Clipping bounds the harm of a rare batch whose gradient is many times the usual one.
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            with autocast:  # Muon's products are as slow in float32 as the model's
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done, finished = step + 1, step + 1 == config.max_steps
            stop = bool(caught) and world_size == 1
            if done % config.log_every == 0 or finished or stop:
                # Several processes stop at a log line, where they wait for one another anyway.
                sums = torch.stack([loss / world_size, loss.new_tensor(len(caught))])
                if world_size > 1:
                    dist.all_reduce(sums)
                stop = sums[1].item() > 0 and not finished
                rate = (bar.format_dict["rate"] or 0.0) * frames_per_step * model.num_codebooks
                line = dict(step=done, loss=sums[0].item(), lr=lr, gradient_norm=norm.item())
                if not math.isfinite(line["loss"] + line["gradient_norm"]):
                    raise FloatingPointError(f"training diverged: {line}; lower --lr and --resume")
                log.say("", **line, tokens_per_second=rate)
                bar.set_postfix_str(f"loss {line['loss']:.3f} nats/token, {rate:,.0f} tokens/s")
            if done % config.eval_every == 0 or finished:
                with autocast, torch.compiler.set_stance("force_eager"):  # compile training alone
                    results = validate(model, val_batches, train_set.meta)
                codebooks = " ".join(f"{nats:.2f}" for nats in results["nats_per_codebook"])
                units = "{nats_per_token:.3f} nats/token, {bits_per_second:.0f} bit/s"
                text = f"step {done}: {units.format(**results)}, per codebook {codebooks}"
                log.say(text, step=done, validation=results)
            if (done % config.save_every == 0 or finished or stop) and rank == 0:
                checkpoint.save(config.out, done, model, optimizer, run)
                log.say(f"step {done}: saved {config.out}")
            if config.keep_every and done % config.keep_every == 0 and rank == 0:
                (kept := config.out / f"step-{done}").mkdir(exist_ok=True)
                checkpoint.save(kept, done, model, None, run)
            if stop:
                log.say(f"step {done}: stopped by a signal; --resume continues")
                sys.exit(128 + max(caught, default=signal.SIGTERM))
        return results


@torch.no_grad()
def validate(model: nn.Module, batches: list[Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    """Mean nats of windows that are the same at every validation: only the model changes."""
    device = next(model.parameters()).device
    model.eval()
    nats = torch.cat([model(tokens.to(device)).mean(dim=1) for tokens in batches])
    model.train()
    return summarize(nats.mean(dim=0), meta)


def load_data(config: TrainConfig, world_size: int) -> tuple[TokenDataset, list[Tensor]]:
    """The training set and the validation batches, or ValueError where they do not fit."""
    batch_size, max_frames = config.batch_size, config.max_frames
    if (given := config.codebook_weights) and len(given) != config.num_codebooks:
        raise ValueError(f"--codebook_weights must be {config.num_codebooks}; got {len(given)}")
    if given and (min(given) < 0 or max(given) == 0):
        raise ValueError(f"--codebook_weights must be at least 0, one above it; got {given}")
    if batch_size % world_size:
        raise ValueError(f"--batch_size must be a multiple of {world_size}; got {batch_size}")
    train_set, val_set = (TokenDataset(config.data, s, config.num_codebooks) for s in SPLITS)
    train_set.train_batch(0, batch_size, max_frames, config.seed)  # fails before a run is made
    return train_set, val_set.eval_batches(batch_size, max_frames, config.eval_windows)


def describe(config: TrainConfig, meta: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The content of run.json; its entry "model" is what checkpoint.build needs."""
    options = sorted(name for kind in checkpoint.MODELS.values() for name in kind.OPTIONS)
    given = {name: getattr(config, name) for name in options if getattr(config, name) is not None}
    if foreign := sorted(given.keys() - checkpoint.MODELS[config.arch].OPTIONS.keys()):
        raise ValueError(f"--{foreign[0]} does not go with --arch {config.arch}; leave it out")
    llama = dict(
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head or config.n_head,
        n_embd=config.n_embd,
        # SwiGLU has three matrices: 8/3 n_embd gives it the size of a plain MLP of 4 n_embd.
        n_hidden=config.n_hidden or 64 * math.ceil(config.n_embd * 8 / 3 / 64),
        rope_theta=config.rope_theta,
    )
    # norm_eps, head_dim and RoPE scaling have no flag: they come with the weights to start from.
    source = config.out if config.resume else config.init_from
    given_by = weights.read_model(source)["llama"] if source else asdict(LlamaConfig(**llama))
    model = {name: getattr(config, name) for name in ("arch", "num_codebooks", "max_frames")}
    model |= {"codebook_size": meta["codebook_size"], "llama": given_by | llama, "options": given}
    # The dtype that auto chose is saved, so that a resumed run cannot choose another.
    settings = asdict(replace(config, dtype=str(dtype).removeprefix("torch.")))
    return {"model": model, "config": json.loads(json.dumps(settings, default=str)), "data": meta}


def main(config: TrainConfig) -> None:
    if config.resume:
        run = checkpoint.read(config.out)
        if not run["step"]:
            raise ValueError(f"{config.out} is not trained; use --init_from {config.out} and --out")
        saved = {**run["config"], "resume": True, "out": config.out}
        saved["data"] = [Path(path) for path in saved["data"]]
        config = parse(TrainConfig, doc=__doc__, defaults=saved)
    elif config.init_from:
        saved = weights.read_model(config.init_from)
        saved = {**saved, **saved["llama"], **saved.get("options", {})}
        config = parse(TrainConfig, doc=__doc__, defaults=saved)
    train(config)


if __name__ == "__main__":
    run_script(TrainConfig, main, __doc__)
