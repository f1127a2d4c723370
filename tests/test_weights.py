"""Weights from and for transformers. The oracle is tests/golden, which make_golden.py wrote."""

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import train as train_script
from nanomimi import checkpoint
from nanomimi.config import run_script
from nanomimi.data import read_meta
from nanomimi.evaluate.__main__ import EvaluateConfig, evaluate
from nanomimi.lm import LanguageModel
from nanomimi.tokens import flatten, separator
from nanomimi.weights import WeightsConfig, main, read_model, start
from sample import SampleConfig, sample
from tests.conftest import small_model
from train import TrainConfig

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
SIZES = dict(num_codebooks=3, codebook_size=7, max_frames=8)


def start_from(source: Path, arch: str = "flat", **changes: Any) -> LanguageModel:
    model = {"arch": arch, **SIZES, "options": {}, **read_model(str(source)), **changes}
    return start({"model": model}, str(source), CPU)[0]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("model*.safetensors")
    return {name: t.float() for file in files for name, t in load_file(file).items()}


@torch.no_grad()
def logits_of(model: LanguageModel, folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """With the folder's embedding and head around the backbone of the model."""
    tensors = tensors_of(folder)
    embedding = tensors["model.embed_tokens.weight"]
    return model.backbone(embedding[tokens]) @ tensors.get("lm_head.weight", embedding).T


@pytest.mark.parametrize("arch", checkpoint.MODELS)
@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_a_llama_has_the_logits_of_transformers(name, arch):
    """GQA with a head_dim of its own; Llama-3 scaling, tied embeddings and three files."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    logits = logits_of(start_from(GOLDEN / name, arch), GOLDEN / name, expected["tokens"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=1e-4)


def run_main(*words: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["weights.py", *map(str, words)])
        run_script(WeightsConfig, main)


@pytest.fixture(scope="module")
def imported(random_mimi, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "run"
    run_main("import", GOLDEN / "llama_mimi", "--codec", random_mimi, "--out", out)
    return out


def restricted_logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (Q, T) of the golden prompt; transformers' logits (T, Q, V) of every codebook's turn."""
    added = json.loads((GOLDEN / "llama_mimi/tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    names = {token["id"]: token["content"] for token in added}
    expected = load_file(GOLDEN / "llama_mimi" / "expected.safetensors")
    heard = [names[int(i)] for i in expected["tokens"][0]]
    assert heard[:2] == ["<|begin_of_text|>", "<audio>"]
    codes = torch.tensor([int(name[1:].split("_")[0]) for name in heard[2:]])
    rows = [[ids[f"<{c}_{q}>"] for c in range(15)] + [ids["</audio>"]] for q in range(4)]
    # Position 1 is <audio>, which predicts codebook 0 of the first frame.
    logits = [expected["logits"][0, 1 + n, rows[n % 4]] for n in range(len(codes))]
    return codes.view(-1, 4).T, torch.stack(logits).view(-1, 4, 16)


@torch.no_grad()
def test_an_imported_llama_mimi_has_the_logits_of_transformers_for_the_same_prompt(imported):
    model, _ = checkpoint.load(imported)
    codes, expected = restricted_logits()
    start, seen = separator(4, 15), []

    def forced(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.clone())
        return codes.T.flatten()[len(seen) - 1].view(1)

    assert len(list(model.generate(start[None], codes.shape[1], forced))) == codes.shape[1]
    drawn = torch.cat(seen).view(-1, 4, 16)
    torch.testing.assert_close(drawn[..., :15], expected[..., :15], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn[:, 0, 15], expected[:, 0, 15], atol=1e-4, rtol=1e-4)
    nats = model(flatten(torch.cat([start, codes], dim=1)[None], 15))[0]  # (T, Q)
    right = -expected.log_softmax(-1).gather(2, codes.T[..., None])[..., 0]
    torch.testing.assert_close(nats, right, atol=1e-4, rtol=1e-4)


def test_an_imported_run_keeps_its_dtype_and_is_used_as_any_other(imported, random_data, tmp_path):
    stored = load_file(imported / "model-000000.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    flags = dict(num_samples=2, seconds=1, device="cpu")
    assert len(sample(SampleConfig(run=imported, out=tmp_path, **flags))) == 2
    results = evaluate(EvaluateConfig(run=imported, data=(random_data,), trials=2, device="cpu"))
    assert results["held_out"]["frames"] > 100
    with pytest.raises(FileNotFoundError, match="llama_mimi is no data folder"):
        evaluate(EvaluateConfig(run=imported, device="cpu"))


def test_there_must_be_room_for_both_tokens_of_the_start():
    with pytest.raises(ValueError, match="--start_positions 2 exceeds"):
        small_model("flat", num_codebooks=1, max_frames=8, options={"start_positions": 2})


@pytest.fixture(params=["untied", "tied"])
def run_folder(request, random_data, tmp_path) -> Path:
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, n_hidden=24)
    model = {"arch": "flat", "num_codebooks": 3, "codebook_size": 15, "max_frames": 8}
    model |= {"llama": shape, "options": {"tied": request.param == "tied"}}
    lm = checkpoint.build(model)
    for parameter in lm.parameters():
        parameter.data.mul_(8)
    meta = read_meta(random_data)
    (tmp_path / "run").mkdir()
    run = {"model": model, "config": {"data": [str(random_data)]}, "data": meta}
    checkpoint.save(tmp_path / "run", 1, lm, None, run)
    return tmp_path / "run"


@torch.no_grad()
def test_an_exported_run_read_back_has_the_same_logits(run_folder, tmp_path):
    run_main("export", "--run", run_folder, "--out", tmp_path / "hf")
    lm, _ = checkpoint.load(run_folder)
    tokens = flatten(torch.randint(0, 15, (2, 3, 7)), 15)
    logits = logits_of(start_from(tmp_path / "hf"), tmp_path / "hf", tokens[:, :-1])
    rows = logits[:, 2:].unflatten(-1, (3, 16))  # (B, N, Q, V)
    turns = torch.stack([rows[:, n, n % 3] for n in range(rows.shape[1])], dim=1)
    nats = turns.log_softmax(-1).gather(2, (tokens[:, 3:] % 16)[..., None])[..., 0]
    torch.testing.assert_close(-nats.view(2, 6, 3), lm(tokens), atol=1e-5, rtol=1e-5)
    ends = [json.loads((tmp_path / "hf" / f"{name}config.json").read_text())["eos_token_id"]
            for name in ("", "generation_")]  # fmt: skip
    assert ends == [15, 15]


FLAGS = dict(num_codebooks=3, max_frames=8, max_steps=2, eval_windows=4, warmup_steps=1)
FLAGS |= dict(device="cpu", dtype="float32")


def train_main(patch: pytest.MonkeyPatch, *words: object, **flags: object) -> None:
    given = [f"--{key}={value}" for key, value in flags.items()]
    patch.setattr("sys.argv", ["train.py", *map(str, words), *given])
    run_script(TrainConfig, train_script.main)


@pytest.mark.parametrize("arch", checkpoint.MODELS)
def test_training_starts_from_a_llama_whose_shape_replaces_the_flags(
    arch, random_data, tmp_path, monkeypatch, capsys
):
    flags = FLAGS | dict(data=random_data, out=tmp_path / "run", arch=arch)
    llama3 = GOLDEN / "llama3"
    train_main(monkeypatch, init_from=llama3, n_layer=2, **flags)  # the same value is no change
    assert "the backbone, not its text embeddings and head" in capsys.readouterr().out
    model, run = checkpoint.load(tmp_path / "run")
    assert model.backbone.config == start_from(llama3).backbone.config
    assert run["model"]["llama"] == read_model(str(llama3))["llama"]
    train_main(monkeypatch, "--resume", out=tmp_path / "run", max_steps=4)
    train_main(monkeypatch, init_from=llama3, **{**flags, "out": tmp_path / "whole", "max_steps": 4})
    resumed, whole = (tmp_path / name / "model-000004.safetensors" for name in ("run", "whole"))
    assert resumed.exists() and whole.exists()


def test_training_starts_from_a_run(imported, random_data, tmp_path, monkeypatch, capsys):
    flags = FLAGS | dict(data=random_data, out=tmp_path / "run", num_codebooks=4, max_frames=6)
    train_main(monkeypatch, init_from=imported, lr=1e-9, **flags)
    model, run = checkpoint.load(tmp_path / "run")
    before = checkpoint.load(imported)[0].state_dict()
    assert run["step"] == 2 and model.max_frames == 6 and model.unseen == 2
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)
