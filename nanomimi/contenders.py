"""Whom the bench lets compete, and at which shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM, csm_depth
from nanomimi.llama import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """A model and its batch; a window is max_frames + 1 frames."""

    llama: LlamaConfig
    num_codebooks: int
    codebook_size: int
    max_frames: int
    batch_size: int
    tied: bool = False

    @property
    def tokens(self) -> tuple[int, int, int]:
        """What models are told besides their Llama."""
        return self.num_codebooks, self.codebook_size, self.max_frames

    @property
    def millions(self) -> str:
        """Parameters of the flat model."""
        with torch.device("meta"):
            model = FlatLM(self.llama, *self.tokens, self.tied)
        return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M"


CPU = {
    "default": Shape(LlamaConfig(4, 4, 4, 192, 512), 4, 256, 128, 4),
    "A": Shape(LlamaConfig(6, 6, 6, 384, 1024), 4, 2048, 128, 2, tied=True),
    "B": Shape(LlamaConfig(6, 6, 2, 384, 1024), 8, 2048, 64, 2, tied=True),
}
GPU = {
    "124M": Shape(LlamaConfig(12, 12, 12, 768, 2048), 4, 2048, 256, 16),
    "1.2B": Shape(LlamaConfig(16, 32, 8, 2048, 8192, 500000.0), 4, 2048, 256, 8),
}


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
                tie_word_embeddings=shape.tied,
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


def contenders(shape: Shape, reference: str) -> dict[str, Callable[[], nn.Module]]:
    """What makes each model; `reference` "hf" adds Hugging Face's."""
    models: dict[str, Callable[[], nn.Module]] = {
        "flat": lambda: FlatLM(shape.llama, *shape.tokens, shape.tied),
        "hierarchical": lambda: HierarchicalLM(shape.llama, csm_depth(shape.llama), *shape.tokens),
        "joint softmax": lambda: JointLM(shape.llama, *shape.tokens, shape.tied),
    }
    return {**models, "Hugging Face": lambda: HuggingFace(shape)} if reference == "hf" else models
