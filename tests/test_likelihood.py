from functools import partial

import numpy as np
import pytest
import torch

from nanomimi.checkpoint import MODELS
from nanomimi.data import TokenDataset
from nanomimi.evaluate.likelihood import Trial, d_prime, held_out, prefix_swap, score, summary
from nanomimi.evaluate.likelihood import windows
from nanomimi.tokens import flatten
from tests.conftest import small_model


@pytest.mark.parametrize("num_frames", [2, 8, 9, 10, 13, 14, 50])
@pytest.mark.parametrize("max_frames", [2, 3, 7, 8])
def test_windows_score_every_frame_once_after_enough_context(num_frames, max_frames):
    scored = []
    for start, first, stop in windows(num_frames, max_frames):
        assert 0 <= start < first < stop and stop - start <= max_frames + 1
        assert first - start >= min(first, max_frames // 2)
        scored += range(first, stop)
    assert scored == list(range(1, num_frames))


def test_pieces_are_scored_as_if_each_were_alone(model):
    pieces = [(torch.randint(0, 7, (3, n)), first) for n, first in ((4, 1), (9, 5), (2, 1), (6, 2))]
    for batch_size in (1, 3, 16):
        scored = list(score(model, batch_size, pieces))
        for (codes, first), nats in zip(pieces, scored, strict=True):
            with torch.no_grad():
                alone = model(flatten(codes[None], 7))[0, first - 1 :].double()
            torch.testing.assert_close(nats, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", MODELS)
def test_held_out_likelihood_is_the_mean_over_every_frame_of_the_split(arch, random_data):
    torch.manual_seed(0)
    data = TokenDataset([random_data], "val", 3)
    model = small_model(arch, 3, max_frames=8, codebook_size=15)
    results = [held_out(partial(score, model, size), data, 8) for size in (1, 5, 64)]
    with torch.no_grad():
        nats = []
        for start, first, stop in windows(data.num_frames, 8):  # each alone
            tokens = flatten(data.codes(start, stop - start)[None], 15)
            nats.append(model(tokens)[0, first - start - 1 :])
    expected = torch.cat(nats).mean(dim=0)
    for result in results:
        assert result["frames"] == data.num_frames - 1
        assert result["nats_per_codebook"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert result["nats_per_frame"] == pytest.approx(expected.sum().item(), abs=1e-5)
        assert result["bits_per_second"] == pytest.approx(expected.sum().item() / np.log(2) * 12.5)


def trials(count: int) -> list[Trial]:
    """Of four groups; the clips of a group hold its own code and differ in length."""
    rng = np.random.default_rng(0)

    def clip(code: int) -> torch.Tensor:
        return torch.full((2, int(rng.integers(3, 9))), code)

    pairs = [rng.choice(4, 2, replace=False) for _ in range(count)]
    return [
        Trial(((clip(a), clip(a)), (clip(b), clip(b))), (f"group {a}", f"group {b}"))
        for a, b in pairs
    ]


def familiar(own: float, other: float, pieces):
    """A model that gives the second codebook `own` nats where a frame is like the prefix's."""
    for codes, first in pieces:
        alike = (codes[1, first:] == codes[1, 1]).double()
        yield torch.stack([torch.ones_like(alike), alike * own + (1 - alike) * other], dim=1)


END = torch.full((2, 1), 99)


def swap(scorer, count: int, longest: int = 5) -> dict:
    chosen = trials(count)
    d = prefix_swap(scorer, chosen, longest, END)
    return summary(d, [trial.groups for trial in chosen], seed=0)


def test_a_prefix_swap_is_right_where_the_model_prefers_its_own_group():
    for own, other, accuracy in ((1.0, 1.5, 1.0), (1.5, 1.0, 0.0), (1.0, 1.0, 0.5)):
        result = swap(partial(familiar, own, other), 40)
        assert result["accuracy"] == accuracy and result["accuracy_interval"] == [accuracy] * 2
        assert result["margin_per_codebook"] == [0.0, 2 * (other - own)]
        assert result["margin"] == 2 * (other - own)
        assert result["trials"] == 40 and result["groups"] == 4


def test_a_suffix_is_compared_with_itself_at_the_same_place():
    seen = []

    def scorer(pieces):
        for codes, first in pieces:
            seen.append((codes, first))
            yield torch.zeros(codes.shape[1] - first, 2)

    swap(scorer, 10, 4)
    for i in range(0, 40, 4):
        assert len({(first, codes.shape[1]) for codes, first in seen[i : i + 4]}) == 1
        first = seen[i][1]
        suffixes = [codes[:, first:] for codes, _ in seen[i : i + 4]]
        prefixes = [codes[:, : first - 1] for codes, _ in seen[i : i + 4]]
        assert torch.equal(suffixes[0], suffixes[1]) and torch.equal(suffixes[2], suffixes[3])
        assert torch.equal(prefixes[0], prefixes[3]) and torch.equal(prefixes[1], prefixes[2])
        assert first <= 4 + 2 and suffixes[0].shape[1] <= 4
        # As in training, a separator stands before every utterance, and nowhere else.
        for codes, _ in seen[i : i + 4]:
            assert (codes == 99).all(dim=0).nonzero().flatten().tolist() == [0, first - 1]


def test_d_prime_is_the_mean_over_the_standard_deviation_whatever_the_scale():
    d = np.random.default_rng(0).normal(0.5, 2, size=100_000)
    assert d_prime(d) == pytest.approx(0.25, abs=0.01)
    assert d_prime(7 * d) == pytest.approx(d_prime(d)) and d_prime(-d) == pytest.approx(-d_prime(d))
    weights = np.array([[1] * 50_000 + [0] * 50_000, [2] * 100_000])
    assert d_prime(d, weights) == pytest.approx([d_prime(d[:50_000]), d_prime(d)])


def test_the_bootstrap_over_single_trials_is_the_binomial_interval():
    right = np.where(np.arange(400) % 4 > 0, 1.0, -1.0)[:, None]  # 75%
    groups = [(str(i),) for i in range(400)]
    result = summary(right, groups, seed=0)
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert result["accuracy_interval"] == pytest.approx([0.75 - error, 0.75 + error], abs=0.01)
    assert result == summary(right, groups, seed=0)


def test_the_bootstrap_resamples_groups_as_a_whole():
    # All trials of a group agree, so 400 trials are worth no more than 20.
    right = np.where(np.repeat(np.arange(20) % 4 > 0, 20), 1.0, -1.0)[:, None]
    result = summary(right, [(str(i // 20),) for i in range(400)], seed=0)
    error = 1.96 * np.sqrt(0.75 * 0.25 / 20)
    assert result["accuracy_interval"] == pytest.approx([0.75 - error, 0.75 + error], abs=0.05)


def test_the_interval_of_d_prime_covers_the_truth():
    """Voices differ in d, and trials of a voice in little: resampling trials would cover less."""
    rng, inside = np.random.default_rng(0), 0
    groups = [(str(i // 10),) for i in range(300)]
    for _ in range(60):
        d = (np.repeat(rng.normal(1, 1, 30), 10) + rng.normal(0, 0.3, 300))[:, None]
        low, high = summary(d, groups, seed=0)["d_prime_interval"]
        inside += low <= 1 / np.hypot(1, 0.3) <= high
    assert inside >= 51  # 95%, less four standard errors
