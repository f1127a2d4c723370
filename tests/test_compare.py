"""The comparison's statistics against known answers, and its plan, run on models of no size."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomimi import DatasetWriter
from nanomimi import compare as compare_module
from nanomimi.compare import CompareConfig, Plan, compare
from nanomimi.config import parse
from nanomimi.evaluate.__main__ import EvaluateConfig, evaluate
from nanomimi.evaluate.contrast import contrast, holm
from train import TrainConfig, train

GROUPS = [[f"voice {a}", f"voice {b}"] for a in range(20) for b in range(20) if a != b]
NOISE = np.random.default_rng(0).normal(size=len(GROUPS))
NOISE = (NOISE - NOISE.mean()) / NOISE.std()


def evaluated(folder: Path, nats: float, d_prime: float) -> Path:
    """A run folder with that likelihood and, over its trials, exactly that d'."""
    folder.mkdir(parents=True)
    held_out = {"held_out": {"nats_per_frame": nats}}
    trials = {"all": {"groups": GROUPS, "d": (d_prime + NOISE)[:, None].tolist()}}
    (folder / "evaluation.json").write_text(json.dumps(held_out))
    (folder / "trials.json").write_text(json.dumps(trials))
    return folder


def arm(folder: Path, d_prime, nats: list[float], seeds: int = 3) -> list[list[Path]]:
    """Seeds whose curves are d_prime(nats), each at nats a little beside the others'. Nats fall."""
    return [
        [evaluated(folder / f"{s}-{x}", x + 0.01 * s, d_prime(x + 0.01 * s)) for x in nats]
        for s in range(seeds)
    ]


def test_models_on_one_curve_do_not_differ_however_far_they_got(tmp_path):
    line = lambda x: 3.0 - 0.2 * x
    first, second = arm(tmp_path / "a", line, [10, 8, 6]), arm(tmp_path / "b", line, [9, 7, 5])
    result = contrast(first, second, "all")
    assert result["difference"] == pytest.approx(0, abs=1e-9) and result["p"] > 0.9
    low, high = result["interval"]
    assert low <= 1e-9 and high >= -1e-9


def test_a_gap_at_equal_nats_is_found_with_its_sign(tmp_path):
    low, high = lambda x: 2.0 - 0.2 * x, lambda x: 2.5 - 0.2 * x
    first, second = arm(tmp_path / "a", high, [10, 8, 6]), arm(tmp_path / "b", low, [9, 7, 5])
    result = contrast(first, second, "all")
    assert result["difference"] == pytest.approx(0.5)
    assert 0 < result["interval"][0] < 0.5 < result["interval"][1] and result["p"] < 0.01
    assert contrast(second, first, "all")["difference"] == pytest.approx(-0.5)


def test_seeds_that_disagree_widen_the_interval(tmp_path):
    flat, offset = lambda x: 1.0, [0.5, -0.5, 0.5, -0.5]
    first = [
        [evaluated(tmp_path / f"a{s}-{x}", x, 1.0 + o) for x in (7, 5)] for s, o in enumerate(offset)
    ]
    result = contrast(first, arm(tmp_path / "b", flat, [7, 5], seeds=4), "all")
    low, high = result["interval"]
    assert low < -0.3 and high > 0.3 and result["p"] > 0.3


def test_models_after_the_least_nats_do_not_count(tmp_path):
    line = lambda x: 3.0 - 0.2 * x
    first, second = arm(tmp_path / "a", line, [10, 8, 6]), arm(tmp_path / "b", line, [9, 7, 5])
    for s, runs in enumerate(first):
        runs.append(evaluated(tmp_path / f"later-{s}", 8.0, 0.0))
    assert contrast(first, second, "all")["difference"] == pytest.approx(0, abs=1e-9)


def test_models_without_common_nats_are_not_compared(tmp_path):
    one = lambda x: 1.0
    result = contrast(arm(tmp_path / "a", one, [9, 8]), arm(tmp_path / "b", one, [6, 5]), "all")
    assert np.isnan(result["difference"]) and result["p"] == 1


