"""Corruption of the input (train.py --corruption): other frames in place of some, for training.

In half of the windows, frames from elsewhere in the window, often of another voice, replace spans.
The targets stay. Why models so trained understand people better is not known (see RESULTS.md).
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
        return torch.stack([self.corrupt_window(window) for window in tokens])

    def corrupt_window(self, tokens: Tensor) -> Tensor:
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
        replaced = spans.to(tokens.device) & ~ends
        return rearrange(moved.where(replaced[:, None], frames), "t q -> (t q)")
