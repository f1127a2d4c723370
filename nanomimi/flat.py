"""Step 5a, FlatLM: one Llama over all tokens (Llama-Mimi, arXiv 2509.14882).

    tokens     END END END END | 17  5  3 99 | 21  5  8 40 | ...      one position each
    predicts               17     5  3 99 21    5  8 40 ...           each the token after it

The position determines the codebook of the next token, so the softmax covers only that codebook's
codebook_size + 1 classes. The paper used one joint softmax over the classes of all codebooks. A
model that has learned the order of the codebooks gives the wrong ones no probability, and then both
are the same distribution.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from nanomimi.decode import DecodeStep
from nanomimi.llama import LlamaConfig
from nanomimi.lm import LanguageModel, Sampler


class FlatLM(LanguageModel):
    """Embedding, one Llama, a head per codebook."""

    OPTIONS = {"tied": bool, "start_positions": int}

    def __init__(
        self, config: LlamaConfig, *sizes: int, tied: bool = False, start_positions: int = 0
    ) -> None:
        """`sizes` as in LanguageModel; `tied`: the head shares the embedding's weights;
        `start_positions`: of the first frame, the model sees only so many last tokens (0: all).
        """
        super().__init__(config, *sizes)
        self.unseen = self.num_codebooks - (start_positions or self.num_codebooks)
        if self.unseen < 0:
            raise ValueError(f"--start_positions {start_positions} exceeds Q={self.num_codebooks}")
        shape = (self.num_codebooks, self.num_classes, config.n_embd)
        self.lm_head = None if tied else nn.Parameter(torch.randn(shape) * 0.02)

    @property
    def head(self) -> Tensor:
        """(Q, V, C)"""
        if self.lm_head is not None:
            return self.lm_head
        return rearrange(self.embedding.weight, "(q v) c -> q v c", q=self.num_codebooks)

    def num_positions(self, num_frames: int) -> int:
        return num_frames * self.num_codebooks - self.unseen

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens[:, self.unseen :])

    def forward(self, tokens: Tensor) -> Tensor:
        q = self.num_codebooks
        hidden = self.backbone(self.embed(self.corrupt(tokens)[:, :-1]))
        # The last token of the first frame predicts the first target. Sorted by codebook, one
        # batched product scores all positions and no class of another codebook is computed.
        hidden = rearrange(hidden[:, q - 1 - self.unseen :], "b (t q) c -> q (b t) c", q=q)
        logits = einsum(hidden, self.head, "q n c, q v c -> q n v")
        codes = rearrange(tokens[:, q:] % self.num_classes, "b (t q) -> (q b t)", q=q)
        # In float32: autocast's bfloat16 has too few digits for the log of a sum of exponentials.
        logits = rearrange(logits, "q n v -> (q n) v").float()
        nats = F.cross_entropy(logits, codes, reduction="none")
        return rearrange(nats, "(q b t) -> b t q", q=q, b=len(tokens))

    def next_frame(
        self, hidden: Tensor, tokens: Tensor, steps: list[DecodeStep], sampler: Sampler
    ) -> tuple[Tensor, Tensor]:
        (backbone,), frame = steps, []
        for q in range(self.num_codebooks):
            frame.append(self.draw(hidden[:, -1] @ self.head[q].T, q, sampler))
            hidden = backbone(self.embedding(frame[-1]))
        return torch.cat(frame, dim=1), hidden
