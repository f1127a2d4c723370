"""Step 5c, DelayLM: codebook q is shifted by q frames, and a step predicts Q codebooks at once.

    step        0    1    2    3    4          tokens of frame t are written t0 t1 t2; E is END
    codebook 0  00   10   20   E    E
    codebook 1  E    01   11   21   E          a position is the sum of a column
    codebook 2  E    E    02   12   22         and predicts the next column

MusicGen's delay pattern (arXiv 2306.05284, section 2.2): as cheap as one position a frame, and yet
code q of a frame is drawn after the codes before it. It is given the columns to its left, so also
codes of later frames, but not the other codes of its own column. The product over all tokens is a
likelihood of the same sequence as in the other models, in another order, so nats compare.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from nanomimi.decode import DecodeStep
from nanomimi.llama import KVCache, LlamaConfig
from nanomimi.lm import LanguageModel, Sampler


class DelayLM(LanguageModel):
    """Embedding, one Llama over columns, a head per codebook."""

    def __init__(self, config: LlamaConfig, *sizes: int) -> None:
        """`sizes` as in LanguageModel."""
        super().__init__(config, *sizes)
        shape = (self.num_codebooks, self.num_classes, config.n_embd)
        self.lm_head = nn.Parameter(torch.randn(shape) * 0.02)

    def num_positions(self, num_frames: int) -> int:
        return num_frames + self.num_codebooks - 1

    def delay(self, tokens: Tensor) -> Tensor:
        """(B, T * Q) -> columns (B, T + Q - 1, Q); END where there is no frame."""
        q = torch.arange(self.num_codebooks, device=tokens.device)
        ends, count = q * self.num_classes + self.codebook_size, tokens.shape[1] // len(q)
        columns = ends.repeat(len(tokens), self.num_positions(count), 1)
        for i in range(self.num_codebooks):
            columns[:, i : i + count, i] = tokens[:, i :: self.num_codebooks]
        return columns

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T * Q) -> (B, T, C): the columns that need no frame after these."""
        columns = self.delay(tokens)[:, : tokens.shape[1] // self.num_codebooks]
        return reduce(self.embedding(columns), "b t q c -> b t c", "sum")

    def forward(self, tokens: Tensor) -> Tensor:
        q, frames = self.num_codebooks, tokens.shape[1] // self.num_codebooks - 1
        columns = self.embedding(self.delay(self.corrupt(tokens))[:, :-1])
        hidden = self.backbone(reduce(columns, "b t q c -> b t c", "sum"))
        # Column t + q holds code q of frame t, and the position before it predicts it.
        hidden = torch.stack([hidden[:, i : i + frames] for i in range(q)])
        hidden = rearrange(hidden, "q b t c -> q (b t) c")
        logits = einsum(hidden, self.lm_head, "q n c, q v c -> q n v")
        codes = rearrange(tokens[:, q:] % self.num_classes, "b (t q) -> (q b t)", q=q)
        logits = rearrange(logits, "q n v -> (q n) v").float()
        nats = F.cross_entropy(logits, codes, reduction="none")
        return rearrange(nats, "(q b t) -> b t q", q=q, b=len(tokens))

    def decode_steps(self, cache: KVCache, replay: bool = True) -> list:
        """With the newest columns, which hold codes of frames that are not complete yet."""
        return [*super().decode_steps(cache, replay), []]

    def next_frame(
        self, hidden: Tensor, tokens: Tensor, steps: list, sampler: Sampler
    ) -> tuple[Tensor, Tensor]:
        backbone, newest = steps
        first = backbone.cache.length == tokens.shape[1] // self.num_codebooks  # after a prefill
        # The prompt's last frames fill a part of the first columns; the rest is drawn.
        known = self.delay(tokens)[:, backbone.cache.length :] if first else None
        for i in range(self.num_codebooks if first else 1):
            num_new = i + 1 if first else self.num_codebooks
            scores = [hidden[:, -1] @ self.lm_head[q].T for q in range(num_new)]
            column = [self.draw(logits, q, sampler) for q, logits in enumerate(scores)]
            column += [known[:, i, num_new:]] if num_new < self.num_codebooks else []
            newest.append(torch.cat(column, dim=1))
            hidden = backbone(reduce(self.embedding(newest[-1]), "b q c -> b 1 c", "sum"))
        del newest[: -self.num_codebooks]
        frame = torch.stack([column[:, q] for q, column in enumerate(newest)], dim=1)
        return frame, hidden
