"""python -m nanomimi.bench: its contenders compute the same thing, its tables are complete."""

import pytest
import torch

from nanomimi import bench as bench_module
from nanomimi.bench import BenchConfig, JointLM, Shape, bench, interleave
from nanomimi.flat import FlatLM
from nanomimi.llama import LlamaConfig
from nanomimi.tokens import flatten

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


def test_without_transformers_the_bench_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_module, "CPU", {})
    bench(BenchConfig(part="training", reference="hf", device="cpu"))
    assert "transformers is not installed" in capsys.readouterr().out
