"""Speed and memory of the models and the codec: python -m nanomimi.bench [--reference hf]

Numbers are medians. Rows are timed round-robin, so that noise meets all alike; on a GPU, whose
memory may hold one model only, one after another. MFU is relative to a large matrix product.
"""

import statistics
import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanomimi.codec import KYUTAI, Codec, build
from nanomimi.config import Config, option, run_script
from nanomimi.distributed import resolve_device, resolve_dtype
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import LlamaConfig

SHAPES = [  # device, name, batch size, tied; for all models Llama, codebooks, codes, frames
    ("cpu", "small", 4, False, LlamaConfig(4, 4, 4, 192, 512), 4, 256, 128),
    ("cpu", "A", 2, True, LlamaConfig(6, 6, 6, 384, 1024), 4, 2048, 128),
    ("cpu", "B", 2, True, LlamaConfig(6, 6, 2, 384, 1024), 8, 2048, 64),
    ("cuda", "97M", 16, False, LlamaConfig(12, 12, 12, 768, 2048), 4, 2048, 256),
    ("cuda", "1.0B", 8, False, LlamaConfig(16, 32, 8, 2048, 8192, 500000.0), 4, 2048, 256),
]
# TFLOP/s of dense bfloat16 products on the data sheets.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "4090": 165, "": float("nan")}


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


