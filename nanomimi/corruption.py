"""Corruption of the input (train.py --corruption): other tokens in place of some, for training.

In half of the windows, frames from elsewhere in the window, often of another voice, replace spans.
In half, entries of codebook 0, which are like phones, are exchanged for others of the window, the
same throughout. The targets stay. Why models so trained understand people better is not known.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SPAN = 6  # frames: half a second, about a word


class Corruption(nn.Module):
    """tokens (B, T * Q) -> tokens (B, T * Q); as nn.Dropout, it does nothing in evaluation."""

    def __init__(self, share: float, num_codebooks: int, codebook_size: int) -> None:
        """`share`: of a window's frames, a bit less as spans overlap, and of the entries."""
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
        frames = rearrange(tokens, "(t q) -> t q", q=self.num_codebooks)
        if torch.rand(1, generator=generator) < 0.5:
            moved = frames.roll(int(torch.randint(len(frames), (), generator=generator)), dims=0)
            starts = torch.rand(1, len(frames), generator=generator) < self.share / SPAN
            spans = F.max_pool1d(starts.float(), SPAN, stride=1, padding=SPAN // 2)[0, :-1] > 0
            # A separator stays one, and none is added: it says where another voice may begin.
            ends = torch.maximum(frames, moved)[:, 0] == self.codebook_size
            frames = moved.where((spans.to(frames.device) & ~ends)[:, None], frames)
        if torch.rand(1, generator=generator) < 0.5:
            # A new speaker's phones may have other entries than those of the voices in training.
            entries = torch.arange(self.codebook_size + 1, device=frames.device)
            others = frames[torch.randint(len(frames), entries.shape, generator=generator), 0]
            chosen = (torch.rand(entries.shape, generator=generator) < self.share).to(frames.device)
            chosen &= torch.maximum(entries, others) < self.codebook_size
            frames = torch.cat([others.where(chosen, entries)[frames[:, :1]], frames[:, 1:]], dim=1)
        return rearrange(frames, "t q -> (t q)")
