"""Step 2, codes <-> flat tokens: the idea of Llama-Mimi (arXiv 2509.14882).

Frame follows frame and, inside a frame, codebook follows codebook. A token says which codebook it
belongs to: token = q * (codebook_size + 1) + code. Two frames of three codebooks with 4 codes each,
so 5 classes with END:

    codes (Q=3, T=2)        tokens (N=6)
    q=0   1  3              frame 0        frame 1
    q=1   0  2       ->     1, 5+0, 10+3   3, 5+2, 10+1   =   1, 5, 13, 3, 7, 11
    q=2   3  1

Token ids do not depend on Q: dropping the last codebook drops every third token and changes no
other. END is the class after the last code of each codebook. A separator is a frame of Q ENDs. It
is the end of one utterance, the start of the next, and the prompt of unconditional generation.
"""

import torch
from einops import rearrange
from torch import Tensor


def flatten(codes: Tensor, codebook_size: int) -> Tensor:
    """codes (B, Q, T), 0..codebook_size where codebook_size is END -> tokens (B, T * Q) int64."""
    if codes.ndim != 3:
        raise ValueError(f"codes must have the shape (B, Q, T); got {tuple(codes.shape)}")
    if codes.numel() and not 0 <= codes.min() <= codes.max() <= codebook_size:
        raise ValueError(
            f"codes must lie in 0..{codebook_size}; got {int(codes.min())}..{int(codes.max())}"
        )
    tokens = codes.long() + _offsets(codes.shape[1], codebook_size, codes.device)
    return rearrange(tokens, "b q t -> b (t q)")


def unflatten(tokens: Tensor, num_codebooks: int, codebook_size: int) -> Tensor:
    """tokens (B, T * Q) -> codes (B, Q, T); the inverse of flatten.

    Raises ValueError where the tokens are not whole frames with their codebooks in order.
    """
    if tokens.ndim != 2 or tokens.shape[1] % num_codebooks:
        raise ValueError(
            f"tokens must have the shape (B, T * {num_codebooks}); got {tuple(tokens.shape)}"
        )
    codes = rearrange(tokens, "b (t q) -> b q t", q=num_codebooks)
    codes = codes - _offsets(num_codebooks, codebook_size, tokens.device)
    if codes.numel() and not 0 <= codes.min() <= codes.max() <= codebook_size:
        raise ValueError(
            f"the tokens do not start at a frame, or do not have {num_codebooks} codebooks"
        )
    return codes


def separator(num_codebooks: int, codebook_size: int) -> Tensor:
    """The separator frame as codes (Q, 1), all END."""
    return torch.full((num_codebooks, 1), codebook_size)


def trim_at_end(codes: Tensor, codebook_size: int) -> Tensor:
    """codes (Q, T) before the first END of codebook 0; all of them where there is none."""
    ends = (codes[0] == codebook_size).nonzero()
    return codes[:, : int(ends[0])] if len(ends) else codes


def _offsets(num_codebooks: int, codebook_size: int, device: torch.device) -> Tensor:
    """(Q, 1): the first token id of every codebook."""
    return rearrange(torch.arange(num_codebooks, device=device) * (codebook_size + 1), "q -> q 1")
