"""Step 5a, FlatLM: one Llama over all tokens (Llama-Mimi, arXiv 2509.14882).

    tokens     END END END END | 17  5  3 99 | 21  5  8 40 | ...      one position each
    predicts                     17  5  3 99   21  5  8 40            each from everything before it

The codebook of the next token is known from its position, so the head scores only the codebook_size
+ 1 classes of that codebook. The paper used one softmax over the classes of all codebooks; a model
that has learned their order gives the wrong ones no probability, and the two are then the same
distribution.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from nanomimi.llama import KVCache, Llama, LlamaConfig
from nanomimi.replay import Replay
from nanomimi.tokens import flatten


class FlatLM(nn.Module):
    """Embedding, one Llama, a head per codebook."""

    def __init__(
        self,
        config: LlamaConfig,
        num_codebooks: int,
        codebook_size: int,
        max_frames: int,
        tied: bool = False,
    ) -> None:
        """`max_frames`: the context of generation; `tied`: the head shares the embedding."""
        super().__init__()
        self.num_codebooks, self.codebook_size, self.max_frames = (
            num_codebooks,
            codebook_size,
            max_frames,
        )
        num_classes = codebook_size + 1
        self.embedding = nn.Embedding(num_codebooks * num_classes, config.n_embd)
        self.llama = Llama(config)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.lm_head = (
            None
            if tied
            else nn.Parameter(torch.randn(num_codebooks, num_classes, config.n_embd) * 0.02)
        )

    @property
    def head(self) -> Tensor:
        """(Q, V, C)"""
        if self.lm_head is not None:
            return self.lm_head
        return rearrange(self.embedding.weight, "(q v) c -> q v c", q=self.num_codebooks)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, (T + 1) * Q) -> nats (B, T, Q) of every token after the first frame."""
        q = self.num_codebooks
        hidden = self.llama(self.embedding(tokens[:, :-1]))
        hidden = rearrange(hidden[:, q - 1 :], "b (t q) c -> q (b t) c", q=q)
        logits = einsum(hidden, self.head, "q n c, q v c -> q n v")
        codes = rearrange(tokens[:, q:] % (self.codebook_size + 1), "b (t q) -> (q b t)", q=q)
        nats = F.cross_entropy(
            rearrange(logits, "q n v -> (q n) v").float(), codes, reduction="none"
        )
        return rearrange(nats, "(q b t) -> b t q", q=q, b=len(tokens))

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
        positions = (self.max_frames + 1) * self.num_codebooks
        cache = KVCache(self.llama.config, len(tokens), positions, like=self.embedding.weight)
        state = self.llama(self.embedding(tokens), cache)
        cache.repeat(num_samples)
        tokens = repeat(tokens, "b n -> (b s) n", s=num_samples)
        state = repeat(state[:, -1:], "b n c -> (b s) n c", s=num_samples)
        finished = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        step = Replay(self.llama, cache)
        for _ in range(num_frames):
            if cache.length == cache.max_positions:
                keep = max(1, self.max_frames // 2) * self.num_codebooks
                tokens, cache.length = tokens[:, -keep:], 0
                state = self.llama(self.embedding(tokens), cache)
            frame, state = self._next_frame(state, step, finished, sample)
            tokens = torch.cat([tokens, frame], dim=1)
            codes = frame % (self.codebook_size + 1)
            finished = codes[:, 0] == self.codebook_size
            yield codes
            if finished.all():
                return

    def _next_frame(
        self, state: Tensor, step: Replay, finished: Tensor, sample: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """state (B, N, C), the newest last -> the next frame's tokens (B, Q), the state behind."""
        tokens = []
        for q in range(self.num_codebooks):
            code = self._next_code(state[:, -1] @ self.head[q].T, q, finished, sample)
            finished = finished | (code == self.codebook_size)
            tokens.append(rearrange(code + q * (self.codebook_size + 1), "b -> b 1"))
            state = step(self.embedding(tokens[-1]))
        return torch.cat(tokens, dim=1), state

    def _next_code(
        self, logits: Tensor, q: int, finished: Tensor, sample: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """(B,) codes of codebook q. END is legal as the start of a frame only."""
        logits = logits.float()
        if q > 0:
            logits[:, self.codebook_size] = -torch.inf
        return torch.where(finished, self.codebook_size, sample(logits))
