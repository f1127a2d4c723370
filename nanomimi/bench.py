"""Speed and memory of the models and the codec: python -m nanomimi.bench [--reference hf]

Rows of a table are timed round-robin, so ratios to the first row are meaningful on a noisy machine;
on a GPU, whose memory may hold one model only, one after another. Numbers are medians. MFU is the
share of the rate at which a large matrix product runs.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanomimi.codec import KYUTAI, Codec, build
from nanomimi.config import Config, option, run_script
from nanomimi.distributed import resolve_device
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import LlamaConfig

Turn = Iterator[dict[str, float]]  # builds a model, then works once for each row it is asked for
SHAPES = [  # device, name, batch size, tied; for all models Llama, codebooks, codes, frames
    ("cpu", "default", 4, False, LlamaConfig(4, 4, 4, 192, 512), 4, 256, 128),
    ("cpu", "A", 2, True, LlamaConfig(6, 6, 6, 384, 1024), 4, 2048, 128),
    ("cpu", "B", 2, True, LlamaConfig(6, 6, 2, 384, 1024), 8, 2048, 64),
    ("cuda", "97M", 16, False, LlamaConfig(12, 12, 12, 768, 2048), 4, 2048, 256),
    ("cuda", "1.0B", 8, False, LlamaConfig(16, 32, 8, 2048, 8192, 500000.0), 4, 2048, 256),
]
# TFLOP/s of dense bfloat16 products on the data sheets.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "4090": 165, "": math.nan}


@dataclass(frozen=True)
class BenchConfig(Config):
    part: Literal["all", "training", "generation", "codec"] = option("all", "what to measure")
    reference: Literal["none", "hf"] = option("none", "hf: transformers' LlamaForCausalLM too")
    compile: bool = option(False, "measure compiled training too; on a GPU it always is")
    rounds: int = option(10, "rounds of all models", at_least=1)
    frames: int = option(25, "frames to generate", at_least=1)
    device: str = option("auto", "auto, cpu or cuda")


def joint_softmax(llama: LlamaConfig, q: int, codes: int, frames: int, tied: bool) -> FlatLM:
    """The paper's model: one codebook that holds the classes of all, so one softmax over them."""
    return FlatLM(llama, 1, q * (codes + 1) - 1, q * frames, tied=tied)


class HuggingFace(nn.Module):
    """transformers' LlamaForCausalLM, with its own loss, generation loop and dynamic cache."""

    def __init__(self, c: LlamaConfig, q: int, codes: int, _: int, tied: bool) -> None:
        import transformers as hf

        super().__init__()
        sizes = (q * (codes + 1), c.n_embd, c.n_hidden, c.n_layer, c.n_head, c.n_kv_head)
        config = hf.LlamaConfig(*sizes, tie_word_embeddings=tied, eos_token_id=None)
        self.llama = hf.LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.llama(tokens, labels=tokens, use_cache=False).loss

    def generate(self, prompt: Tensor, frames: int, *_: Any) -> Tensor:
        return self.llama.generate(prompt.flatten(1), max_new_tokens=frames * prompt.shape[1])


