"""Step 5, what all models share: one interface, one generation loop, one rule for END."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomimi.decode import DecodeStep
from nanomimi.llama import KVCache, Llama, LlamaConfig
from nanomimi.tokens import flatten

Sampler = Callable[[Tensor], Tensor]  # logits (B, V) -> codes (B,)


class LanguageModel(nn.Module):
    """An embedding of all tokens and a backbone: a Llama that runs along time. A model supplies

    forward(tokens (B, (T + 1) * Q)) -> nats (B, T, Q) of all but frame 0, given corrupt(tokens)
    embed(tokens (B, T * Q)) -> input of the backbone (B, num_positions(T), C)
    num_positions(T) -> positions that T frames take in the backbone
    next_frame(hidden (B, 1, C) after tokens (B, T * Q), tokens, steps, sampler)
        -> next frame (B, Q), hidden (B, 1, C) after it
    """

    OPTIONS: dict[str, type] = {}  # keyword arguments that only this model has

    def __init__(
        self, config: LlamaConfig, num_codebooks: int, codebook_size: int, max_frames: int
    ) -> None:
        """`config`: shape of the backbone; `max_frames`: the context of generation."""
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.num_classes, self.max_frames = codebook_size + 1, max_frames  # END is the last class
        self.embedding = nn.Embedding(num_codebooks * self.num_classes, config.n_embd)
        self.backbone = Llama(config)
        self.corrupt: nn.Module = nn.Identity()  # train.py sets another
        nn.init.normal_(self.embedding.weight, std=0.02)

    def decode_steps(self, cache: KVCache, replay: bool = True) -> list[DecodeStep]:
        """What next_frame steps through: the backbone, and other Llamas of the model."""
        return [DecodeStep(self.backbone, cache, replay)]

    def draw(self, logits: Tensor, q: int, sampler: Sampler) -> Tensor:
        """Logits (B, V) of codebook q -> tokens (B, 1). Only codebook 0 may draw END."""
        logits = logits.float()  # bfloat16 would merge neighbours and change the distribution
        if q > 0:
            logits[:, self.codebook_size] = -torch.inf
        return sampler(logits)[:, None] + q * self.num_classes

    @torch.inference_mode()
    def generate(
        self, prompt: Tensor, num_frames: int, sampler: Sampler, num_samples: int = 1,
        replay: bool = True, min_frames: int = 0,
    ) -> Iterator[Tensor]:
        """Continue prompt, codes (B, Q, T), by up to `num_frames` frames (B * num_samples, Q).

        The prompt's first frame is usually the separator; alone, it gives unconditional samples.
        Every row is continued `num_samples` times, in neighbouring rows. After `min_frames`, a row
        may draw END and is END from there on, until all rows have ended. `replay`: see DecodeStep.
        """
        tokens = flatten(prompt, self.codebook_size)[:, -self.max_frames * self.num_codebooks :]
        # One frame more than the context, so that a prompt that fills it can be continued.
        size = self.num_positions(self.max_frames + 1)
        cache = KVCache(self.backbone.config, len(tokens), size, like=self.embedding.weight)
        hidden = self.backbone(self.embed(tokens), cache)[:, -1:]
        cache.repeat(num_samples)
        tokens, hidden = (x.repeat_interleave(num_samples, dim=0) for x in (tokens, hidden))
        steps = self.decode_steps(cache, replay)
        ended = torch.zeros(len(tokens), 1, dtype=torch.bool, device=tokens.device)
        # END is forbidden, not cut off: so the draws of rows that would not end stay the same.
        samplers = sampler, lambda logits: sampler(F.pad(logits[:, :-1], (0, 1), value=-torch.inf))
        for i in range(num_frames):
            if cache.length == cache.max_positions:
                # RoPE has rotated every cached key for its position, so dropping the oldest frame
                # means a new prefill. Keeping the newest half makes that rare.
                keep = max(1, self.max_frames // 2) * self.num_codebooks
                tokens, cache.length = tokens[:, -keep:], 0
                hidden = self.backbone(self.embed(tokens), cache)[:, -1:]
            frame, hidden = self.next_frame(hidden, tokens, steps, samplers[i < min_frames])
            tokens = torch.cat([tokens, frame], dim=1)
            codes = frame % self.num_classes
            # Rows do not interact: an ended row goes on drawing, and END hides what it draws.
            ended = ended | (codes[:, :1] == self.codebook_size)
            yield codes.masked_fill(ended, self.codebook_size)
            if ended.all():
                return


def summarize(nats_per_codebook: Tensor, meta: dict) -> dict:
    """Mean nats (Q,) of a frame's tokens, in the units of all reports."""
    nats_per_frame, q = nats_per_codebook.sum().item(), len(nats_per_codebook)
    return {
        "nats_per_token": nats_per_frame / q,
        "nats_per_codebook": nats_per_codebook.tolist(),
        "nats_per_frame": nats_per_frame,
        "bits_per_second": nats_per_frame / math.log(2) * meta["frame_rate"],
        "codec_bits_per_second": q * math.log2(meta["codebook_size"]) * meta["frame_rate"],
    }
