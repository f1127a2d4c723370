import math

import pytest
import torch

from nanomimi.llama import (
    Attention,
    KVCache,
    Llama,
    LlamaConfig,
    Positions,
    RMSNorm,
    RopeScaling,
    rope,
    rotate,
)

CONFIG = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40)


@pytest.fixture
def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(CONFIG).eval()


def test_attention_equals_an_explicit_softmax_over_grouped_heads():
    torch.manual_seed(0)
    attention, x = Attention(CONFIG, 0), torch.randn(1, 6, 32)
    cos, sin = rope(CONFIG, torch.arange(6))
    expected = torch.zeros(6, 32)
    for head in range(4):
        group = head // 2  # two query heads share a key-value head
        q = rotate(attention.q_proj(x)[0, :, 8 * head : 8 * head + 8], cos, sin)
        k = rotate(attention.k_proj(x)[0, :, 8 * group : 8 * group + 8], cos, sin)
        v = attention.v_proj(x)[0, :, 8 * group : 8 * group + 8]
        for i in range(6):
            weights = torch.softmax(
                torch.stack([q[i] @ k[j] for j in range(i + 1)]) / math.sqrt(8), dim=0
            )
            expected[i, 8 * head : 8 * head + 8] = sum(w * v[j] for j, w in enumerate(weights))
    torch.testing.assert_close(
        attention(x, Positions(torch.arange(6), cos, sin, None), None)[0],
        attention.o_proj(expected),
    )


def test_rms_norm_divides_by_the_root_mean_square():
    x = torch.randn(3, 16)
    norm = RMSNorm(16, eps=0.0)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))
    torch.testing.assert_close(norm(5 * x), norm(x))
    norm.weight.data *= 2
    torch.testing.assert_close(norm(x).square().mean(-1), 4 * torch.ones(3))


def test_rope_scores_depend_on_the_distance_alone():
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = rope(CONFIG, torch.arange(50))
    score = lambda i, j: rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])
    torch.testing.assert_close(score(10, 3), score(47, 40))
    assert not torch.isclose(score(10, 3), score(10, 4))


def test_rope_turns_each_pair_as_a_complex_number_turns():
    x, (cos, sin) = torch.randn(8), rope(CONFIG, torch.tensor([7]))
    angles = 7 * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4), angles)
    torch.testing.assert_close(rotate(x, cos[0], sin[0]), torch.cat([turned.real, turned.imag]))


def test_rope_scaling_keeps_fast_rotations_and_slows_slow_ones():
    shape = dict(n_layer=1, n_head=1, n_kv_head=1, n_embd=64, n_hidden=8, rope_theta=500000.0)
    # Position 1 turns by the frequency itself; the signed sines begin with -sin.
    frequencies = lambda config: -rope(config, torch.tensor([1]))[1][0, :32].asin()
    plain = frequencies(LlamaConfig(**shape))
    ratio = frequencies(LlamaConfig(**shape, rope_scaling=RopeScaling(factor=32.0))) / plain
    turns = 8192 * plain / (2 * math.pi)
    torch.testing.assert_close(ratio[turns > 4], torch.ones(int((turns > 4).sum())))
    torch.testing.assert_close(ratio[turns < 1], torch.full((int((turns < 1).sum()),), 1 / 32))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) and ((between > 1 / 32) & (between < 1)).all()


def test_no_gradient_flows_from_a_position_to_a_later_one(llama):
    x = torch.randn(1, 9, 32, requires_grad=True)
    llama(x)[0, 4].sum().backward()
    assert x.grad[0, :5].abs().sum(-1).min() > 0
    assert x.grad[0, 5:].abs().max() == 0


def test_a_change_shows_at_its_position_and_after_it_only(llama):
    x = torch.randn(1, 9, 32)
    changed = x.clone()
    changed[0, 5] += 1
    difference = (llama(x) - llama(changed)).abs().amax(-1)[0]
    assert difference[:5].max() == 0 and difference[5:].min() > 0


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [3, 1, 1, 4]])
def test_cached_hidden_states_equal_recomputed_ones(llama, pieces):
    x = torch.randn(2, 9, 32)
    cache = KVCache(CONFIG, batch_size=2, max_positions=12, like=x)
    cached = torch.cat([llama(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(cached, llama(x), atol=1e-5, rtol=1e-4)
    assert cache.length == 9


def test_weights_carry_hugging_faces_names():
    names = set(Llama(CONFIG).state_dict())
    assert names == {"norm.weight"} | {
        f"layers.{i}.{part}.weight"
        for i in range(2)
        for part in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }


@pytest.mark.parametrize("change", [dict(n_embd=30), dict(n_embd=36), dict(n_kv_head=3)])
def test_impossible_shapes_are_refused(change):
    with pytest.raises(ValueError, match="must be"):
        LlamaConfig(**{**dict(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, n_hidden=8), **change})
