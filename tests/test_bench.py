"""python -m nanomimi.bench: what it counts and measures, and that its tables are complete."""

import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from nanomimi import bench
from nanomimi.bench import BenchConfig, interleave, joint_softmax, training_flops, training_step
from nanomimi.flat import FlatLM
from nanomimi.llama import Llama, LlamaConfig
from nanomimi.tokens import flatten
from tests.conftest import small_model

LLAMA = LlamaConfig(1, 2, 2, 16, 32)
TINY = ("cpu", "tiny", 2, False, LLAMA, 3, 7, 8)


def weights(part: torch.nn.Module) -> int:
    return sum(p.numel() for p in part.parameters() if p.ndim > 1)


def test_the_joint_softmax_costs_what_it_gives_to_other_codebooks():
    torch.manual_seed(0)
    flat, joint = FlatLM(LLAMA, 3, 7, 8), joint_softmax(LLAMA, 3, 7, 8, tied=False)
    state = flat.state_dict()
    joint.load_state_dict({**state, "lm_head": state["lm_head"].view(1, 24, 16)})
    tokens = flatten(torch.randint(0, 7, (2, 3, 5)), 7)
    logits = flat.backbone(flat.embedding(tokens[:, :-1]))[:, 2:] @ flat.head.flatten(0, 1).T
    shares = logits.softmax(-1).unflatten(-1, (3, 8)).sum(-1)  # (B, N, Q), what each codebook gets
    own = shares.unflatten(1, (4, 3)).diagonal(dim1=2, dim2=3)
    nats = joint(tokens)[:, 2:].view(2, 4, 3)  # from the second frame on
    torch.testing.assert_close(nats, flat(tokens) - own.log())


def test_rows_alternate_and_the_first_round_does_not_count(capsys):
    order = []

    def row(name: str, numbers: list[float]) -> Iterator[dict[str, float]]:
        for number in numbers:
            order.append(name)
            yield {"part": number}
        raise torch.OutOfMemoryError("too large")

    numbers = {"a": [1000, 1, 5, 2], "b": [1000, 9, 7, 8], "never": [], "late": [1000, 3, 4]}
    rows = {name: row(name, each) for name, each in numbers.items()}
    assert interleave(rows, 3) == {"a": {"part": 2}, "b": {"part": 8}}
    assert order == ["a", "b", "late"] * 3 + ["a", "b"]
    left_out = ["never is left out: too large", "late is left out: too large"]
    assert capsys.readouterr().out.splitlines() == left_out


@pytest.mark.parametrize("part", ["training", "generation"])
def test_every_model_has_its_row(part, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", [TINY])
    monkeypatch.setattr(bench, "resolve_dtype", lambda *_: torch.float32)
    bench.bench(BenchConfig(part=part, rounds=1, frames=2, device="cpu"))
    _, *tables = capsys.readouterr().out.strip().split("\n\n")
    names = ["FlatLM", *["joint_softmax"] * (part == "training"), "HierarchicalLM"]
    assert len(tables) == (1 if part == "training" else 2)  # batch sizes
    for title, *rows in (table.splitlines() for table in tables):
        assert title.startswith(f"{part}, tiny, ")
        assert [row.split()[0] for row in rows] == names
        assert rows[0].endswith(" 1 x time") and all("% " in row for row in rows)


@pytest.mark.parametrize("auto", ["float32", "bfloat16"])
def test_training_is_measured_in_the_precision_that_train_would_use(auto, monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", [TINY])
    monkeypatch.setattr(bench, "resolve_dtype", lambda *_: getattr(torch, auto))
    titles = [title for title, *_ in bench.tables(BenchConfig(), torch.device("cpu"))]
    measured = [title for title in titles if title.startswith("training")]
    assert measured == [f"training, tiny, batch 2, {auto}; ms a step"]


def test_without_transformers_the_bench_says_so_and_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(bench, "SHAPES", [TINY])
    bench.bench(BenchConfig(part="training", reference="hf", rounds=1, device="cpu"))
    out = capsys.readouterr().out
    assert "HuggingFace is left out: " in out and "FlatLM  " in out


def attention(part: Llama, squared_positions: int) -> int:
    """Multiply-adds of scores and of their use."""
    return 2 * squared_positions * part.config.n_embd * part.config.n_layer


def test_flops_are_six_per_weight_and_token_and_those_of_attention():
    model, n = small_model("flat", 3, max_frames=8), 8 * 3 + 2  # positions of a window of 8 frames
    heads = 8 * model.lm_head.numel()  # each head once a frame
    expected = 6 * (n * weights(model.backbone) + heads + attention(model.backbone, n**2))
    assert training_flops(model, torch.zeros(1, 9 * 3, dtype=torch.long)) == expected


def test_one_more_frame_takes_six_flops_per_weight_that_generating_it_reads():
    model, tokens = small_model("hierarchical", 3, max_frames=8), torch.zeros(1, 9).long()
    read = weights(model.backbone) + model.backbone_head.numel() + model.depth_head.numel()
    read += 3 * (weights(model.depth) + weights(model.projection))
    read += attention(model.backbone, 2**2 - 1**2) + attention(model.depth, 3**2)
    assert training_flops(model, tokens) - training_flops(model, tokens[:, 3:]) == 6 * read


def test_memory_is_that_of_weights_and_what_grows_with_the_batch():
    def gigabytes(make: partial, rows: int) -> float:
        tokens = torch.zeros(rows, 9 * 8, dtype=torch.long)
        return next(training_step(make, tokens, torch.ones(2, 2), False))["GB"]

    flat, joint = (partial(kind, LLAMA, 8, 255, 8, tied=True) for kind in (FlatLM, joint_softmax))
    one, two, four = (gigabytes(flat, rows) for rows in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    kept = 4 * 4 * sum(p.numel() for p in flat().parameters())  # gradients, AdamW's two moments
    assert 2 * one - two == pytest.approx(kept / 1e9, rel=0.1)
    scores = 71 * 2048 - 64 * 256  # all classes at every position; a codebook's at a target
    assert gigabytes(joint, 4) - four == pytest.approx(4 * 4 * scores / 1e9, rel=0.02)
