"""The laws of every model in checkpoint.MODELS; a new model is tested as soon as it is listed."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nanomimi.checkpoint import MODELS
from nanomimi.delay import DelayLM
from nanomimi.llama import Block
from nanomimi.sampling import make_sampler
from nanomimi.tokens import flatten, separator
from tests.conftest import small_model

greedy = make_sampler(temperature=0)
END = 7


def start(batch: int = 1) -> torch.Tensor:
    return separator(3, END).expand(batch, 3, 1)


def random_codes(batch: int, frames: int) -> torch.Tensor:
    return torch.randint(0, END, (batch, 3, frames), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("arch", MODELS)
def test_a_fresh_model_starts_at_the_logarithm_of_the_number_of_classes(arch):
    torch.manual_seed(0)
    fresh = small_model(arch, num_codebooks=4, max_frames=8, n_embd=64)
    nats = fresh(flatten(torch.randint(0, END, (8, 4, 9)), END))
    assert nats.shape == (8, 8, 4)
    assert abs(nats.mean().item() - math.log(8)) < 0.05


def rank(model: nn.Module, t: int, q: int) -> int:
    """When code q of frame t is predicted; DelayLM predicts the codes of a column together."""
    return t + q if isinstance(model, DelayLM) else 3 * t + q


def in_order(model: nn.Module, frames: range) -> list[tuple[int, int]]:
    return sorted(itertools.product(frames, range(3)), key=lambda tq: (rank(model, *tq), tq[1]))


def test_no_token_informs_its_own_prediction_or_an_earlier_one(model):
    """And every token informs all later ones, in the model's order."""
    tokens = flatten(random_codes(1, 6), END)
    plain = model(tokens).detach()[0]
    for n in range(18):
        changed = tokens.clone()
        t, q = divmod(n, 3)
        changed[0, n] = q * 8 + (tokens[0, n] % 8 + 1) % 7
        informed = model(changed).detach()[0] != plain  # (T, Q), from the second frame on
        later = [[rank(model, i, j) > rank(model, t, q) for j in range(3)] for i in range(1, 6)]
        if n < getattr(model, "unseen", 0):
            assert not informed.any()
        else:  # and its own prediction, unless it is in the first frame
            expected = torch.tensor(later)
            if t > 0:
                expected[t - 1, q] = True
            assert torch.equal(informed, expected)


def likeliest(model: nn.Module, codes: torch.Tensor, frames: int) -> torch.Tensor:
    """Codes and their continuation by the likeliest code each, found by scoring all candidates."""
    start, end = codes.shape[2], codes.shape[2] + frames
    # DelayLM draws codes of two more frames while it completes the last one.
    codes = nn.functional.pad(codes, (0, frames + 2))
    for t, q in in_order(model, range(start, end + 2)):
        nats = []
        for candidate in range(END):
            codes[:, q, t] = candidate
            nats.append(model(flatten(codes, END))[:, t - 1, q])
        codes[:, q, t] = torch.stack(nats).argmin(dim=0)
    return codes[:, :, :end]


def without_end(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :END].argmax(-1)


@torch.no_grad()
def test_cached_generation_equals_recomputed_likelihood(model):
    prompt = torch.cat([start(2), random_codes(2, 2)], dim=2)
    frames = torch.stack(list(model.generate(prompt, 5, without_end)), dim=2)
    assert torch.equal(torch.cat([prompt, frames], dim=2), likeliest(model, prompt, 5))