def interleave(rows: dict[str, Iterator[dict]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each row's numbers, from rounds that alternate, after one round of warm-up."""
    seen: dict[str, list[Any]] = {name: [] for name in rows}
    for name in list(rows) * (rounds + 1):
        try:
            seen[name].append(next(rows[name], None))  # None after an error
        except (RuntimeError, ImportError) as error:  # no memory, no compiler, no transformers
            print(f"{name} is left out: {str(error).splitlines()[0]}")
    median = lambda each: {k: statistics.median(row[k] for row in each[1:]) for k in each[0]}
    return {name: median(each) for name, each in seen.items() if len(each) > rounds}


def seconds(*works: Callable[[], Any], repeat: int = 1) -> list[float]:
    """Wall time of a call of each work; a GPU is waited for after `repeat` calls."""
    clock = lambda: (torch.get_device_module().synchronize(), timeit.default_timer())[1]
    return [timeit.timeit(work, timer=clock, number=repeat) / repeat for work in works]


def training_flops(model: nn.Module, tokens: Tensor) -> int:
    """Of forward and backward, two per multiply-add, attention in full."""
    # The counter knows attention in its plain form only. Windows are equal: one is enough.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        torch.autograd.grad(model(tokens[:1]).mean(), list(model.parameters()))
    return len(tokens) * counter.get_total_flops()


def training_step(make: partial, tokens: Tensor, square: Tensor, compiled: bool) -> Iterator[dict]:
    """Forward, backward, clipping, fused AdamW. GB: weights, gradients, moments, what is saved."""
    model, gpu = make().to(tokens.device), tokens.is_cuda
    flops, kept = training_flops(model, tokens), list(model.parameters())
    size, optimizer = sum(p.numel() for p in kept), torch.optim.AdamW(kept, lr=1e-4, fused=True)
    cast = torch.autocast(tokens.device.type, square.dtype, square.dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        cast(model)(tokens)
    peak = 12 * size + sum(s.nbytes() for s in {x.untyped_storage() for x in kept})
    kept.clear()
    forward = cast(torch.compile(model, dynamic=False, disable=not compiled))

    def step() -> None:
        forward(tokens).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    while True:
        t, product = seconds(step, lambda: square @ square, repeat=10 if gpu else 1)
        row = {"ms": 1e3 * t, "k tokens/s": tokens.numel() / t / 1e3, "M weights": size / 1e6}
        if gpu:
            peak, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
            torch.cuda.reset_peak_memory_stats()
            row["% of peak"] = flops / t / 1e10 / next(p for n, p in PEAKS.items() if n in name)
        yield row | {"% MFU": 100 * flops / t * product / (2 * len(square) ** 3), "GB": peak / 1e9}


def generation(make: partial, prompt: Tensor, frames: int) -> Iterator[dict]:
    """Greedy, without END. The limit is one product with all weights read; on a GPU, their copy."""
    gpu, q = prompt.is_cuda, prompt.shape[1]
    model = make().to(prompt.device, torch.bfloat16 if gpu else torch.float32)
    # Training takes six FLOPs per weight, so those of one more frame tell the weights it reads.
    more, less = (training_flops(model, prompt.new_zeros(1, n * q)) for n in (3, 2))
    greedy = lambda logits: logits[:, :-1].argmax(dim=-1)
    run = lambda n, replay=True: lambda: list(model.generate(prompt, n, greedy, 1, replay))
    a = next(model.parameters()).new_ones(2, (more - less) // 6 // 2048, 1024)
    read = lambda: a[0].copy_(a[1]) if gpu else a.flatten(0, 1) @ a[0, : len(prompt)].T
    while True:
        first, unrecorded, all = seconds(run(1), run(1, replay=False), run(frames + 1))
        (limit,), t = seconds(read, repeat=20 if gpu else 1), (all - first) / frames
        row = {"ms": 1e3 * t / q, "% of limit": 100 * limit / t, "ms to start": 1e3 * (first - t)}
        yield row | ({"ms of it to record": 1e3 * (first - unrecorded)} if gpu else {})


def coding(codec: Codec, clips: int) -> Iterator[dict]:
    """Clips of four seconds, in x real time, and the latency of a frame when streaming."""
    wav = 0.1 * torch.randn(clips, 1, 4 * codec.sample_rate, device=codec.device)
    codes = codec.encode(wav)
    stream = lambda: list(codec.decode_stream(codes.split(1, dim=2)))
    while True:
        t = seconds(stream, lambda: codec.encode(wav), lambda: codec.decode(codes))
        speed = {"x encoding": 4 * clips / t[1], "x decoding": 4 * clips / t[2]}
        yield {"ms": 1e3 * t[0] / codes.shape[2], **speed}


def tables(config: BenchConfig, device: torch.device) -> Iterator[tuple[str, dict, partial]]:
    """Every table's title, what its rows are about, and what makes a row of one of them."""
    gpu, dtype = device.type == "cuda", resolve_dtype("auto", device)
    kinds = [FlatLM, joint_softmax, HuggingFace][: 2 + (config.reference == "hf")]
    square = torch.randn(2 * [8192 if gpu else 1536], dtype=dtype, device=device)
    for _, label, batch, tied, *sizes in [s for s in SHAPES if s[0] == device.type]:
        models = {kind.__name__: partial(kind, *sizes, tied=tied) for kind in kinds}
        models["HierarchicalLM"] = partial(HierarchicalLM, *sizes)
        tokens = torch.randint(sizes[2], (batch, sizes[1] * (sizes[3] + 1)), device=device)
        for how in ["", ", compiled"][: 1 + (gpu or config.compile)]:
            row = partial(training_step, tokens=tokens, square=square, compiled=bool(how))
            yield f"training, {label}, batch {batch}, {str(dtype)[6:]}{how}; ms a step", models, row
        del models["joint_softmax"]  # per token it generates as FlatLM does
        for n in (1, 8):
            row = partial(generation, prompt=tokens.new_zeros(n, sizes[1], 1), frames=config.frames)
            yield f"generation, {label}, batch {n}; ms a token", models, row
    full = build({**KYUTAI, "quantizer": {**KYUTAI["quantizer"], "n_q": 8}}).to(device)
    codecs = {"bundled": Codec.load("tiny", 8, device), "full size": Codec(full, "", "")}
    for n in (1, 8):
        yield f"codec, batch {n}; ms a streamed frame", codecs, partial(coding, clips=n)


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
    gpu = device.type == "cuda"
    print(describe(device))
    for title, subjects, row in tables(config, device):
        if config.part in ("all", title.split(",")[0]):
            print(f"\n{title}")
            torch.compiler.reset()
            rows = {}
            for names in [[name] for name in subjects] if gpu else [list(subjects)]:
                rows |= interleave({name: row(subjects[name]) for name in names}, config.rounds)
            for name, numbers in rows.items():
                numbers["x time"] = numbers["ms"] / next(iter(rows.values()))["ms"]
                print(f"{name:16}", *(f"{x:>8,.4g} {unit}" for unit, x in numbers.items()))


if __name__ == "__main__":
    run_script(BenchConfig, bench, __doc__)
