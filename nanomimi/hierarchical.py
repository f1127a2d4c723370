"""Step 5b, HierarchicalLM: a backbone over frames, a depth decoder inside each frame (CSM, Sesame).

    tokens     END END END END | 17  5  3 99 | 21  5  8 40 | ...     one position a frame, summed
    backbone   hidden 0          hidden 1      hidden 2              each from all frames so far
    predicts                     17            21                    from the hidden state before it
    depth                           5  3 99       5  8 40            from that hidden state and the
                                                                     codes before it in its frame

This is the model that the paper compares with, built from the same blocks as FlatLM and with the
same interface: the same tokens, targets and factorisation, so nats compare. Frame t knows of the
past only the hidden state after frame t - 1. The state after frame t would contain the answer.
CSM trains its depth decoder on a sixteenth of the frames to save memory; this one on all of them,
unless depth_fraction says otherwise.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from nanomimi.decode import DecodeStep
from nanomimi.llama import KVCache, Llama, LlamaConfig
from nanomimi.lm import LanguageModel, Sampler


def csm_depth(config: LlamaConfig, **changes: int) -> LlamaConfig:
    """The depth decoder's shape: CSM's proportions to the backbone, except for `changes`.

    CSM-1B: 16 layers, width 2048, 32 heads, hidden 8192; depth decoder 4, 1024, 8 and 8192.
    """
    shape = {"n_layer": max(1, config.n_layer // 4), "n_head": max(1, config.n_head // 4)}
    shape |= {"n_embd": config.n_embd // 2, "head_dim": None, **changes}
    shape["n_kv_head"] = max(1, shape["n_head"] * config.n_kv_head // config.n_head)
    try:
        return replace(config, **shape)
    except ValueError as error:
        raise ValueError(str(error).replace("--n_", "--depth_n_")) from None


class HierarchicalLM(LanguageModel):
    """Embedding, a Llama over frames, a smaller Llama inside the frame, a head per codebook."""

    OPTIONS = dict.fromkeys("depth_n_layer depth_n_head depth_n_embd depth_n_hidden".split(), int)
    OPTIONS |= {"depth_fraction": float}

    def __init__(
        self, config: LlamaConfig, *sizes: int, depth_fraction: float = 1.0, **depth: int
    ) -> None:
        """`sizes` as in LanguageModel; `depth`: OPTIONS that change the depth decoder's shape;
        `depth_fraction`: share of frames on which it is trained.
        """
        super().__init__(config, *sizes)
        self.depth_fraction = depth_fraction
        self.backbone_head = nn.Parameter(torch.randn(self.num_classes, config.n_embd) * 0.02)
        if self.num_codebooks > 1:
            inner = csm_depth(config, **{k.removeprefix("depth_"): v for k, v in depth.items()})
            self.projection = nn.Linear(config.n_embd, inner.n_embd, bias=False)
            nn.init.normal_(self.projection.weight, std=0.02)
            self.depth = Llama(inner)
            shape = (self.num_codebooks - 1, self.num_classes, inner.n_embd)
            self.depth_head = nn.Parameter(torch.randn(shape) * 0.02)

    def num_positions(self, num_frames: int) -> int:
        return num_frames

    def embed(self, tokens: Tensor) -> Tensor:
        return reduce(self.embedding(tokens), "b (t q) c -> b t c", "sum", q=self.num_codebooks)

    def forward(self, tokens: Tensor) -> Tensor:
        q = self.num_codebooks
        embedded = rearrange(self.embedding(self.corrupt(tokens)), "b (t q) c -> b t q c", q=q)
        hidden = self.backbone(reduce(embedded[:, :-1], "b t q c -> b t c", "sum"))
        logits = rearrange(hidden @ self.backbone_head.T, "b t v -> (b t) v").float()
        codes = rearrange(tokens[:, q:] % self.num_classes, "b (t q) -> (b t) q", q=q)
        nats = torch.zeros(codes.shape, device=codes.device)
        nats[:, 0] = F.cross_entropy(logits, codes[:, 0], reduction="none")
        if q > 1:
            # Frame t + 1 is a sequence of its own: the hidden state after frame t, then its codes
            # but the last. All frames are one batch.
            inside = torch.cat([hidden[:, :, None], embedded[:, 1:, :-1]], dim=2)
            kept = self.sample_frames(tokens, len(codes))
            inside = self.projection(rearrange(inside, "b t q c -> (b t) q c")[kept])
            # Autocast projects to bfloat16; the residual stream keeps the embedding's precision.
            # CUDA's attention fails on 65,536 rows or more (pytorch issue 146704).
            parts = inside.to(embedded.dtype).split(65535)
            inside = torch.cat([self.depth(part) for part in parts])
            logits = einsum(inside[:, 1:], self.depth_head, "n q c, q v c -> n q v").float()
            targets = codes[kept, 1:]
            depth_nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            # Scaled, so that the mean over all frames is that of training on all of them.
            nats[kept, 1:] = depth_nats.view_as(targets) * (len(codes) / len(targets))
        return rearrange(nats, "(b t) q -> b t q", b=len(tokens))

    def sample_frames(self, tokens: Tensor, count: int) -> Tensor | slice:
        """The frames whose depth is computed: in training a share of `count`, otherwise all."""
        if not self.training or self.depth_fraction == 1:
            return slice(None)
        # The batch is the seed, so that a resumed run draws as an uninterrupted one.
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        drawn = torch.randperm(count, generator=generator)[: math.ceil(self.depth_fraction * count)]
        return drawn.to(tokens.device)

    def decode_steps(self, cache: KVCache, replay: bool = True) -> list[DecodeStep]:
        steps, rows = super().decode_steps(cache, replay), len(cache.layers[0][0])
        if self.num_codebooks > 1:
            like = self.embedding.weight
            inner = KVCache(self.depth.config, rows, self.num_codebooks, like=like)
            steps.append(DecodeStep(self.depth, inner, replay))
        return steps

    def next_frame(
        self, hidden: Tensor, tokens: Tensor, steps: list[DecodeStep], sampler: Sampler
    ) -> tuple[Tensor, Tensor]:
        backbone, *depth = steps
        codes = [self.draw(hidden[:, -1] @ self.backbone_head.T, 0, sampler)]
        for step in depth:
            # The depth decoder starts anew in every frame, from the hidden state alone.
            step.cache.length = 0
            step(self.projection(hidden))
        for q in range(1, self.num_codebooks):
            inside = depth[0](self.projection(self.embedding(codes[-1])))
            codes.append(self.draw(inside[:, -1] @ self.depth_head[q - 1].T, q, sampler))
        frame = torch.cat(codes, dim=1)
        return frame, backbone(self.embed(frame))
