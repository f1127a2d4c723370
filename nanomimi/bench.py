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
import statistics
import tempfile
import time
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from nanomimi.codec import Codec, build
from nanomimi.config import Config, option, resolve_device, run
from nanomimi.data import FORMAT, TokenDataset
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM, csm_depth
from nanomimi.llama import LlamaConfig
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
FRAME_SECONDS = 0.08
SECONDS = 4  # of the codec's clips
Turn = Callable[[], dict[str, float]]  # works once and returns named seconds


def bench(config: BenchConfig) -> None:
    """Measure and print."""
    device = resolve_device(config.device)
    if config.reference == "hf" and not importlib.util.find_spec("transformers"):
        print("no Hugging Face reference: transformers is not installed")
        config = replace(config, reference="none")
    shapes = CPU if device.type == "cpu" else {**CPU, **GPU}
    rates = {dtype: gemm_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    threads = f"{torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, {threads}; matrix products: "
        + ", ".join(
            f"{str(d).removeprefix('torch.')} {r / 1e9:,.0f} GFLOP/s" for d, r in rates.items()
        )
    )
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
                key = f"{name}, {str(dtype).removeprefix('torch.')}{', compiled' * compiled}"
                torch.manual_seed(0)
                model = make().to(device)
                flops[key], memory[key] = _flops(model, tokens), _saved_bytes(model, tokens, dtype)
                if compiled:
                    model.compile()
                turns[key] = partial(_train, model, _adamw(model), tokens, dtype)
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
    turns: dict[str, Turn] = {}
    makers = _models(shape, config.reference)
    del makers["joint softmax"]
    for name, make in makers.items():
        torch.manual_seed(0)
        model = make().to(device, dtype).eval()
        for rows in (1, 8):
            turns[f"{name}, batch {rows}"] = partial(_speak, model, rows, config.frames)
    times = interleave(turns, config.rounds, f"generation {label}")
    lines = []
    for key, parts in times.items():
        total = parts["generate"] / config.frames
        rows = int(key.rsplit(" ", 1)[1])
        per_token = 1000 * total / shape.num_codebooks
        share = f"{parts['floor'] / parts['generate']:.0%}" if "floor" in parts else ""
        speed = rows * FRAME_SECONDS / total
        lines.append(
            [
                key,
                f"{per_token:.2f}",
                f"{1000 / per_token * rows:,.0f}",
                f"{speed:.1f} x",
                share,
                total,
            ]
        )
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


def interleave(turns: dict[str, Turn], rounds: int, name: str) -> dict[str, dict[str, float]]:
    """Median seconds of every part of every turn, after one round of warming up."""
    seen: dict[str, list[dict[str, float]]] = {key: [] for key in turns}
    for _ in tqdm(range(rounds + 1), name, unit="round", leave=False):
        for key, turn in turns.items():
            seen[key].append(turn())
    return {
        key: {part: statistics.median(t[part] for t in times[1:]) for part in times[0]}
        for key, times in seen.items()
    }


def show(title: str, head: list[str], rows: list[list[Any]]) -> None:
    """A table whose last column is each row's time in units of the first row's."""
    print(f"\n{title}")
    head, first = [*head, "time"], rows[0][-1]
    width = max(len(row[0]) for row in rows)
    print(" " * width + "".join(f"{title:>16}" for title in head))
    for name, *cells, total in rows:
        print(f"{name:{width}}" + "".join(f"{c:>16}" for c in [*cells, f"{total / first:.2f}"]))


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of ten products of large square matrices."""
    size = 1536 if device.type == "cpu" else 8192
    a = b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(_seconds(lambda: a @ b, device) for _ in range(10))


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


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    loss = None

    def forward() -> None:
        nonlocal loss
        with _autocast(tokens, dtype):
            loss = model(tokens).mean()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    device = tokens.device
    return {
        "forward": _seconds(forward, device),
        "backward": _seconds(lambda: loss.backward(), device),
        "optimizer": _seconds(update, device),
    }


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
    return {"read": _seconds(read, torch.device("cpu"))}


def _speak(model: nn.Module, rows: int, frames: int) -> dict[str, float]:
    weight = next(model.parameters())
    if isinstance(model, HuggingFace):
        prompt = torch.zeros(rows, model.num_codebooks, 1, dtype=torch.long, device=weight.device)
    else:
        prompt = separator(model.num_codebooks, model.codebook_size).to(weight.device)
        prompt = prompt.expand(rows, -1, -1)
    likeliest = lambda logits: logits[:, :-1].argmax(dim=-1)  # END would stop it early
    work = lambda: list(model.generate(prompt, frames, likeliest))
    parts = {"generate": _seconds(work, weight.device)}
    if not isinstance(model, HuggingFace):
        parts["floor"] = _seconds(partial(_floor, model, rows, frames), weight.device)
    return parts


@torch.inference_mode()
def _floor(model: FlatLM | HierarchicalLM, rows: int, frames: int) -> None:
    """The products with weights that generating takes, and nothing else."""
    q = model.num_codebooks
    if isinstance(model, FlatLM):
        products = [(m.weight, q) for m in model.llama.modules() if isinstance(m, nn.Linear)]
        products += [(head, 1) for head in model.head]
    else:
        products = [(m.weight, 1) for m in model.backbone.modules() if isinstance(m, nn.Linear)]
        products += [(m.weight, q) for m in model.depth.modules() if isinstance(m, nn.Linear)]
        products += [(model.projection.weight, q), (model.backbone_head, 1)]
        products += [(head, 1) for head in model.depth_head]
    inputs = {w.shape[1]: w.new_ones(rows, w.shape[1]) for w, _ in products}
    for _ in range(frames):
        for weight, times in products:
            for _ in range(times):
                F.linear(inputs[weight.shape[1]], weight)


def _code(mimi: Codec, wav: Tensor, codes: Tensor) -> dict[str, float]:
    return {
        "encode": _seconds(lambda: mimi.encode(wav), wav.device),
        "decode": _seconds(lambda: mimi.decode(codes), wav.device),
    }


def _autocast(tokens: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)


def _flops(model: nn.Module, tokens: Tensor) -> int:
    """Of forward and backward, two per multiply-add, attention in full, as torch counts them."""
    # Only the plain form of attention is made of products that the counter knows on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).mean().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def _saved_bytes(model: nn.Module, tokens: Tensor, dtype: torch.dtype) -> int:
    """What the forward pass keeps for the backward pass, weights aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _autocast(tokens, dtype):
        model(tokens).mean()
    return sum(seen.values())


def _millions(shape: Shape) -> str:
    with torch.device("meta"):
        model = FlatLM(shape.llama, shape.num_codebooks, shape.codebook_size, shape.max_frames)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time until the device has done the work."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run(BenchConfig, bench, __doc__)
