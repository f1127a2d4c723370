"""Step 5b, HierarchicalLM: a backbone over frames and a depth decoder inside each (CSM, Sesame).

    tokens     END END END END | 17  5  3 99 | 21  5  8 40 | ...      one position a frame, summed
    backbone   state 0           state 1       state 2                each from all frames so far
    predicts                     17            21                     from the state before it
    depth                           5  3 99       5  8 40             from that state and the codes
                                                                      before it in its own frame

This is the rival that the paper compares with, on the blocks of FlatLM and with its face: the same
tokens, the same targets, the same factorisation, so nats compare. The state behind frame t - 1 is
all that frame t knows of the past; giving it the state behind frame t would let it read its answer.
CSM trains its depth decoder on every sixteenth frame to save memory; here it is trained on all.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor, nn

from nanomimi.llama import KVCache, Llama, LlamaConfig
from nanomimi.replay import Replay
from nanomimi.tokens import flatten


def csm_depth(config: LlamaConfig, **changes: int) -> LlamaConfig:
    """The depth decoder that CSM's proportions give this backbone, but for `changes`.

    CSM-1B: 16 layers, width 2048, 32 heads, hidden 8192; in the frame 4, 1024, 8 and 8192.
    """
    n_head = changes.get("n_head", max(1, config.n_head // 4))
    shape = {
        "n_layer": max(1, config.n_layer // 4),
        "n_head": n_head,
        "n_kv_head": max(1, n_head * config.n_kv_head // config.n_head),
        "n_embd": config.n_embd // 2,
    }
    try:
        return replace(config, **{**shape, **changes})
    except ValueError as error:
        raise ValueError(str(error).replace("--n_", "--depth_n_")) from None


class HierarchicalLM(nn.Module):
    """Embedding, a Llama over frames, a smaller Llama inside the frame, a head per codebook."""

    def __init__(
        self,
        config: LlamaConfig,
        depth: LlamaConfig,
        num_codebooks: int,
        codebook_size: int,
        max_frames: int,
    ) -> None:
        """`depth`: shape of the decoder inside the frame, which a single codebook does not need."""
        super().__init__()
        self.num_codebooks, self.codebook_size, self.max_frames = (
            num_codebooks,
            codebook_size,
            max_frames,
        )
        num_classes = codebook_size + 1
        self.embedding = nn.Embedding(num_codebooks * num_classes, config.n_embd)
        self.backbone = Llama(config)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.backbone_head = nn.Parameter(torch.randn(num_classes, config.n_embd) * 0.02)
        if num_codebooks > 1:
            self.projection = nn.Linear(config.n_embd, depth.n_embd, bias=False)
            nn.init.normal_(self.projection.weight, std=0.02)
            self.depth = Llama(depth)
            self.depth_head = nn.Parameter(
                torch.randn(num_codebooks - 1, num_classes, depth.n_embd) * 0.02
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, (T + 1) * Q) -> nats (B, T, Q) of every token after the first frame."""
        q = self.num_codebooks
        embedded = rearrange(self.embedding(tokens), "b (t q) c -> b t q c", q=q)
        states = self.backbone(reduce(embedded[:, :-1], "b t q c -> b t c", "sum"))
        logits = [rearrange(states @ self.backbone_head.T, "b t v -> (b t) 1 v")]
        if q > 1:
            # Frame t + 1 sees the state behind frame t, then its own codes but the last.
            inside = torch.cat([rearrange(states, "b t c -> b t 1 c"), embedded[:, 1:, :-1]], dim=2)
            inside = self.projection(rearrange(inside, "b t q c -> (b t) q c"))
            # Autocast projects to bfloat16, but what blocks add to keeps the embedding's precision.
            hidden = self.depth(inside.to(embedded.dtype))
            logits += [einsum(hidden[:, 1:], self.depth_head, "n q c, q v c -> n q v")]
        codes = rearrange(tokens[:, q:] % (self.codebook_size + 1), "b (t q) -> (b t q)", q=q)
        nats = F.cross_entropy(
            rearrange(torch.cat(logits, dim=1), "n q v -> (n q) v").float(), codes, reduction="none"
        )
        return rearrange(nats, "(b t q) -> b t q", q=q, b=len(tokens))

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        num_frames: int,
        sample: Callable[[Tensor], Tensor],
        num_samples: int = 1,
    ) -> Iterator[Tensor]:
        """Continue prompt, codes (B, Q, T), by up to `num_frames` frames (B, Q), one at a time.

        The prompt's first frame is usually the separator (tokens.separator), alone for
        unconditional samples. `sample` maps logits (B, V) to codes (B,). A row that draws END is
        finished: it is END from there on, and generation stops when all rows are. Beyond max_frames
        the newest half of the context is kept. With `num_samples` every row is continued as often,
        by neighbouring rows of the (B * num_samples, Q) frames, and prefilled once.
        """
        tokens = flatten(prompt, self.codebook_size)[:, -self.max_frames * self.num_codebooks :]
        # One frame more than the context, so that a prompt that fills it can be continued.
        positions = self.max_frames + 1
        cache = KVCache(self.backbone.config, len(tokens), positions, like=self.embedding.weight)
        state = self.backbone(self._frames(tokens), cache)
        cache.repeat(num_samples)
        tokens = repeat(tokens, "b n -> (b s) n", s=num_samples)
        state = repeat(state[:, -1:], "b n c -> (b s) n c", s=num_samples)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        step, inside = Replay(self.backbone, cache), None
        if self.num_codebooks > 1:
            inner = KVCache(self.depth.config, len(tokens), self.num_codebooks, like=state)
            inside = Replay(self.depth, inner)
        for _ in range(num_frames):
            if cache.length == cache.max_positions:
                keep = max(1, self.max_frames // 2) * self.num_codebooks
                tokens, cache.length = tokens[:, -keep:], 0
                state = self.backbone(self._frames(tokens), cache)
            frame, state = self._next_frame(state, step, inside, finished, sample)
            tokens = torch.cat([tokens, frame], dim=1)
            codes = frame % (self.codebook_size + 1)
            finished = codes[:, 0] == self.codebook_size
            yield codes
            if finished.all():
                return

    def _frames(self, tokens: Tensor) -> Tensor:
        """What the backbone sees of tokens (B, T * Q): (B, T, C), the sum over each frame."""
        return reduce(self.embedding(tokens), "b (t q) c -> b t c", "sum", q=self.num_codebooks)

    def _next_frame(
        self,
        state: Tensor,
        step: Replay,
        inside: Replay | None,
        finished: Tensor,
        sample: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """state (B, N, C), the newest last -> the next frame's tokens (B, Q), the state behind."""
        code = self._next_code(state[:, -1] @ self.backbone_head.T, 0, finished, sample)
        finished = finished | (code == self.codebook_size)
        tokens = [rearrange(code, "b -> b 1")]
        if inside is not None:
            # The depth decoder begins every frame anew, with the state alone.
            inside.cache.length = 0
            inside(self.projection(state[:, -1:]))
        for q in range(1, self.num_codebooks):
            hidden = inside(self.projection(self.embedding(tokens[-1])))
            code = self._next_code(hidden[:, -1] @ self.depth_head[q - 1].T, q, finished, sample)
            tokens.append(rearrange(code + q * (self.codebook_size + 1), "b -> b 1"))
        frame = torch.cat(tokens, dim=1)
        return frame, step(self._frames(frame))

    def _next_code(
        self, logits: Tensor, q: int, finished: Tensor, sample: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(B,) codes of codebook q. END is legal as the start of a frame only."""
        logits = logits.float()
        if q > 0:
            logits[:, self.codebook_size] = -torch.inf
        return torch.where(finished, self.codebook_size, sample(logits))
