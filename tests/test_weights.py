"""Weights from and for transformers. The oracle is tests/golden, which make_golden.py wrote."""

import fnmatch
import json
import shutil
from dataclasses import asdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import train as train_script
from nanomimi import checkpoint, weights
from nanomimi.config import run_script
from nanomimi.data import read_meta
from nanomimi.evaluate.__main__ import EvaluateConfig, evaluate
from nanomimi.llama import LlamaConfig, RopeScaling
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
    if request.param == "untied":
        shape["rope_scaling"] = RopeScaling(8.0, original_max_position_embeddings=4)
    model = {"arch": "flat", "num_codebooks": 3, "codebook_size": 15, "max_frames": 8}
    model |= {"llama": asdict(LlamaConfig(**shape)), "options": {"tied": request.param == "tied"}}
    lm = checkpoint.build(model)
    for parameter in lm.parameters():
        parameter.data.mul_(8)
    meta = read_meta(random_data)
    meta["splits"] = [meta["splits"]]
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
    resumed, again = checkpoint.load(tmp_path / "run")
    assert again["step"] == 4 and resumed.backbone.config == model.backbone.config


def test_training_starts_from_a_run(imported, random_data, tmp_path, monkeypatch, capsys):
    flags = FLAGS | dict(data=random_data, out=tmp_path / "run", num_codebooks=4, max_frames=6)
    train_main(monkeypatch, init_from=imported, lr=1e-9, **flags)
    model, run = checkpoint.load(tmp_path / "run")
    before = checkpoint.load(imported)[0].state_dict()
    assert run["step"] == 2 and model.max_frames == 6 and model.unseen == 2
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(init_from="{llama}", n_layer=3), "the flags change the model in"),
        (dict(init_from="{llama}", rope_theta=5), "the flags change the model in"),
        (dict(init_from="{run}", n_head=2), "the flags change the model in"),
        (dict(init_from="{run}", num_codebooks=3), "the flags change the model in"),
        (dict(init_from="{run}", tied=True), "the flags change the model in"),
        (dict(init_from="{run}", arch="hierarchical"), "does not go with --arch hierarchical"),
        (dict(init_from="{run}", data="{other}"), "--data has another codec than"),
        (dict(init_from="{other}/nowhere"), "it is no folder"),
        (dict(resume=True, out="{run}"), "use --init_from"),
    ],
)
def test_what_contradicts_the_weights_is_refused_in_one_line(
    words, message, imported, random_data, tmp_path, monkeypatch, capsys
):
    other = shutil.copytree(random_data, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps(meta | {"codec_sha256": "another"}))
    places = dict(llama=GOLDEN / "llama", run=imported, other=other)
    given = dict(data=random_data, out=tmp_path / "out", max_frames=6) | words
    given = {k: v.format(**places) if isinstance(v, str) else v for k, v in given.items()}
    switches = ["--resume"] if given.pop("resume", False) else []
    switches += ["--tied"] if given.pop("tied", False) else []
    with pytest.raises(SystemExit) as stop:
        train_main(monkeypatch, *switches, **given, device="cpu")
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and message in last, last


