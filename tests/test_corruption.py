"""What training hears wrong, and that nothing else does."""

import pytest
import torch

from nanomimi.checkpoint import MODELS
from nanomimi.corruption import SPAN, Corruption
from nanomimi.tokens import flatten, separator, unflatten
from tests.conftest import small_model

Q, END, FRAMES = 3, 7, 400


def windows(count: int = 40) -> torch.Tensor:
    """Codes (B, Q, T), with a separator every 50 frames."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, END, (count, Q, FRAMES), generator=generator)
    codes[:, :, ::50] = separator(Q, END)
    return codes


def test_spans_of_half_of_the_windows_come_from_elsewhere_in_the_window():
    codes = windows()
    heard = unflatten(Corruption(0.3, Q, END)(flatten(codes, END)), Q, END)
    changed = (heard != codes).any(dim=1)  # (B, T)
    corrupted = changed.any(dim=1)
    assert 12 <= corrupted.sum() <= 28  # of 40 fair coins, out of 3 standard deviations: 1 in 200
    share = changed[corrupted].float().mean().item()
    expected = 1 - (1 - 0.3 / SPAN) ** SPAN  # that one of SPAN places starts a span
    assert abs(share - expected) < 0.05
    for own, other, where in zip(codes[corrupted], heard[corrupted], changed[corrupted]):
        # One shift explains every frame that has changed.
        shifts = [s for s in range(FRAMES) if torch.equal(own.roll(s, 1)[:, where], other[:, where])]
        assert shifts
    assert torch.equal(heard == END, codes == END)  # separators stay, and none is added


def test_evaluation_and_a_share_of_zero_hear_everything_right():
    tokens = flatten(windows(8), END)
    assert torch.equal(Corruption(0.3, Q, END).eval()(tokens), tokens)
    assert torch.equal(Corruption(0.0, Q, END)(tokens), tokens)


def test_a_window_is_corrupted_alike_in_every_batch():
    tokens, corrupt = flatten(windows(8), END), Corruption(0.5, Q, END)
    alone = torch.cat([corrupt(row[None]) for row in tokens])
    assert torch.equal(corrupt(tokens), alone) and not torch.equal(alone, tokens)


@pytest.mark.parametrize("arch", MODELS)
def test_a_model_predicts_what_was_said_from_what_it_heard(arch):
    model, tokens = small_model(arch, num_codebooks=Q, max_frames=16), flatten(windows(2), END)
    heard, other = (row[: 17 * Q].expand(END + 1, -1) for row in tokens)
    right = model(heard)
    model.corrupt.forward = lambda _: heard
    for q in range(Q):  # of the last frame, the probabilities of all classes sum to one
        said, place = other.clone(), 16 * Q + q
        said[:, place] = torch.arange(END + 1) + q * (END + 1)
        nats = model(said)[:, -1, q]
        torch.testing.assert_close(nats.neg().exp().sum(), torch.tensor(1.0))
        own = heard[0, place] % (END + 1)
        torch.testing.assert_close(nats[own], right[own, -1, q])