def test_holms_correction():
    # Holm 1979, section 3: 3 x 0.01, 2 x 0.02, and never below the one before.
    adjusted = holm({"a": 0.03, "b": 0.01, "c": 0.02})
    assert adjusted == pytest.approx({"b": 0.03, "c": 0.04, "a": 0.04})
    assert holm({"a": 0.9, "b": 0.6}) == {"b": 1.0, "a": 1.0}


@pytest.fixture
def constant_data(random_codec, tmp_path) -> Path:
    """Code 0 alone. From random codes there is nothing to learn, so the least rate is the best."""
    with DatasetWriter(tmp_path / "constant", random_codec) as writer:
        for i in range(40):
            writer.add("val" if i % 4 == 0 else "train", torch.zeros(6, 9).long(), f"{i}", "one")
    return tmp_path / "constant"


def test_the_plan_is_run_once_and_resumed(
    random_data, constant_data, tmp_path, monkeypatch, capsys
):
    """In this process: the commands are parsed as the scripts parse them."""
    commands = []

    def execute(config, run, words):
        commands.append(words)
        name, *flags = words.removeprefix("-m ").split()
        small = "--max_frames 8 --n_layer 1 --batch_size 2 --device cpu"
        if name == "train.py":
            train(parse(TrainConfig, f"{' '.join(flags)} {small}".split()))
        else:
            assert name == "nanomimi.evaluate"
            evaluate(parse(EvaluateConfig, [*flags, "--device", "cpu"]))

    widths = {"F": (8, 16), "H": (8, 16), "D": (8, 16)}
    q = {name: compare_module.BY_Q[name] for name in ("F, Q = 1",)}
    plan = Plan((4e-3, 8e-3, 16e-3), widths, (2e8,), {**compare_module.H16, **q}, range(2), 1)
    monkeypatch.setattr(compare_module, "_execute", execute)
    monkeypatch.setitem(compare_module.PLANS, "small", plan)
    data = dict(data=(random_data,), tune_data=(constant_data,), out=tmp_path / "out")
    config = CompareConfig(**data, trials=5, listen=False, jobs=1)
    compare(config)
    text = (config.out / "tables.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    grid, seeds, tests = (part.splitlines()[2:] for part in text.strip().split("\n\n"))
    cells = [line.split(" | ") for line in grid]
    for name in "FHD":  # the least of each arm is marked
        own = [cell for cell in cells if cell[0] == f"| {name}"]
        marked = [cell for cell in own if "least" in cell[5]]
        assert len(own) == 2 and marked == [min(own, key=lambda cell: float(cell[4]))]
    assert [line.split(" | ")[:2] for line in seeds] == [
        ["| F", "2"], ["| H", "2"], ["| D", "2"], ["| H16", "2"], ["| F, Q = 1", "1"]
    ]
    assert [line.split(" | ")[0] for line in tests] == ["| F - H", "| F - H16", "| F - D"]
    trainings = [words for words in commands if words.startswith("train.py")]
    assert all("--dtype float32" in words and "--seed" in words for words in trainings)
    for words in trainings:
        flags = parse(TrainConfig, words.removeprefix("train.py ").split())
        assert flags.warmup_steps <= flags.max_steps / 5
    assert len({re.search("--out (\\S+)", words)[1] for words in trainings}) == len(trainings)
    sizes = []
    for name, arch in (("F", "flat"), ("H", "hierarchical"), ("D", "delay")):
        tuned = [words for words in trainings if str(constant_data) in words and arch in words]
        tried = sorted(float(re.search("--lr (\\S+)", words)[1]) for words in tuned)
        chosen = next(float(cell[2]) for cell in cells if cell[:2] == [f"| {name}", "8"])
        sizes.append(len(tried))
        assert tried[0] < chosen < tried[-1]
    assert min(sizes) >= 3 and max(sizes) > 3  # a grid whose best is at an edge has grown
    for picture in ("flops.svg", "consistency.svg"):
        assert "<svg" in (config.out / picture).read_text()
    count = len(commands)
    compare(config)
    assert len(commands) == count
    run = next(config.out.glob("F-*/evaluation.json")).parent
    (run / "evaluation.json").unlink()
    compare(config)
    assert len(commands) == count + 1 and (config.out / "tables.md").read_text() == text