def entry(**entries: Any) -> Callable[[Path], None]:
    """Changes entries of config.json, or removes those that become None."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | entries
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = change(tensors.pop(name))
        tensors |= {} if changed is None else {name: changed.contiguous()}
        save_file(tensors, folder / "model.safetensors")

    return write


def with_bias(folder: Path) -> None:
    """A tensor that has no place: its numbers would be missing in the sums."""
    tensors = load_file(folder / "model.safetensors")
    bias = {Q_PROJ.replace("weight", "bias"): tensors[Q_PROJ][:, 0].clone()}
    save_file(tensors | bias, folder / "model.safetensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (entry(architectures=["MistralForCausalLM"]), "MistralForCausalLM"),
        (entry(architectures=None), "architectures None is not supported"),
        (entry(attention_bias=True), "attention_bias True"),
        (entry(mlp_bias=True), "mlp_bias True"),
        (entry(hidden_act="gelu"), "hidden_act 'gelu'"),
        (entry(sliding_window=4096), "sliding_window 4096"),
        (entry(quantization_config={"bits": 4}), "quantization_config {'bits': 4}"),
        (entry(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type 'yarn'"),
        (entry(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type 'linear'"),
        (entry(rope_scaling={"rope_type": "llama3", "factor": 2.0}), "low_freq_factor"),
        (entry(hidden_size=None), "hidden_size"),
        (entry(intermediate_size=32), "size mismatch for layers.0.mlp"),
        (lambda folder: (folder / "config.json").unlink(), "No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "JSONDecodeError"),
        (tensor(Q_PROJ, lambda old: None), '"layers.0.self_attn.q_proj.weight"'),
        (tensor(Q_PROJ, lambda old: old[:4]), "size mismatch for layers.0.self_attn.q_proj"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "SafetensorError"),
        (with_bias, "layers.0.self_attn.q_proj.bias"),
        (pickled, "pickled weights (.bin) are not read"),
    ],
)
def test_what_no_llama_of_ours_can_be_is_refused(change, message, tmp_path):
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
    change(folder)
    with pytest.raises(ValueError) as error:
        start_from(folder)
    text = str(error.value)
    assert message in text and str(folder) in text and "\n" not in text, text


def test_a_missing_shard_is_named(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "llama")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="No such file.*model-00002-of-00003.safetensors"):
        start_from(folder)


def test_older_configs_and_a_llama_without_a_head_are_read(tmp_path):
    """Llama 2 has no rope_theta and no head_dim; LlamaModel has shorter names of tensors."""
    folder = shutil.copytree(GOLDEN / "llama3", tmp_path / "llama")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    assert rope.pop("rope_theta") == 500000.0
    old = dict(rope_parameters=None, head_dim=None, rope_scaling=rope, rope_theta=500000.0)
    entry(**old, architectures=["LlamaModel"])(folder)
    tensors = {name.removeprefix("model."): t for name, t in tensors_of(folder).items()}
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors | {"layers.0.rotary_emb.inv_freq": torch.ones(2)}, folder / "model.safetensors")
    expected, changed = start_from(GOLDEN / "llama3").backbone, start_from(folder).backbone
    assert changed.config == expected.config
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, changed.state_dict()[name])
    entry(rope_theta=None, rope_scaling=None, num_key_value_heads=None)(folder)
    llama = read_model(str(folder))["llama"]
    assert llama["rope_theta"] == 10000.0 and llama["n_kv_head"] == llama["n_head"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("import {golden}/llama --codec {mimi} --out {out}/r", "tokenizer.json"),
        ("import {golden}/llama_mimi --codec tiny --out {out}/r", "15 codes per codebook, not 256"),
        ("import --out {out}/r", "config.json"),
        ("import {golden}/llama_mimi --codec {mimi} --out {run}", "File exists"),
        ("export --run {run} --out {run}", "File exists"),
        ("export --run {out} --out {out}/r", "is not a run"),
        ("export --run {hierarchical} --out {out}/r", "is not of --arch flat"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(
    words, message, imported, random_mimi, tmp_path, capsys
):
    lm = small_model("hierarchical", 3, 8)
    llama = asdict(lm.backbone.config)
    model = {"arch": "hierarchical", **SIZES, "llama": llama, "options": {"depth_n_head": 2}}
    (tmp_path / "h").mkdir()
    checkpoint.save(tmp_path / "h", 1, lm, None, {**checkpoint.read(imported), "model": model, "step": 1})
    places = dict(golden=GOLDEN, mimi=random_mimi, out=tmp_path, run=imported)
    with pytest.raises(SystemExit) as stop:
        run_main(*words.format(**places, hierarchical=tmp_path / "h").split())
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message in last and not (tmp_path / "r").exists(), last


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The hub is offline; returns its cache, which holds tests/golden/llama as a/llama."""
    snapshot = tmp_path / "cache" / "models--a--llama" / "snapshots" / ("0" * 40)
    shutil.copytree(GOLDEN / "llama", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_llama_that_was_downloaded_is_read_offline_by_its_name_on_the_hub(hub):
    expected = read_model(str(GOLDEN / "llama"))
    assert read_model("a/llama") == expected
    model = {"arch": "flat", **SIZES, "options": {}, **expected}
    lm, _ = start({"model": model}, "a/llama", CPU)
    for name, weight in start_from(GOLDEN / "llama").backbone.state_dict().items():
        assert torch.equal(weight, lm.backbone.state_dict()[name])


def test_pickled_weights_are_not_even_downloaded(monkeypatch):
    names = ["pytorch_model.bin", "model.safetensors", "tokenizer.json", "training.pt", "a.pkl"]
    taken = []

    def download(source: str, allow_patterns: list[str]) -> str:
        taken.extend(n for n in names if any(fnmatch.fnmatch(n, p) for p in allow_patterns))
        return str(GOLDEN / "llama")

    monkeypatch.setattr(weights, "snapshot_download", download)
    read_model("a/llama")
    assert taken == ["model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("error", [RepositoryNotFoundError, GatedRepoError, ConnectionError])
def test_what_the_hub_does_not_give_is_refused_in_one_line(error, monkeypatch):
    def download(source: str, allow_patterns: list[str]) -> str:
        response = {} if error is ConnectionError else {"response": requests.Response()}
        raise error("no\nsuch thing", **response)

    monkeypatch.setattr(weights, "snapshot_download", download)
    with pytest.raises(ValueError, match=f"a/b .*{error.__name__}: no such.*hf auth login") as got:
        read_model("a/b")
    assert "\n" not in str(got.value)


@pytest.mark.parametrize(
    "name, reason", [("a/b", "LocalEntryNotFoundError"), ("no/name/at/all", "HFValidationError")]
)
def test_a_name_that_is_not_cached_is_refused_offline(name, reason, hub):
    with pytest.raises(ValueError, match=f"{name} .*{reason}.*hf auth login") as error:
        read_model(name)
    assert "\n" not in str(error.value)
