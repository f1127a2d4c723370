"""How fast, beside its own limits and its rivals: python -m nanomimi.bench

    python -m nanomimi.bench                    training, generation and codec in a few minutes
    python -m nanomimi.bench --reference hf     and Hugging Face's Llama, where it is installed
    python -m nanomimi.bench --compile          and compiled training

All contenders of a table take turns, step by step, so that what disturbs the machine disturbs all;
the tables show medians of the turns and ratios to the first row. Compare ratios, not milliseconds
of two runs. MFU is the share of the rate at which this machine was seen to multiply matrices of
that precision; a generator's floor is the time of its weight products alone.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanomimi.codec import Codec, build
from nanomimi.config import Config, option, resolve_device, run
from nanomimi.data import FORMAT, TokenDataset
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM, csm_depth
from nanomimi.llama import LlamaConfig
from nanomimi.timing import (
    Turn,
    gemm_rate,
    interleave,
    saved_bytes,
    seconds,
    speak_turn,
    train_turn,
    training_flops,
)
from nanomimi.tokens import separator


@dataclass(frozen=True)
class BenchConfig(Config):
    part: Literal["all", "training", "generation", "codec"] = option("all", "what to measure")
    reference: Literal["none", "hf"] = option("none", "hf: transformers' LlamaForCausalLM too")
    compile: bool = option(False, "measure compiled training too")
    rounds: int = option(10, "turns of every contender", at_least=1)
    frames: int = option(25, "frames to generate in a turn", at_least=1)
    device: str = option("auto", "auto, cpu or cuda")


@dataclass(frozen=True)
class Shape:
    """A model and its batch; a window is max_frames + 1 frames."""

    llama: LlamaConfig
    num_codebooks: int
    codebook_size: int
    max_frames: int
    batch_size: int


CPU = {
    "default": Shape(LlamaConfig(4, 4, 4, 192, 512), 4, 256, 128, 4),
    "A": Shape(LlamaConfig(6, 6, 6, 384, 1024), 4, 1024, 128, 2),
    "B": Shape(LlamaConfig(6, 6, 2, 384, 1024), 8, 1024, 64, 2),
}
GPU = {
    "124M": Shape(LlamaConfig(12, 12, 12, 768, 2048), 4, 2048, 256, 16),
    "1.2B": Shape(LlamaConfig(16, 32, 8, 2048, 8192, 500000.0), 4, 2048, 256, 8),
}
SECONDS = 4  # of the codec's clips


def bench(config: BenchConfig) -> None:
    """Measure and print."""
    device = resolve_device(config.device)
    if config.reference == "hf" and not importlib.util.find_spec("transformers"):
        print("no Hugging Face reference: transformers is not installed")
        config = replace(config, reference="none")
    shapes = CPU if device.type == "cpu" else {**CPU, **GPU}
    rates = {dtype: gemm_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    cpu = f"CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    products = (f"{str(d)[6:]} {rate / 1e9:,.0f} GFLOP/s" for d, rate in rates.items())
    print(f"{name}; matrix products: {', '.join(products)}")
    if config.part in ("all", "training"):
        for label, shape in shapes.items():
            training(label, shape, rates, config, device)
    if config.part in ("all", "generation"):
        for label, shape in shapes.items():
            generation(label, shape, config, device)
    if config.part in ("all", "codec"):
        codec(config, device)


def training(
    label: str,
    shape: Shape,
    rates: dict[torch.dtype, float],
    config: BenchConfig,
    device: torch.device,
) -> None:
    """Steps of forward, backward, clipping and fused AdamW, by model and precision."""
    ids = torch.randint(0, shape.codebook_size, (shape.batch_size, shape.max_frames + 1, 1))
    offsets = torch.arange(shape.num_codebooks) * (shape.codebook_size + 1)
    tokens = rearrange(ids + offsets, "b t q -> b (t q)").to(device)
    count = shape.batch_size * shape.max_frames * shape.num_codebooks
    turns, flops, memory = {}, {}, {}
    # On a GPU nobody trains in float32, and the large shape would not fit twice.
    for dtype in rates if device.type == "cpu" else [torch.bfloat16]:
        for name, make in _models(shape, config.reference).items():
            for compiled in (False, True) if config.compile else (False,):
                key = f"{name}, {str(dtype)[6:]}{', compiled' * compiled}"
                torch.manual_seed(0)
                model = make().to(device)
                flops[key], memory[key] = (
                    training_flops(model, tokens),
                    saved_bytes(model, tokens, dtype),
                )
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
        mfu, saved = flops[key] / total / rate, memory[key] / 2**20
        rows.append([key, f"{count / total:,.0f}", *cells, f"{mfu:.0%}", f"{saved:,.0f}", total])
    head = ["tokens/s", "forward", "backward", "optimizer", "MFU", "saved MB"]
    rows.append(["reading a batch", *[""] * len(head), sum(reading.values())])
    show(f"training, shape {label} ({_millions(shape)}); ms a step", head, rows)


def generation(label: str, shape: Shape, config: BenchConfig, device: torch.device) -> None:
    """Frames from nothing, one row and eight; the floor is taken in the same turns."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    frame_rate = Codec.load("tiny", 1).frame_rate
    turns: dict[str, Turn] = {}
    makers = _models(shape, config.reference)
    del makers["joint softmax"]
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make().to(device, dtype).eval()
        for rows in (1, 8):
            turns[f"{name}, batch {rows}"] = _speak(model, rows, config.frames)
    times = interleave(turns, config.rounds, f"generation {label}")
    lines = []
    for key, parts in times.items():
        total = parts["generate"] / config.frames
        rows = int(key.rsplit(" ", 1)[1])
        per_token = 1000 * total / shape.num_codebooks
        share = f"{parts['floor'] / parts['generate']:.0%}" if "floor" in parts else ""
        rate, speed = rows * shape.num_codebooks / total, rows / frame_rate / total
        cells = [f"{per_token:.2f}", f"{rate:,.0f}", f"{speed:.1f} x", share]
        lines.append([key, *cells, total])
    head = ["ms/token", "tokens/s", "real time", "share of floor"]
    show(f"generation, shape {label} ({_millions(shape)}), {str(dtype)[6:]}", head, lines)


