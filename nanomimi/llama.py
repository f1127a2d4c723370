"""Step 4, hidden states -> hidden states: a Llama decoder without a vocabulary.

Embeddings (B, N, C) go in, hidden states (B, N, C) come out; what is embedded and what is predicted
is the business of flat.py and hierarchical.py. Weights carry the names that Hugging Face gives them
below `model.`, and RoPE rotates halves as there, so released Llama weights load by name.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretch of the slow rotations to longer contexts (Llama 3.2 uses factor 32)."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder. n_kv_head below n_head is grouped-query attention (GQA)."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_hidden: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(
                f"--n_embd must be --n_head times an even number; got {self.n_embd}, {self.n_head}"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"--n_head must be a multiple of --n_kv_head; got {self.n_head}, {self.n_kv_head}"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class KVCache:
    """Keys and values of the positions seen so far, preallocated for `max_positions`."""

    def __init__(
        self, config: LlamaConfig, batch_size: int, max_positions: int, like: Tensor
    ) -> None:
        """`like` gives dtype and device."""
        shape = (batch_size, config.n_kv_head, max_positions, config.head_dim)
        # Zeros, not whatever the memory held: masked values are multiplied too, by 0.
        self.layers = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.n_layer)
        ]
        self.keys = torch.arange(max_positions, device=like.device)
        self.length, self.max_positions = 0, max_positions

    def extend(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, H_kv, N, D) at `positions` (N,); returns those that `mask` speaks of."""
        keys, values = self.layers[layer]
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        end = self._end(positions)
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, positions: Tensor) -> Tensor:
        """(N, M): which of the M keys each of `positions` (N,) sees, itself and those before it."""
        return self.keys[: self._end(positions)] <= rearrange(positions, "n -> n 1")

    def _end(self, positions: Tensor) -> int | Tensor:
        # On a CPU the filled part alone; on a GPU the size of nothing may depend on a position.
        return self.max_positions if positions.is_cuda else positions[-1] + 1

    def repeat(self, count: int) -> None:
        """Let every row stand `count` times, so that continuations of it share one prefill."""
        self.layers = [
            (k.repeat_interleave(count, dim=0), v.repeat_interleave(count, dim=0))
            for k, v in self.layers
        ]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864): scores depend on the distance alone.

    positions (N,) -> the cosines and signed sines (N, D) that `rotate` turns by, in float32.
    """
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** -(steps / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = _stretch(frequencies, config.rope_scaling)
    angles = torch.outer(positions.float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x[i], x[i + D/2]) of x (B, H, N, D) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([second, first], dim=-1) * sin).to(x.dtype)


class Place(NamedTuple):
    """Where the N positions of a pass stand: what all layers share."""

    positions: Tensor  # (N,)
    cos: Tensor  # (N, D)
    sin: Tensor  # (N, D)
    mask: Tensor | None  # (N, M) for the M keys of a cache


class Attention(nn.Module):
    """Causal self-attention; H_kv key-value heads serve H query heads."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        kv_width = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None) -> Tensor:
        # h and d are both given, so that a recording (replay.py) does not compute one of them.
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.n_head, d=self.head_dim)
        k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=self.n_kv_head, d=self.head_dim)
            for proj in (self.k_proj, self.v_proj)
        )
        q, k = rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin)
        if cache is not None:
            k, v = cache.extend(self.layer, place.positions, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=place.mask,
            is_causal=cache is None,
            enable_gqa=self.n_kv_head < self.n_head,
        )
        return self.o_proj(rearrange(y, "b h n d -> b n (h d)", h=self.n_head, d=self.head_dim))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each behind a norm and beside a residual connection."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, place: Place, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), place, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder: blocks and a final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.apply(self._init)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, N, C) -> (B, N, C). With a cache, x continues what is in it."""
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        if cache is None:
            return self.at(positions, None, x, None)
        cache.length += x.shape[1]
        return self.at(positions, cache.mask(positions), x, cache)

    def at(
        self, positions: Tensor, mask: Tensor | None, x: Tensor, cache: KVCache | None
    ) -> Tensor:
        """The same at positions (N,), which see the keys of the cache that mask (N, M) says."""
        place = Place(positions, *rope(self.config, positions), mask)
        for layer in self.layers:
            x = layer(x, place, cache)
        return self.norm(x)

    def _init(self, module: nn.Module) -> None:
        # GPT-2's scheme: what writes into the residual stream starts smaller, the more writers
        # there are.
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Block):
            for writer in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(writer.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow the rotations that do not complete in the original context; keep the fast."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)
