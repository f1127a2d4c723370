import json
import math
import multiprocessing
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanomimi import checkpoint
from nanomimi.optimizer import make_optimizer
from tests.two_processes import CAN_FORK
from train import TrainConfig, describe, learning_rate, train

SMALL = dict(
    num_codebooks=3,
    max_frames=8,
    n_layer=2,
    n_head=2,
    n_embd=32,
    n_hidden=32,
    batch_size=4,
    max_steps=12,
    warmup_steps=2,
    eval_every=6,
    eval_windows=4,
    save_every=6,
    log_every=3,
    device="cpu",
    dtype="float32",
)


@pytest.fixture(params=list(checkpoint.MODELS))
def config(request, random_data, tmp_path) -> TrainConfig:
    return TrainConfig(data=(random_data,), out=tmp_path / "run", arch=request.param, **SMALL)


@pytest.fixture(scope="module", params=list(checkpoint.MODELS))
def finished(request, random_data, tmp_path_factory) -> TrainConfig:
    """A run of all its steps, for tests that do not change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    config = TrainConfig(data=(random_data,), out=out, arch=request.param, **SMALL)
    train(config)
    return config


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / f"model-{checkpoint.read(run)['step']:06d}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, monkeypatch):
    config = replace(config, corruption=0.5)
    whole = train(config)
    broken = replace(config, out=config.out.with_name("broken"))
    saves = []

    def fail_after_the_first_save(*args):
        saves.append(checkpoint_save(*args))
        raise KeyboardInterrupt

    checkpoint_save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", fail_after_the_first_save)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.setattr(checkpoint, "save", checkpoint_save)
    assert checkpoint.read(broken.out)["step"] == 6 and not same(
        weights(config.out), weights(broken.out)
    )
    assert train(replace(broken, resume=True)) == whole
    assert same(weights(config.out), weights(broken.out))
    steps = [
        [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (config.out, broken.out)
    ]
    assert steps[0] == steps[1] == [3, 6, 6, 9, 12, 12]


def test_kept_models_are_runs_of_their_step(config):
    train(replace(config, keep_every=4))
    assert {path.name for path in config.out.glob("step-*")} == {"step-4", "step-8", "step-12"}
    for step, folder in ((4, config.out / "step-4"), (12, config.out)):
        assert checkpoint.load(folder)[1]["step"] == step
    assert same(weights(config.out), weights(config.out / "step-12"))
    assert not same(weights(config.out), weights(config.out / "step-4"))


def train_as(rank: int, port: int, config: TrainConfig) -> None:
    """One of two processes, with the variables that torchrun sets on each of two machines."""
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    os.environ.update(where, RANK=str(rank), WORLD_SIZE="2")
    train(config)


@pytest.mark.parametrize("arch", checkpoint.MODELS)
def test_two_processes_train_as_one(arch, random_data, tmp_path):
    settings = dict(SMALL, arch=arch, grad_accum=2, corruption=0.5)
    config = TrainConfig(data=(random_data,), out=tmp_path / "one", **settings)
    two = replace(config, out=tmp_path / "two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("fork" if CAN_FORK else "spawn")
    pair = []
    for rank in (0, 1):
        pair.append(processes.Process(target=train_as, args=(rank, port, two), daemon=True))
        pair[-1].start()
    for process in pair:
        process.join(timeout=300)
    assert [process.exitcode for process in pair] == [0, 0]
    one = train(config)
    a, b = weights(config.out), weights(two.out)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)
    lines = [json.loads(line) for line in (two.out / "log.jsonl").read_text().splitlines()]
    assert abs(lines[-1]["validation"]["nats_per_token"] - one["nats_per_token"]) < 1e-4


def test_accumulated_micro_steps_equal_one_large_step(config):
    train(replace(config, max_steps=3))
    train(
        replace(config, out=config.out.with_name("micro"), max_steps=3, batch_size=2, grad_accum=2)
    )
    a, b = weights(config.out), weights(config.out.with_name("micro"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)


def test_training_learns_and_reports_in_the_stated_units(config, capsys):
    results = train(replace(config, max_steps=60, lr=3e-3))
    per_token = results["nats_per_token"]
    assert results["bits_per_second"] == pytest.approx(
        per_token * 3 / torch.tensor(2.0).log().item() * 12.5, rel=1e-5
    )
    assert results["codec_bits_per_second"] == pytest.approx(
        3 * torch.tensor(15.0).log2().item() * 12.5, rel=1e-5
    )
    lines = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.97 * math.log(16)  # separators can be learned even where codes are random
    shown = [line for line in capsys.readouterr().out.splitlines() if "nats/token" in line]
    assert len(shown) == 10 and shown[-1].startswith(f"step 60: {per_token:.3f} nats/token")
    assert all(line["tokens_per_second"] > 0 for line in lines[-3:] if "loss" in line)


def test_a_run_folder_holds_one_complete_checkpoint(finished):
    names = {path.name for path in finished.out.iterdir()}
    tensors = {f"{kind}-000012.safetensors" for kind in ("model", "optimizer")}
    assert names == {"log.jsonl", "run.json"} | tensors
    model, run = checkpoint.load(finished.out)
    meta = json.loads((finished.data[0] / "meta.json").read_text())
    assert run["step"] == 12 and run["data"]["codec"] == meta["codec"]
    assert same(model.state_dict(), weights(finished.out))


def test_damaged_weights_are_named(finished, tmp_path):
    run = shutil.copytree(finished.out, tmp_path / "run")
    path = run / "model-000012.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="model-000012.safetensors is damaged"):
        checkpoint.load(run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        checkpoint.load(run)


def test_a_run_is_neither_overwritten_nor_resumed_as_another(finished):
    with pytest.raises(ValueError, match="holds a run already"):
        train(finished)
    with pytest.raises(ValueError, match="the model in"):
        train(replace(finished, resume=True, n_layer=3))
    with pytest.raises(FileNotFoundError, match="is not a run"):
        train(replace(finished, resume=True, out=finished.out.with_name("nowhere")))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_warms_up_and_ends_at_its_minimum(schedule):
    config = TrainConfig(
        schedule=schedule, lr=1.0, warmup_steps=10, max_steps=110, min_lr=0.1, decay_fraction=0.2
    )
    rates = [learning_rate(step, config) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    if schedule == "wsd":
        assert rates[86] == pytest.approx(1.0) and rates[98] == pytest.approx(0.1 + 0.9 * 11 / 22)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_only_matrices_decay_and_only_those_of_layers_have_muon(config, kind):
    model = checkpoint.build(describe(config, {"codebook_size": 15}, torch.float32)["model"])
    groups = make_optimizer(model, kind, 1.0, 0.1).param_groups
    found = {id(p): (g["weight_decay"], "momentum" in g) for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        inside = re.search(r"layers\.\d+\.\w+\.\w+_proj", name) is not None
        assert found.pop(id(p)) == (0.0 if "norm" in name else 0.1, inside and kind == "muon"), name
    assert not found


def test_several_data_folders_are_trained_on_as_one(config):
    """Twice the same folder: a stream of twice the frames, both folders in run.json."""
    train(replace(config, data=config.data * 2, max_steps=2))
    run = checkpoint.read(config.out)
    assert run["config"]["data"] == [str(config.data[0])] * 2
    assert run["data"]["splits"][0] == run["data"]["splits"][1]


def test_flags_of_the_other_architecture_are_refused(config):
    if config.arch == "flat":
        with pytest.raises(ValueError, match="--depth_n_embd does not go with --arch flat"):
            train(replace(config, depth_n_embd=16))
    else:
        with pytest.raises(ValueError, match=f"--tied does not go with --arch {config.arch}"):
            train(replace(config, tied=True))
    assert not config.out.exists()


def test_depth_flags_shape_the_depth_decoder(random_data, tmp_path):
    shape = dict(depth_n_layer=2, depth_n_head=1, depth_n_hidden=24)
    flags = {**SMALL, **shape, "max_steps": 1, "arch": "hierarchical"}
    train(TrainConfig(data=(random_data,), out=tmp_path / "run", **flags))
    depth = checkpoint.load(tmp_path / "run")[0].depth.config
    assert (depth.n_layer, depth.n_head, depth.n_embd, depth.n_hidden) == (2, 1, 16, 24)


@pytest.mark.parametrize("shares", [(2.0, 2.0, 2.0), (1.0, 0.0, 0.0)])
def test_codebook_weights_weigh_the_loss(random_data, tmp_path, shares):
    plain = TrainConfig((random_data,), tmp_path / "plain", **SMALL | {"weight_decay": 0.0})
    weighted = replace(plain, out=tmp_path / "weighted", codebook_weights=shares)
    train(plain)
    train(weighted)
    a, b = weights(plain.out), weights(weighted.out)
    if len(set(shares)) == 1:  # their mean counts as one
        assert same(a, b)
    else:
        torch.manual_seed(weighted.seed)
        fresh = checkpoint.build(checkpoint.read(weighted.out)["model"]).state_dict()
        assert torch.equal(b["lm_head"][1:], fresh["lm_head"][1:])
        assert not torch.equal(b["lm_head"][0], fresh["lm_head"][0])


@pytest.mark.parametrize("shares", [(1.0, 1.0), (-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_codebook_weights_that_do_not_fit_are_refused(random_data, tmp_path, shares):
    config = TrainConfig((random_data,), tmp_path / "run", **SMALL, codebook_weights=shares)
    with pytest.raises(ValueError, match="--codebook_weights must be"):
        train(config)
