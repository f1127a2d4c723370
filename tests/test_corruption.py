"""Which frames of the input training replaces, and that evaluation replaces none."""

import pytest
import torch

from nanomimi.checkpoint import MODELS
from nanomimi.corruption import SPAN, Corruption
from nanomimi.tokens import flatten, separator, unflatten
from tests.conftest import small_model

Q, END, FRAMES = 3, 7, 400


def windows(count: int = 40, end: int = END) -> torch.Tensor:
    """Codes (B, Q, T), with a separator every 50 frames."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, end, (count, Q, FRAMES), generator=generator)
    codes[:, :, ::50] = separator(Q, end)
    return codes


def test_spans_of_half_of_the_windows_come_from_elsewhere_in_the_window():
    codes = windows()
    given = unflatten(Corruption(0.3, Q, END)(flatten(codes, END)), Q, END)
    assert torch.equal(given == END, codes == END)  # separators stay, and none is added
    codes, given = codes[:, 1:], given[:, 1:]  # codebook 0 also has other entries
    changed = (given != codes).any(dim=1)  # (B, T)
    corrupted = changed.any(dim=1)
    assert 12 <= corrupted.sum() <= 28  # 40 fair coins: 20 and 2.5 standard deviations
    share = changed[corrupted].float().mean().item()
    expected = 1 - (1 - 0.3 / SPAN) ** SPAN  # that one of SPAN places starts a span
    assert abs(share - expected) < 0.05
    for own, other, where in zip(codes[corrupted], given[corrupted], changed[corrupted]):
        # One shift explains every frame that has changed.
        moved = (own.roll(shift, 1) for shift in range(FRAMES))
        assert any(torch.equal(codes[:, where], other[:, where]) for codes in moved)


def test_in_half_of_the_windows_some_entries_of_codebook_0_are_others_throughout():
    size = 100
    codes = windows(80, size)
    given = unflatten(Corruption(0.3, Q, size)(flatten(codes, size)), Q, size)
    without_spans, shares = (given[:, 1:] == codes[:, 1:]).flatten(1).all(dim=1), []
    for own, other in zip(codes[without_spans, 0].tolist(), given[without_spans, 0].tolist()):
        pairs = set(zip(own, other))
        assert len(pairs) == len(set(own)) and set(other) <= set(own)
        assert all((a == size) == (b == size) for a, b in pairs)
        shares.append(sum(a != b for a, b in pairs) / len(pairs))
    exchanged = [share for share in shares if share]
    assert len(shares) >= 28 and 0.3 < len(exchanged) / len(shares) < 0.7  # 40 and 20 expected
    assert abs(sum(exchanged) / len(exchanged) - 0.3) < 0.04


def test_evaluation_and_a_share_of_zero_replace_nothing():
    tokens = flatten(windows(8), END)
    assert torch.equal(Corruption(0.3, Q, END).eval()(tokens), tokens)
    assert torch.equal(Corruption(0.0, Q, END)(tokens), tokens)


def test_a_window_is_corrupted_alike_in_every_batch():
    tokens, corrupt = flatten(windows(8), END), Corruption(0.5, Q, END)
    alone = torch.cat([corrupt(row[None]) for row in tokens])
    assert torch.equal(corrupt(tokens), alone) and not torch.equal(alone, tokens)


@pytest.mark.parametrize("arch", MODELS)
def test_the_targets_are_not_corrupted_and_the_input_is(arch):
    model, tokens = small_model(arch, num_codebooks=Q, max_frames=16), flatten(windows(2), END)
    given, other = (row[: 17 * Q].expand(END + 1, -1) for row in tokens)
    right = model(given)
    model.corrupt.forward = lambda _: given
    for q in range(Q):  # of the last frame, the probabilities of all classes sum to one
        targets, place = other.clone(), 16 * Q + q
        targets[:, place] = torch.arange(END + 1) + q * (END + 1)
        nats = model(targets)[:, -1, q]
        torch.testing.assert_close(nats.neg().exp().sum(), torch.tensor(1.0))
        own = given[0, place] % (END + 1)
        torch.testing.assert_close(nats[own], right[own, -1, q])
