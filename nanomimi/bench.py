"""How fast, beside its own limits and its rivals: python -m nanomimi.bench

    python -m nanomimi.bench                    training, generation, codec, scaling in minutes
    python -m nanomimi.bench --reference hf     and Hugging Face's Llama, where it is installed
    python -m nanomimi.bench --compile          and compiled training

All contenders of a table take turns, step by step, so that what disturbs the machine disturbs all;
the tables show medians of the turns and ratios to the first row. Compare ratios, not milliseconds
of two runs. MFU is the share of the rate at which this machine was seen to multiply matrices of
that precision; a generator's floor is the time of its weight products alone.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanomimi.codec import Codec, build
from nanomimi.config import Config, join_processes, option, resolve_device, run
from nanomimi.contenders import CPU, GPU, HuggingFace, Shape, contenders
from nanomimi.data import FORMAT, TokenDataset
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.timing import (
    Turn,
    gemm_rate,
    greedy,
    interleave,
    peak_bytes,
    seconds,
    speak_turn,
    train_turn,
    training_flops,
)
from nanomimi.tokens import separator


@dataclass(frozen=True)
class BenchConfig(Config):
    part: Literal["all", "training", "generation", "codec", "scaling"] = option(
        "all", "what to measure"
    )
    reference: Literal["none", "hf"] = option("none", "hf: transformers' LlamaForCausalLM too")
    compile: bool = option(False, "measure compiled training too")
    rounds: int = option(10, "turns of every contender", at_least=1)
    frames: int = option(25, "frames to generate in a turn", at_least=1)
    device: str = option("auto", "auto, cpu or cuda")


SECONDS = 4  # of the codec's clips


def bench(config: BenchConfig) -> None:
    """Measure and print."""
    device = resolve_device(config.device)
    if "RANK" in os.environ:
        return scaling(config, device)
    if config.reference == "hf" and not importlib.util.find_spec("transformers"):
        print("no Hugging Face reference: transformers is not installed")
        config = replace(config, reference="none")
    shapes = CPU if device.type == "cpu" else {**CPU, **GPU}
    rates = {dtype: gemm_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    products = (f"{str(d)[6:]} {rate / 1e9:,.0f} GFLOP/s" for d, rate in rates.items())
    print(f"{name}; matrix products: {', '.join(products)}", flush=True)
    if config.part in ("all", "training"):
        for label, shape in shapes.items():
            try:
                training(label, shape, rates, config, device)
            except torch.OutOfMemoryError:
                print(f"\ntraining, shape {label}: the contenders together do not fit")
    if config.part in ("all", "generation"):
        for label, shape in shapes.items():
            generation(label, shape, config, device)
    if config.part in ("all", "codec"):
        codec(config, device)
    if config.part in ("all", "scaling"):
        launch(config, device)


def training(
    label: str,
    shape: Shape,
    rates: dict[torch.dtype, float],
    config: BenchConfig,
    device: torch.device,
) -> None:
    """Steps of forward, backward, clipping and fused AdamW, by model and precision."""
    tokens = _random_tokens(shape).to(device)
    count = shape.batch_size * shape.max_frames * shape.num_codebooks
    turns, flops, memory = {}, {}, {}
    # On a GPU nobody trains in float32, and the large shape would not fit twice.
    for dtype in rates if device.type == "cpu" else [torch.bfloat16]:
        for name, make in contenders(shape, config.reference).items():
            for compiled in (False, True) if config.compile else (False,):
                key = f"{name}, {str(dtype)[6:]}{', compiled' * compiled}"
                torch.manual_seed(0)
                model = make().to(device)
                flops[key] = training_flops(model, tokens)
                memory[key] = "" if compiled else f"{peak_bytes(model, tokens, dtype) / 2**20:,.0f}"
                if compiled:
                    model.compile()
                turns[key] = train_turn(model, tokens, dtype)
    with _random_data(shape) as data:
        turns["reading a batch"] = partial(_read, data, shape)
        times = interleave(turns, config.rounds, f"training {label}")
    reading = times.pop("reading a batch")
    rows = []
    for key, parts in times.items():
        total = sum(parts.values())
        rate = rates[torch.bfloat16 if "bfloat16" in key else torch.float32]
        cells = [f"{1000 * parts[part]:.0f}" for part in ("forward", "backward", "optimizer")]
        mfu = f"{flops[key] / total / rate:.0%}"
        rows.append([key, f"{count / total:,.0f}", *cells, mfu, memory[key], total])
    head = ["tokens/s", "forward", "backward", "optimizer", "MFU", "peak MB"]
    rows.append(["reading a batch", *[""] * len(head), sum(reading.values())])
    show(f"training, shape {label} ({shape.millions}); ms a step", head, rows)


def generation(label: str, shape: Shape, config: BenchConfig, device: torch.device) -> None:
    """Frames from nothing, one row and eight: the codes, the codes with their audio, the floor."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    # A codec that knows all codes of the shape, so that any frame can be heard.
    mimi = Codec.load("tiny", 8, device)
    if mimi.codebook_size < shape.codebook_size:
        mimi = _full_size(device)
    turns: dict[str, Turn] = {}
    makers = contenders(shape, config.reference)
    del makers["joint softmax"]
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make().to(device, dtype).eval()
        for rows in (1, 8):
            turns[f"{name}, batch {rows}"] = _speak(model, mimi, rows, config.frames)
    times = interleave(turns, max(3, config.rounds // 2), f"generation {label}")
    lines = []
    for key, parts in times.items():
        total, rows = parts["generate"] / config.frames, int(key.rsplit(" ", 1)[1])
        cells = [f"{1000 * total / shape.num_codebooks:.2f}"]
        cells += [f"{rows * shape.num_codebooks / total:,.0f}"]
        cells += [f"{rows / mimi.frame_rate / total:.1f} x", "", "", ""]
        if "floor" in parts:
            audible = rows * config.frames / mimi.frame_rate / parts["speak"]
            share = f"{parts['floor'] / parts['generate']:.0%}"
            cells[3:] = [share, f"{audible:.1f} x", f"{1000 * parts['first']:.0f}"]
        lines.append([key, *cells, total])
    head = ["ms/token", "tokens/s", "real time", "of its floor", "with codec", "ms to sound"]
    show(f"generation, shape {label} ({shape.millions}), {str(dtype)[6:]}", head, lines)


def codec(config: BenchConfig, device: torch.device) -> None:
    """Encoding and decoding of clips of four seconds, the bundled Mimi and one of full size."""
    turns: dict[str, Turn] = {}
    for name, mimi in (
        ("bundled", Codec.load("tiny", 8, device)),
        ("full size", _full_size(device)),
    ):
        for rows in (1, 8):
            wav = 0.1 * torch.randn(rows, 1, SECONDS * mimi.sample_rate, device=device)
            codes = torch.zeros(rows, 8, round(SECONDS * mimi.frame_rate), dtype=torch.long)
            turns[f"{name}, batch {rows}"] = partial(_code, mimi, wav, codes.to(device))
    times = interleave(turns, max(3, config.rounds // 3), "codec")
    lines = []
    for key, parts in times.items():
        length = SECONDS * int(key.rsplit(" ", 1)[1])
        speeds = [f"{length / parts[part]:.1f}" for part in ("encode", "decode")]
        lines.append([key, *speeds, sum(parts.values())])
    show(f"codec, 8 codebooks, clips of {SECONDS} s; x real time", ["encode", "decode"], lines)


def launch(config: BenchConfig, device: torch.device) -> None:
    """Run `scaling` in two processes that share the cores, or have a GPU each."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        print("\nscaling: not measured, there is one GPU")
        return
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--rounds", str(config.rounds), "--device", device.type]
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "nanomimi.bench", *flags],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        check=True,
    )


def scaling(config: BenchConfig, device: torch.device) -> None:
    """The same batch in every process: steps of the first one alone, and of all in step."""
    shape = CPU["default"] if device.type == "cpu" else GPU["124M"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with join_processes(device) as by:
        tokens = _random_tokens(shape).to(by.device)
        torch.manual_seed(0)
        models = [FlatLM(shape.llama, *shape.tokens).to(by.device) for _ in range(2)]
        alone = train_turn(models[0], tokens, dtype)
        together = train_turn(DistributedDataParallel(models[1]), tokens, dtype)

        def first_alone() -> dict[str, float]:
            parts = alone() if by.rank == 0 else {"step": 0.0}
            dist.barrier()
            return {"step": sum(parts.values())}

        turns = {"1 process": first_alone, f"{by.count} processes": together}
        times = interleave(turns, config.rounds, "scaling", quiet=by.rank > 0)
        if by.rank > 0:
            return
        count, lines = shape.batch_size * shape.max_frames * shape.num_codebooks, []
        one = sum(times["1 process"].values())
        for processes, (key, parts) in zip((1, by.count), times.items()):
            total = sum(parts.values())
            rate, efficiency = f"{processes * count / total:,.0f}", f"{one / total:.0%}"
            lines.append([key, rate, efficiency, total])
        show(f"scaling, {torch.get_num_threads()} threads each", ["tokens/s", "efficiency"], lines)


def show(title: str, head: list[str], rows: list[list[Any]]) -> None:
    """A table whose last column is each row's time in units of the first row's."""
    print(f"\n{title}")
    head, first = [*head, "time"], rows[0][-1]
    width = max(len(row[0]) for row in rows)
    print(" " * width + "".join(f"{title:>14}" for title in head))
    for name, *cells, total in rows:
        print(
            f"{name:{width}}" + "".join(f"{c:>14}" for c in [*cells, f"{total / first:.2f}"]),
            flush=True,
        )


def _random_tokens(shape: Shape) -> Tensor:
    ids = torch.randint(0, shape.codebook_size, (shape.batch_size, shape.max_frames + 1, 1))
    offsets = torch.arange(shape.num_codebooks) * (shape.codebook_size + 1)
    return rearrange(ids + offsets, "b t q -> b (t q)")


@contextmanager
def _random_data(shape: Shape) -> Iterator[TokenDataset]:
    """A data folder of ten thousand frames as prepare.py writes it, without a codec."""
    frames, stored = 10000, shape.num_codebooks
    with tempfile.TemporaryDirectory() as folder:
        np.zeros((frames, stored), np.uint16).tofile(Path(folder) / "train.bin")
        splits = {"train": {"frames": frames - 2, "utterances": 1}}
        meta = {"format": FORMAT, "num_codebooks": stored, "dtype": "uint16", "splits": splits}
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        yield TokenDataset(Path(folder), "train")


def _read(data: TokenDataset, shape: Shape) -> dict[str, float]:
    read = partial(data.train_batch, 0, shape.batch_size, shape.max_frames, seed=0)
    return {"read": seconds(read, torch.device("cpu"))}


def _full_size(device: torch.device) -> Codec:
    """Mimi as Kyutai's, untrained: as fast, and it says nothing."""
    mimi = Codec(build(None).to(device), "untrained", "")
    mimi.mimi.set_num_codebooks(8)
    mimi.num_codebooks = 8
    return mimi


def _speak(model: nn.Module, mimi: Codec, rows: int, frames: int) -> Turn:
    """Generation; then with its audio, the first frame of it, and the weight products alone."""
    device = next(model.parameters()).device
    if isinstance(model, HuggingFace):
        prompt = torch.zeros(rows, model.num_codebooks, 1, dtype=torch.long, device=device)
        return speak_turn(model, prompt, frames)
    prompt = separator(model.num_codebooks, model.codebook_size).to(device).expand(rows, -1, -1)
    generate = speak_turn(model, prompt, frames)
    audio = lambda: mimi.decode_stream(model.generate(prompt, frames, greedy))
    return lambda: {
        **generate(),
        "speak": seconds(lambda: list(audio()), device),
        "first": seconds(lambda: next(audio()), device),
        "floor": seconds(partial(_floor, model, rows, frames), device),
    }


@torch.inference_mode()
def _floor(model: FlatLM | HierarchicalLM, rows: int, frames: int) -> None:
    """The products with weights that generating takes, in their order, and nothing else."""
    linear = lambda part: [m.weight for m in part.modules() if isinstance(m, nn.Linear)]
    if isinstance(model, FlatLM):
        weights = [w for head in model.head for w in (head, *linear(model.llama))]
    else:
        inside = [model.projection.weight, *linear(model.depth)]
        weights = [model.backbone_head, *inside]
        weights += [w for head in model.depth_head for w in (*inside, head)]
        weights += linear(model.backbone)
    inputs = {w.shape[1]: w.new_ones(rows, w.shape[1]) for w in weights}
    for _ in range(frames):
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)


def _code(mimi: Codec, wav: Tensor, codes: Tensor) -> dict[str, float]:
    return {
        "encode": seconds(lambda: mimi.encode(wav), wav.device),
        "decode": seconds(lambda: mimi.decode(codes), wav.device),
    }


if __name__ == "__main__":
    run(BenchConfig, bench, __doc__)
