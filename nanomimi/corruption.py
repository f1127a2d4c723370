"""Corruption (train.py --corruption): training hears spans of frames wrong.

A model that always hears well learns to trust the last word, and in a voice that it does not
understand, this word misleads it. So in half of the windows, spans of frames come from elsewhere in
the window, often in another voice. The targets stay right: what stands around a span must tell.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SPAN = 6  # frames: half a second, about a word


class Corruption(nn.Module):
    """tokens (B, T * Q) -> tokens (B, T * Q); as nn.Dropout, it does nothing in evaluation."""

    def __init__(self, share: float, num_codebooks: int, codebook_size: int) -> None:
        """`share`: of the frames of a corrupted window; overlapping spans make it a bit less."""
        super().__init__()
        self.share, self.num_codebooks, self.codebook_size = share, num_codebooks, codebook_size

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training or not self.share:
            return tokens
        return torch.stack([self.corrupt(window) for window in tokens])

    def corrupt(self, tokens: Tensor) -> Tensor:
        """(T * Q,) -> (T * Q,)"""
        # The window is the seed: a resumed run draws as an uninterrupted one, two processes as one.
        generator = torch.Generator().manual_seed(int(tokens.sum()))
        if torch.rand(1, generator=generator) < 0.5:
            return tokens
        frames = rearrange(tokens, "(t q) -> t q", q=self.num_codebooks)
        moved = frames.roll(int(torch.randint(len(frames), (), generator=generator)), dims=0)
        starts = torch.rand(1, len(frames), generator=generator) < self.share / SPAN
        spans = F.max_pool1d(starts.float(), SPAN, stride=1, padding=SPAN // 2)[0, :-1] > 0
        # A separator stays one, and none is added: it says where another voice may begin.
        ends = torch.maximum(frames, moved)[:, 0] == self.codebook_size
        wrong = spans.to(tokens.device) & ~ends
        return rearrange(moved.where(wrong[:, None], frames), "t q -> (t q)")