def interleave(turns: dict[str, Turn], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each turn's numbers, from rounds that alternate, after one round of warm-up."""
    seen: dict[str, list[Any]] = {name: [] for name in turns}
    for name in list(turns) * (rounds + 1):
        try:
            seen[name].append(next(turns[name], None))  # None after an error
        except (RuntimeError, ImportError) as error:  # no memory, no compiler, no transformers
            print(f"{name} is left out: {str(error).splitlines()[0]}")
    median = lambda rows: {k: statistics.median(row[k] for row in rows[1:]) for k in rows[0]}
    return {name: median(rows) for name, rows in seen.items() if None not in rows}


def seconds(*works: Callable[[], Any], repeat: int = 1) -> list[float]:
    """Wall time of a call of each work; the device is waited for after `repeat` calls."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    often = lambda work: [work() for _ in range(repeat)]
    times = [(often(work), wait(), time.perf_counter())[-1] for work in (wait, *works)]
    return [(end - start) / repeat for start, end in pairwise(times)]


def training_flops(model: nn.Module, tokens: Tensor) -> int:
    """Of forward and backward, two per multiply-add, attention in full."""
    # The counter knows attention in its plain form only. Windows are equal: one is enough.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens[:1]).mean().backward()
    model.zero_grad()
    return len(tokens) * counter.get_total_flops()


def training_step(make: partial, tokens: Tensor, square: Tensor, compiled: bool) -> Turn:
    """Forward, backward, clipping and fused AdamW; products have the dtype of `square`."""
    model, dtype, gpu = make().to(tokens.device), square.dtype, tokens.is_cuda
    cast = torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)
    forward = cast(torch.compile(model, dynamic=False, disable=not compiled))
    flops, kept = training_flops(model, tokens), list(model.parameters())
    size, optimizer = sum(p.numel() for p in kept), torch.optim.AdamW(kept, lr=1e-4, fused=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cast(model)(tokens)
    storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in kept)}
    memory = 12 * size + sum(storages.values())  # gradients, moments; weights, saved for backward
    kept.clear()

    def step() -> None:
        forward(tokens).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    while True:
        t, product = seconds(step, lambda: square @ square, repeat=10 if gpu else 1)
        row = {"ms": 1e3 * t, "k tokens/s": tokens.numel() / t / 1e3, "M weights": size / 1e6}
        row["% MFU"] = 100 * flops / t * product / (2 * len(square) ** 3)
        if gpu:
            memory, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
            row["% of peak"] = flops / t / 1e10 / next(p for n, p in PEAKS.items() if n in name)
        yield row | {"GB": memory / 1e9}


def generation(make: partial, prompt: Tensor, frames: int) -> Turn:
    """Greedy, without END. The limit is one product with all weights read; on a GPU, their copy."""
    gpu, q, window = prompt.is_cuda, prompt.shape[1], prompt.new_zeros(1, 3 * prompt.shape[1])
    model = make().to(prompt.device, torch.bfloat16 if gpu else torch.float32)
    # Training takes six FLOPs per weight, so those of one more frame tell the weights it reads.
    weights = (training_flops(model, window) - training_flops(model, window[:, q:])) // 6
    greedy = lambda logits: logits[:, :-1].argmax(dim=-1)
    run = lambda n, replay=True: lambda: list(model.generate(prompt, n, greedy, 1, replay))
    a = next(model.parameters()).new_ones(2, weights // 2048, 1024)
    read = lambda: a[0].copy_(a[1]) if gpu else a.flatten(0, 1) @ a[0, : len(prompt)].T
    while True:
        first, unrecorded, all = seconds(run(1), run(1, replay=False), run(frames + 1))
        (limit,), t = seconds(read, repeat=20 if gpu else 1), (all - first) / frames
        row = {"ms": 1e3 * t / q, "% of limit": 100 * limit / t, "ms to start": 1e3 * (first - t)}
        yield row | ({"ms of it to record": 1e3 * (first - unrecorded)} if gpu else {})


def coding(codec: Codec, rows: int) -> Turn:
    """Clips of four seconds, in x real time, and the latency of a frame when streaming."""
    wav = 0.1 * torch.randn(rows, 1, 4 * codec.sample_rate, device=codec.device)
    codes = codec.encode(wav)
    stream = lambda: list(codec.decode_stream(codes.split(1, dim=2)))
    while True:
        t = seconds(stream, partial(codec.encode, wav), partial(codec.decode, codes))
        row = {"x encoding": 4 * rows / t[1], "x decoding": 4 * rows / t[2]}
        yield {"ms": 1e3 * t[0] / codes.shape[2], **row}


def tables(config: BenchConfig, device: torch.device) -> Iterator[tuple[str, dict[str, Turn]]]:
    """Every table's title and the turns that fill its rows."""
    gpu, hf = device.type == "cuda", config.reference == "hf"
    dtypes, kinds = (torch.float32, torch.bfloat16)[gpu:], (FlatLM, joint_softmax, HuggingFace)
    small = gpu and torch.cuda.mem_get_info()[1] < 40e9  # 1.0B and its moments take 16 GB of 24
    for _, label, batch_size, tied, *sizes in [s for s in SHAPES if s[0] == device.type]:
        models = {kind.__name__: partial(kind, *sizes, tied=tied) for kind in kinds[: 2 + hf]}
        models["HierarchicalLM"] = partial(HierarchicalLM, *sizes)
        batch_size //= 8 if small else 1
        tokens = torch.randint(sizes[2], (batch_size, sizes[1] * (sizes[3] + 1)), device=device)
        for dtype, compiled in product(dtypes, (False, True)[: 1 + (gpu or config.compile)]):
            square = torch.randn(2 * [8192 if gpu else 1536], dtype=dtype, device=device)
            turns = {k: training_step(m, tokens, square, compiled) for k, m in models.items()}
            how = f"batch {batch_size}, {str(dtype)[6:]}{', compiled' * compiled}"
            yield f"training, {label}, {how}; ms a step", turns
        del models["joint_softmax"]  # per token it generates as FlatLM does
        for rows in (1, 8):
            prompt = tokens.new_zeros(rows, sizes[1], 1)
            turns = {k: generation(m, prompt, config.frames) for k, m in models.items()}
            yield f"generation, {label}, batch {rows}; ms a token", turns
    full = build({**KYUTAI, "quantizer": {**KYUTAI["quantizer"], "n_q": 8}}).to(device)
    codecs = {"bundled": Codec.load("tiny", 8, device), "full size": Codec(full, "", "")}
    for rows in (1, 8):
        turns = {k: coding(c, rows) for k, c in codecs.items()}
        yield f"codec, batch {rows}; ms a streamed frame", turns


def describe(device: torch.device) -> str:
    """The CPU's threads, or the GPU's name and the rates of a large product and a large copy."""
    if device.type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads"
    a, b = (torch.ones(n, 8192, dtype=torch.bfloat16, device=device) for n in (8192, 131072))
    works = (lambda: a @ a), (lambda: b[::2].copy_(b[1::2]))
    t, copy = [seconds(*works, repeat=20) for _ in range(2)][1]  # the first time is a warm-up
    rates = f"{2 * len(a) ** 3 / t / 1e12:.0f} TFLOP/s, {b.nbytes / copy / 1e9:,.0f} GB/s copied"
    return f"{torch.cuda.get_device_name()}, {rates}"


def bench(config: BenchConfig) -> None:
    """Measure and print."""
    device = resolve_device(config.device)
    print(describe(device))
    for title, turns in tables(config, device):
        if config.part in ("all", title.split(",")[0]):
            print(f"\n{title}")
            torch.compiler.reset()
            alone = ({name: turns.pop(name)} for name in [*turns])
            rows = {}
            for some in alone if device.type == "cuda" else [turns]:
                rows |= interleave(some, config.rounds)
            for name, row in rows.items():
                row["x time"] = row["ms"] / next(iter(rows.values()))["ms"]
                shown = (f"{x:>8,.4g} {unit}".replace("nan", "  -") for unit, x in row.items())
                print(f"{name:16}", *shown)


if __name__ == "__main__":
    run_script(BenchConfig, bench, __doc__)
