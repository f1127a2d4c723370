import math
from functools import partial

import torch
import torch.nn.functional as F

from nanomimi.flat import FlatLM
from nanomimi.llama import LlamaConfig
from nanomimi.sampling import sample
from nanomimi.tokens import flatten, separator

greedy = partial(sample, temperature=0)
END = 7


def start(batch: int = 1) -> torch.Tensor:
    return separator(3, END).expand(batch, 3, 1)


def random_codes(batch: int, frames: int) -> torch.Tensor:
    return torch.randint(0, END, (batch, 3, frames), generator=torch.Generator().manual_seed(3))


def test_nats_are_the_joint_softmax_restricted_to_the_codebook_whose_turn_it_is(model):
    tokens = flatten(random_codes(2, 5), END)
    hidden = model.llama(model.embedding(tokens))
    joint = hidden @ model.head.flatten(0, 1).T  # (B, N, Q * V)
    nats = model(tokens)
    for row in range(2):
        for n in range(3, 15):
            t, q = divmod(n, 3)
            own = joint[row, n - 1, q * 8 : q * 8 + 8]
            expected = F.cross_entropy(own, tokens[row, n] % 8)
            torch.testing.assert_close(nats[row, t - 1, q], expected)


def test_a_fresh_model_starts_at_the_logarithm_of_the_number_of_classes():
    torch.manual_seed(0)
    fresh = FlatLM(LlamaConfig(2, 4, 4, 64, 64), num_codebooks=4, codebook_size=99, max_frames=8)
    nats = fresh(flatten(torch.randint(0, 99, (8, 4, 9)), 99))
    assert nats.shape == (8, 8, 4)
    assert abs(nats.mean().item() - math.log(100)) < 0.1


def test_no_token_informs_its_own_prediction_or_an_earlier_one(model):
    tokens = flatten(random_codes(1, 6), END)
    plain = model(tokens).detach().flatten()
    for n in range(3, 18):
        changed = tokens.clone()
        q = n % 3
        changed[0, n] = q * 8 + (tokens[0, n] % 8 + 1) % 7
        difference = (model(changed).detach().flatten() - plain).abs()
        assert difference[: n - 3].max() == 0 if n > 3 else True
        assert difference[n - 3 :].min() > 0


def test_tied_and_untied_heads_have_the_same_face():
    config = LlamaConfig(1, 2, 2, 16, 16)
    tied, untied = (FlatLM(config, 3, 7, 8, tied=t) for t in (True, False))
    assert tied.head.shape == untied.head.shape == (3, 8, 16)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(untied) - count(tied) == 3 * 8 * 16
    tied(flatten(random_codes(1, 3), END)).sum().backward()
    assert tied.embedding.weight.grad is not None


def recompute(model: FlatLM, codes: torch.Tensor, frames: int) -> torch.Tensor:
    """Greedy continuation without a cache: the whole sequence anew for every token."""
    tokens = flatten(codes, END)
    for _ in range(frames * 3):
        q = tokens.shape[1] % 3
        logits = model.llama(model.embedding(tokens))[:, -1] @ model.head[q].T
        logits[:, END] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True) + q * 8], dim=1)
    return tokens


def without_end(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :END].argmax(-1)


@torch.no_grad()
def test_cached_generation_equals_recomputed_generation(model):
    prompt = torch.cat([start(2), random_codes(2, 2)], dim=2)
    frames = torch.stack(list(model.generate(prompt, 5, without_end)), dim=2)
    expected = recompute(model, prompt, 5)
    assert torch.equal(flatten(torch.cat([prompt, frames], dim=2), END), expected)


@torch.no_grad()
def test_generation_goes_on_past_the_context_with_its_newest_half(model):
    prompt = random_codes(1, 8)  # fills the context
    frames = torch.stack(list(model.generate(prompt, 12, without_end)), dim=2)
    everything = torch.cat([prompt, frames], dim=2)
    assert frames.shape == (1, 3, 12)
    # The cache holds max_frames + 1 = 9 frames: full after 9, it starts anew from the newest 4.
    assert torch.equal(flatten(everything[:, :, :9], END), recompute(model, prompt, 1))
    assert torch.equal(
        flatten(everything[:, :, 5:14], END), recompute(model, everything[:, :, 5:9], 5)
    )


def test_rows_of_a_batch_do_not_disturb_each_other(model):
    prompts = random_codes(4, 3)
    together = torch.stack(list(model.generate(prompts, 4, without_end)), dim=2)
    for row in range(4):
        alone = torch.stack(list(model.generate(prompts[row : row + 1], 4, without_end)), dim=2)
        assert torch.equal(together[row], alone[0])


def test_end_finishes_its_row_and_never_stands_inside_a_frame(model):
    with torch.no_grad():
        model.lm_head[:, END] = model.lm_head[:, :END].mean(1)  # END about as likely as any code
    draw = partial(sample, temperature=2.0, generator=torch.Generator().manual_seed(0))
    frames = torch.stack(list(model.generate(start(64), 30, draw)), dim=2)
    ended = frames == END
    assert ended[:, 0].any(dim=1).float().mean() > 0.5
    assert torch.equal(ended[:, 0], ended[:, 1]) and torch.equal(ended[:, 0], ended[:, 2])
    assert not (ended[:, 0, :-1] & ~ended[:, 0, 1:]).any()


def test_generation_stops_when_every_row_has_ended(model):
    ends = lambda logits: torch.full((len(logits),), END)
    frames = list(model.generate(start(3), 10, ends))
    assert len(frames) == 1 and (frames[0] == END).all()


def test_a_batch_is_overfitted_and_recited():
    torch.manual_seed(0)
    model = FlatLM(LlamaConfig(2, 4, 4, 64, 128), 3, END, 12)
    # The first frames differ, so that every recitation has one right continuation.
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
    recited = torch.stack(list(model.generate(codes[:, :, :2], 20, greedy)), dim=2)
    assert torch.equal(recited, codes[:, :, 2:])