@torch.no_grad()
def test_the_logits_of_generation_are_those_of_the_likelihood(model):
    seen, codes = [], random_codes(2, 8)
    order = in_order(model, range(2, 8))

    def forced(logits: torch.Tensor) -> torch.Tensor:
        t, q = order[len(seen)]
        seen.append(logits.log_softmax(-1))
        return codes[:, q, t]

    list(model.generate(codes[:, :, :2], 4, forced))
    nats = model(flatten(codes, END))
    assert len(seen) >= 12
    for (t, q), logits in zip(order, seen):
        chosen = -logits.gather(1, codes[:, q, t, None])[:, 0]
        expected = nats[:, t - 1, q]
        if q > 0:  # END has probability 0 there, and the others share its part
            ended = codes.clone()
            ended[:, q, t] = END
            expected = expected + (-model(flatten(ended, END))[:, t - 1, q].neg().exp()).log1p()
        torch.testing.assert_close(chosen, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_continues_past_the_context_with_its_newest_half(model):
    prompt = random_codes(1, 8)  # fills the context
    frames = torch.stack(list(model.generate(prompt, 12, without_end)), dim=2)
    everything = torch.cat([prompt, frames], dim=2)
    assert frames.shape == (1, 3, 12)
    # The cache holds max_frames + 1 = 9 frames: full after 9, it starts anew from the newest 4.
    assert torch.equal(everything[:, :, :9], likeliest(model, prompt, 1))
    assert torch.equal(everything[:, :, 5:14], likeliest(model, everything[:, :, 5:9], 5))


def test_rows_of_a_batch_do_not_disturb_each_other(model):
    prompts = random_codes(4, 3)
    together = torch.stack(list(model.generate(prompts, 4, without_end)), dim=2)
    for row in range(4):
        alone = torch.stack(list(model.generate(prompts[row : row + 1], 4, without_end)), dim=2)
        assert torch.equal(together[row], alone[0])


def test_samples_of_one_prompt_equal_samples_that_were_prefilled_one_by_one(model):
    prompts = random_codes(2, 8)  # fills the context, so generation goes past it

    def draw() -> Callable[[torch.Tensor], torch.Tensor]:
        sampler = make_sampler(temperature=3.0)
        return lambda logits: sampler(logits[:, :END])

    shared = list(model.generate(prompts, 12, draw(), num_samples=3))
    alone = list(model.generate(prompts.repeat_interleave(3, dim=0), 12, draw()))
    assert shared[0].shape == (6, 3) and len({tuple(row.tolist()) for row in shared[5]}) > 2
    assert torch.equal(torch.stack(shared), torch.stack(alone))


def test_end_ends_its_row_and_only_codebook_zero_draws_it(model):
    sampler = make_sampler(temperature=2.0)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        likely = logits.clone()
        likely[:, END] += logits[:, :END].amax(dim=1)  # where END is illegal, -inf stays
        return sampler(likely)

    frames = torch.stack(list(model.generate(start(64), 30, draw)), dim=2)
    ended = frames == END
    assert ended[:, 0].any(dim=1).float().mean() > 0.5
    assert torch.equal(ended[:, 0], ended[:, 1]) and torch.equal(ended[:, 0], ended[:, 2])
    assert not (ended[:, 0, :-1] & ~ended[:, 0, 1:]).any()


def test_no_row_ends_in_min_frames_and_rows_that_end_later_stay_the_same(model):
    draws = (model.generate(start(64), 12, make_sampler(), min_frames=n) for n in (0, 6))
    free, held = (torch.stack(list(frames), dim=2) for frames in draws)
    assert (free[:, 0, :6] == END).any() and not (held[:, 0, :6] == END).any()
    # The delay pattern draws codebook 0 of two frames ahead.
    assert (held[:, 0, 6:9] == END).any()
    later = ~(free[:, 0, :9] == END).any(dim=1)
    assert later.any() and torch.equal(free[later], held[later])


@pytest.mark.parametrize("drawn", [0, 5])
def test_what_an_ended_row_draws_never_shows_and_changes_no_other_row(model, drawn):
    """The first of two rows draws END and then `drawn` for ever, also past the context."""
    prompts, calls = random_codes(2, 3), itertools.count()

    def draw(logits: torch.Tensor) -> torch.Tensor:
        codes = without_end(logits)
        codes[0] = END if next(calls) == 0 else drawn
        return codes

    together = torch.stack(list(model.generate(prompts, 12, draw)), dim=2)
    alone = torch.stack(list(model.generate(prompts[1:], 12, without_end)), dim=2)
    assert (together[0] == END).all() and torch.equal(together[1:], alone)


def test_generation_stops_when_every_row_has_ended(model):
    ends = lambda logits: torch.full((len(logits),), END)
    frames = list(model.generate(start(3), 10, ends))
    assert len(frames) == 1 and (frames[0] == END).all()


@pytest.mark.parametrize("arch", MODELS)
def test_a_batch_is_learned_by_heart_and_generated(arch):
    torch.manual_seed(0)
    model = small_model(arch, 3, 12, n_kv_head=4, n_embd=64, n_hidden=128)
    # The first frames differ, so that every prompt has one right continuation.
    codes = torch.randint(0, END, (4, 3, 10))
    codes[:, 0, 0] = torch.arange(4)
    codes = torch.cat([start(4), codes, start(4)], dim=2)
    tokens, optimizer = flatten(codes, END), torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(tokens)[:, 1:].mean()  # what follows the first frame is certain
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    generated = torch.stack(list(model.generate(codes[:, :, :2], 20, greedy)), dim=2)
    assert torch.equal(generated, codes[:, :, 2:])


@pytest.mark.parametrize("arch", MODELS)
def test_a_compiled_model_has_the_nats_and_gradients_of_the_eager_one(arch):
    """Captured as one graph and differentiated ahead of time, but not compiled to machine code."""
    torch.manual_seed(0)
    model = small_model(arch, num_codebooks=3, max_frames=8, n_layer=1)
    tokens = flatten(random_codes(2, 6), END)

    def results() -> tuple[torch.Tensor, list[torch.Tensor]]:
        nats = model(tokens)
        return nats.detach(), torch.autograd.grad(nats.mean(), list(model.parameters()))

    eager = results()
    torch.compiler.reset()  # or sizes that other tests compiled for would make these symbolic
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(), eager, atol=1e-4, rtol=1e-3)


def test_the_residual_stream_stays_in_float32_under_autocast(model):
    seen = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(flatten(random_codes(1, 4), END))
    assert set(seen) == {torch.float32}