def codec(config: BenchConfig, device: torch.device) -> None:
    """Encoding and decoding of clips of four seconds, the bundled Mimi and one of full size."""
    turns: dict[str, Turn] = {}
    tiny = Codec.load("tiny", 8, device)
    full = Codec(build(None).to(device), "untrained", "")
    full.mimi.set_num_codebooks(8)
    for name, mimi in (("bundled", tiny), ("full size", full)):
        for rows in (1, 8):
            wav = 0.1 * torch.randn(rows, 1, SECONDS * mimi.sample_rate, device=device)
            codes = torch.zeros(rows, 8, round(SECONDS * mimi.frame_rate), dtype=torch.long)
            turns[f"{name}, batch {rows}"] = partial(_code, mimi, wav, codes.to(device))
    times = interleave(turns, max(3, config.rounds // 3), "codec")
    lines = []
    for key, parts in times.items():
        seconds = SECONDS * int(key.rsplit(" ", 1)[1])
        speeds = [f"{seconds / parts[part]:.1f}" for part in ("encode", "decode")]
        lines.append([key, *speeds, sum(parts.values())])
    show(f"codec, 8 codebooks, clips of {SECONDS} s; x real time", ["encode", "decode"], lines)


def show(title: str, head: list[str], rows: list[list[Any]]) -> None:
    """A table whose last column is each row's time in units of the first row's."""
    print(f"\n{title}")
    head, first = [*head, "time"], rows[0][-1]
    width = max(len(row[0]) for row in rows)
    print(" " * width + "".join(f"{title:>16}" for title in head))
    for name, *cells, total in rows:
        print(f"{name:{width}}" + "".join(f"{c:>16}" for c in [*cells, f"{total / first:.2f}"]))


class JointLM(FlatLM):
    """The paper's head: one softmax over the classes of all codebooks, otherwise FlatLM."""

    def forward(self, tokens: Tensor) -> Tensor:
        q = self.num_codebooks
        hidden = self.llama(self.embedding(tokens[:, :-1]))[:, q - 1 :]
        logits = rearrange(hidden @ self.head.flatten(0, 1).T, "b n v -> (b n) v")
        nats = F.cross_entropy(logits.float(), tokens[:, q:].flatten(), reduction="none")
        return rearrange(nats, "(b t q) -> b t q", q=q, b=len(tokens))


class HuggingFace(nn.Module):
    """transformers' LlamaForCausalLM over the joint vocabulary, with the face of ours."""

    def __init__(self, shape: Shape) -> None:
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        super().__init__()
        c, self.num_codebooks = shape.llama, shape.num_codebooks
        self.llama = LlamaForCausalLM(
            TheirConfig(
                vocab_size=shape.num_codebooks * (shape.codebook_size + 1),
                hidden_size=c.n_embd,
                intermediate_size=c.n_hidden,
                num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head,
                num_key_value_heads=c.n_kv_head,
                attn_implementation="sdpa",
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        q = self.num_codebooks
        logits = self.llama(tokens[:, :-1], use_cache=False).logits[:, q - 1 :].float()
        return F.cross_entropy(
            rearrange(logits, "b n v -> (b n) v"), tokens[:, q:].flatten(), reduction="none"
        )

    @torch.inference_mode()
    def generate(
        self, prompt: Tensor, num_frames: int, sample: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """All frames at once, by the library's own loop and its dynamic cache; always greedy."""
        ids = rearrange(prompt, "b q t -> b (t q)")
        new = num_frames * self.num_codebooks
        tokens = self.llama.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        yield from rearrange(tokens[:, -new:], "b (t q) -> t b q", q=self.num_codebooks)


def _models(shape: Shape, reference: str) -> dict[str, Callable[[], nn.Module]]:
    tokens = shape.num_codebooks, shape.codebook_size, shape.max_frames
    models: dict[str, Callable[[], nn.Module]] = {
        "flat": lambda: FlatLM(shape.llama, *tokens),
        "hierarchical": lambda: HierarchicalLM(shape.llama, csm_depth(shape.llama), *tokens),
        "joint softmax": lambda: JointLM(shape.llama, *tokens),
    }
    return {**models, "Hugging Face": lambda: HuggingFace(shape)} if reference == "hf" else models


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


def _speak(model: nn.Module, rows: int, frames: int) -> Turn:
    """Generation, and in the same turn the weight products that it takes."""
    device = next(model.parameters()).device
    if isinstance(model, HuggingFace):
        prompt = torch.zeros(rows, model.num_codebooks, 1, dtype=torch.long, device=device)
        return speak_turn(model, prompt, frames)
    prompt = separator(model.num_codebooks, model.codebook_size).to(device).expand(rows, -1, -1)
    generate, floor = speak_turn(model, prompt, frames), partial(_floor, model, rows, frames)
    return lambda: {**generate(), "floor": seconds(floor, device)}


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


def _millions(shape: Shape) -> str:
    with torch.device("meta"):
        model = FlatLM(shape.llama, shape.num_codebooks, shape.codebook_size, shape.max_frames)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


if __name__ == "__main__":
    run(BenchConfig, bench, __doc__)
