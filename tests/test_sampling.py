import pytest
import torch

from nanomimi.sampling import keep_top_k, keep_top_p, make_sampler

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(**settings) -> torch.Tensor:
    draws = make_sampler(**settings)(LOGITS.expand(20000, 4))
    return torch.bincount(draws, minlength=4) / len(draws)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [0.5, 0.3, 0.15, 0.05]),
        (dict(temperature=0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.6), [0.625, 0.375, 0, 0]),
        (dict(top_k=3, top_p=0.5), [1, 0, 0, 0]),
        (dict(temperature=0), [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_shaped_distribution(settings, expected):
    torch.testing.assert_close(
        shares(**settings), torch.tensor(expected).float(), atol=0.015, rtol=0
    )


def test_the_same_seed_draws_the_same():
    assert torch.equal(shares(), shares())


def test_filters_zero_and_never_reorder():
    probabilities = torch.softmax(torch.randn(50, 20), -1)
    for kept in (keep_top_k(probabilities, 5), keep_top_p(probabilities, 0.7)):
        assert torch.equal(kept[kept > 0], probabilities[kept > 0])
        smallest_kept = torch.where(kept > 0, kept, 2).amin(-1)
        assert (torch.where(kept > 0, 0, probabilities).amax(-1) <= smallest_kept).all()
    assert (keep_top_k(probabilities, 5) > 0).sum(-1).tolist() == [5] * 50
    kept = keep_top_p(probabilities, 0.7)
    assert (kept.sum(-1) >= 0.7 - 1e-6).all()
    without_smallest = kept.sum(-1) - torch.where(kept > 0, kept, 2).amin(-1)
    assert (without_smallest < 0.7).all()


def test_a_sampler_draws_with_its_settings_and_repeats_with_its_seed():
    logits = LOGITS.expand(50, 4)
    first, again, other = (make_sampler(1.0, top_k=3, seed=s)(logits) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.max() == 2
