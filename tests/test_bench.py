"""python -m nanomimi.bench: its contenders compute the same thing, its tables are complete."""

from dataclasses import replace

import pytest
import torch

from nanomimi import bench as bench_module
from nanomimi.bench import BenchConfig, bench
from nanomimi.contenders import JointLM, Shape
from nanomimi.flat import FlatLM
from nanomimi.llama import LlamaConfig
from nanomimi.timing import interleave, peak_bytes, training_flops
from nanomimi.tokens import flatten
from tests.conftest import small_model

TINY = Shape(LlamaConfig(1, 2, 2, 16, 32), 3, 7, 8, 2)


def test_the_joint_softmax_costs_what_it_gives_to_other_codebooks():
    torch.manual_seed(0)
    flat = FlatLM(TINY.llama, 3, 7, 8)
    joint = JointLM(TINY.llama, 3, 7, 8)
    joint.load_state_dict(flat.state_dict())
    tokens = flatten(torch.randint(0, 7, (2, 3, 5)), 7)
    logits = flat.llama(flat.embedding(tokens[:, :-1]))[:, 2:] @ flat.head.flatten(0, 1).T
    shares = logits.softmax(-1).unflatten(-1, (3, 8)).sum(-1)  # (B, N, Q), what each codebook gets
    own = shares.unflatten(1, (4, 3)).diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(joint(tokens), flat(tokens) - own.log())


def test_turns_alternate_and_their_parts_are_medians():
    order = []

    def turn(name: str, seconds: list[float]):
        def work() -> dict[str, float]:
            order.append(name)
            return {"part": seconds[order.count(name) - 1]}

        return work

    warm = 1000.0  # the first round does not count
    turns = {"a": turn("a", [warm, 1, 5, 2]), "b": turn("b", [warm, 9, 7, 8])}
    assert interleave(turns, 3, "test") == {"a": {"part": 2}, "b": {"part": 8}}
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize("part", ["training", "generation"])
def test_every_contender_has_its_row(part, monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "CPU", {"tiny": TINY})
    bench(BenchConfig(part=part, rounds=1, frames=2, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    for name in ("flat", "hierarchical", *(["joint softmax"] if part == "training" else [])):
        rows = [line for line in lines if line.startswith(f"{name}, ")]
        assert len(rows) == 2
    first = next(line for line in lines if line.startswith("flat"))
    assert first.endswith("1.00") and "%" in first


def test_two_processes_have_their_efficiency(capfd):
    bench(BenchConfig(part="scaling", rounds=1, device="cpu"))
    lines = capfd.readouterr().out.splitlines()
    one, two = (next(line for line in lines if line.startswith(n)) for n in ("1 proc", "2 proc"))
    assert one.endswith("1.00") and "100%" in one and two.count("%") == 1


def test_without_transformers_the_bench_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_module, "CPU", {})
    bench(BenchConfig(part="training", reference="hf", device="cpu"))
    assert "transformers is not installed" in capsys.readouterr().out


def test_flops_are_six_per_weight_and_token_and_those_of_attention():
    model = small_model("flat", 3, max_frames=8)
    weights = sum(p.numel() for p in model.llama.parameters() if p.ndim > 1)
    tokens, width, layers = 8 * 3 + 2, 32, 2  # positions that a window of 8 frames computes
    heads = model.lm_head.numel() * 8  # each head once a frame
    attention = 2 * tokens**2 * width * layers  # scores and their use
    expected = 6 * (weights * tokens + heads + attention)
    counted = training_flops(model, torch.zeros(1, 9 * 3, dtype=torch.long))
    assert counted == pytest.approx(expected, rel=0.01)


def test_peak_memory_is_that_of_weights_moments_and_what_grows_with_the_batch():
    model = small_model("flat", 3, max_frames=8)
    one, two, four = (
        peak_bytes(model, torch.zeros(rows, 9 * 3, dtype=torch.long), torch.float32)
        for rows in (1, 2, 4)
    )
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert one - (two - one) == pytest.approx(3 * weights, rel=0.1)  # AdamW keeps two moments


def test_the_joint_softmax_needs_more_memory():
    models = [kind(replace(TINY.llama, n_layer=2), 8, 255, 8) for kind in (FlatLM, JointLM)]
    tokens = torch.zeros(4, 9 * 8, dtype=torch.long)
    flat, joint = (peak_bytes(model, tokens, torch.float32) for model in models)
    logits = 4 * 8 * 8 * 256 * 4  # bytes of one codebook's classes for every token
    assert joint - flat > 2 * 7 * logits
