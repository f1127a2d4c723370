"""Step 4, hidden states -> hidden states: a Llama decoder without a vocabulary.

Embeddings (B, N, C) go in, hidden states (B, N, C) come out. The models of step 5 decide what is
embedded and what is predicted. Weights have the names that Hugging Face gives them below `model.`,
and RoPE rotates halves as it does there, so released Llama weights load by name.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from nanomimi.files import Positive


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's extension of RoPE to longer contexts (Llama 3.2 uses factor 32)."""

    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder. n_kv_head < n_head is grouped-query attention (GQA)."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_hidden: int
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: Positive = 1e-5
    head_dim: int | None = None  # default: n_embd / n_head

    def __post_init__(self) -> None:
        head_dim = self.head_dim or self.n_embd / self.n_head
        # RoPE rotates pairs of dimensions, so a head needs an even number of them.
        if head_dim % 2:
            raise ValueError(
                f"--n_embd must be --n_head times an even number; got {self.n_embd}, {self.n_head}"
            )
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"--n_head must be a multiple of --n_kv_head; got {self.n_head}, {self.n_kv_head}"
            )
        object.__setattr__(self, "head_dim", int(head_dim))  # the dataclass is frozen


class KVCache:
    """Keys and values of the positions seen so far, preallocated for `max_positions`."""

    def __init__(self, config: LlamaConfig, batch_size: int, max_positions: int, like: Tensor):
        """`like` gives dtype and device."""
        # Attention on a GPU copies a mask in every layer unless its rows are a multiple of 8 long.
        self.slots = torch.arange(8 * math.ceil(max_positions / 8), device=like.device)
        shape = (batch_size, config.n_kv_head, len(self.slots), config.head_dim)
        # Zeros, not uninitialised memory: masked values are multiplied by 0, and NaN * 0 is NaN.
        self.layers = [[like.new_zeros(shape) for _ in "kv"] for _ in range(config.n_layer)]
        self.rope, self.group = rope(config, self.slots), config.n_head // config.n_kv_head
        self.length, self.max_positions = 0, max_positions

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, N, D) at `positions` (N,); returns the M slots to attend to."""
        (keys, values), end = self.layers[layer], self._end(positions)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, positions: Tensor) -> Tensor:
        """(G * N, M), added to scores: -inf where a slot follows a query; G heads share keys."""
        later = self.slots[: self._end(positions)] > repeat(positions, "n -> (g n) 1", g=self.group)
        return torch.zeros_like(later, dtype=self.layers[0][0].dtype).masked_fill(later, -torch.inf)

    def _end(self, positions: Tensor) -> int | Tensor:
        # CUDA graphs need fixed shapes: attend to the whole cache and mask it. On a CPU it is
        # cheaper to attend to the filled part alone.
        return positions[-1] + 1 if positions.device.type == "cpu" else len(self.slots)

    def repeat(self, count: int) -> None:
        """Repeat every row `count` times so that samples share one prefill."""
        self.layers = [[x.repeat_interleave(count, dim=0) for x in kv] for kv in self.layers]


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864): scores depend on relative positions alone.

    positions (N,) -> cosines and signed sines (N, D), float32, for `rotate`.
    """
    # Not a stored buffer: casting the model to bfloat16 would round it, and with it the angles.
    steps = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequencies = config.rope_theta ** -(steps / config.head_dim)
    if config.rope_scaling is not None:
        frequencies = _scale(frequencies, config.rope_scaling)
    angles = torch.outer(positions.float(), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def _scale(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow down the rotations that do not complete in the original context; keep the fast ones."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every pair (x[i], x[i + D/2]) of x (B, H, N, D) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([second, first], dim=-1) * sin).to(x.dtype)


class Positions(NamedTuple):
    """What all layers of one forward pass share about its N positions."""

    index: Tensor  # (N,)
    cos: Tensor  # (N, D)
    sin: Tensor  # (N, D)
    mask: Tensor | None  # (G * N, M) over the M slots of a cache


class Attention(nn.Module):
    """Causal self-attention; H query heads share H_kv key-value heads."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        width, kv_width = (n * config.head_dim for n in (config.n_head, config.n_kv_head))
        self.q_proj = nn.Linear(config.n_embd, width, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        # Both h and d are given, so that a recorded step (decode.py) need not compute one of them.
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.n_head, d=self.head_dim)
        k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=self.n_kv_head, d=self.head_dim)
            for proj in (self.k_proj, self.v_proj)
        )
        q, k = (rotate(part, positions.cos, positions.sin) for part in (q, k))
        attend, group = F.scaled_dot_product_attention, self.n_head // self.n_kv_head
        if cache is None:
            if q.dtype == torch.float32 and q.device.type != "cpu":
                # On a GPU, flash attention alone shares keys among heads, and it has no float32.
                k, v = (repeat(part, "b k n d -> b (k g) n d", g=group) for part in (k, v))
            y = attend(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
            return self.o_proj(rearrange(y, "b h n d -> b n (h d)"))
        k, v = cache.update(self.layer, positions.index, k, v)
        # is_causal would align the first query with the first key, but these are the last ones.
        # With a mask no fast kernel shares keys: the heads of a group become queries of one head.
        q = rearrange(q, "b (k g) n d -> b k (g n) d", k=self.n_kv_head, g=group)
        y = attend(q, k, v, attn_mask=positions.mask)
        return self.o_proj(rearrange(y, "b k (g n) d -> b n (k g d)", g=group, d=self.head_dim))


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
    """Attention, then MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        # Pre-norm: no norm stands on the residual path, so gradients reach every layer unchanged.
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder: blocks and a final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, Block):
            # 2 * n_layer projections add to the residual stream. Scaled down (GPT-2), their sum
            # has the same variance at any depth.
            for projection in (module.self_attn.o_proj, module.mlp.down_proj):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, N, C) -> hidden states (B, N, C). With a cache, x continues it."""
        if cache is None:
            return self.forward_at(torch.arange(x.shape[1], device=x.device), None, x, None)
        index = torch.arange(cache.length, cache.length + x.shape[1], device=x.device)
        cache.length += x.shape[1]
        return self.forward_at(index, cache.mask(index), x, cache)

    def forward_at(
        self, index: Tensor, mask: Tensor | None, x: Tensor, cache: KVCache | None
    ) -> Tensor:
        """The same at positions `index` (N,), which attend to what the cache's mask allows."""
        angles = rope(self.config, index) if cache is None else [t[index] for t in cache.rope]
        positions = Positions(index, *angles, mask)
        for layer in self.layers:
            x = layer(x, positions, cache)
        return self.norm(x)
