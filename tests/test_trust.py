"""A wrong input never becomes a wrong number, and a run survives crashes and divergence."""

import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomimi import TokenDataset, checkpoint
from nanomimi.audio import read_audio, write_wav
from tests.conftest import tone
from tests.test_train import SMALL
from train import TrainConfig, train


@pytest.fixture
def config(random_data, tmp_path) -> TrainConfig:
    return TrainConfig(data=(random_data,), out=tmp_path / "run", **SMALL)


@pytest.fixture(scope="module")
def finished(random_data, tmp_path_factory) -> TrainConfig:
    config = TrainConfig(data=(random_data,), out=tmp_path_factory.mktemp("trust") / "run", **SMALL)
    train(config)
    return config


def float_wav(path: Path, wav: np.ndarray, rate: int) -> Path:
    data = wav.astype("<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 0, 4, 32)
    head = struct.pack("<4sI4s", b"RIFF", 36 + len(data), b"WAVE")
    path.write_bytes(head + form + struct.pack("<4sI", b"data", len(data)) + data)
    return path


@pytest.mark.parametrize("rate", [16000, 24000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 100.0])
def test_samples_that_are_not_finite_or_absurd_are_refused(value, rate, tmp_path):
    wav = tone(0.5, rate)
    assert len(read_audio(float_wav(tmp_path / "a.wav", wav, rate), 24000)) == 12000
    wav[5] = value
    with pytest.raises(ValueError, match="a.wav has samples that are not finite"):
        read_audio(float_wav(tmp_path / "a.wav", wav, rate), 24000)


@pytest.mark.parametrize("rate", [1, 3999, 384_001, 2**31])
def test_absurd_sample_rates_are_refused(rate, tmp_path):
    with pytest.raises(ValueError, match=f"sample rate of {rate} Hz"):
        read_audio(float_wav(tmp_path / "a.wav", tone(0.5, 24000), rate), 24000)


def test_a_panic_of_the_reader_is_a_value_error_and_an_interrupt_is_not(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(0.5, 24000), 24000)
    panic = type("PanicException", (BaseException,), {})
    for raised, expected in ((panic("at 3"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr("sphn.read", lambda _, error=raised: (_ for _ in ()).throw(error))
        with pytest.raises(expected):
            read_audio(tmp_path / "a.wav", 24000)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_audio(tmp_path / "a.wav", 24000)


@pytest.mark.parametrize("save_every", [1, 12])
def test_a_training_that_diverges_ends_before_it_saves(config, save_every):
    train(replace(config, max_steps=2))
    before = {path.name: path.read_bytes() for path in config.out.glob("*")}
    hot = replace(config, resume=True, lr=1e37, save_every=save_every, max_steps=40)
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train(hot)
    after = {path.name: path.read_bytes() for path in config.out.glob("*")}
    before.pop("log.jsonl")
    assert "NaN" not in after.pop("log.jsonl").decode() and after == before


def changed(path: Path, change) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name)
    change(tensors, name)
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, n: t.update({n: t[n][:-1].clone()}), "q_proj.* has the shape"),
        (lambda t, n: t.update({n: t[n] * torch.nan}), "is not finite"),
        (lambda t, n: t.pop(n), "has the shape None, not"),
        (lambda t, n: t.update(more=torch.zeros(1)), "more has the shape .* not None"),
    ],
)
def test_tensors_of_another_shape_or_name_are_refused(finished, tmp_path, kind, change, message):
    run = shutil.copytree(finished.out, tmp_path / "run")
    changed(run / f"{kind}-000012.safetensors", change)
    with pytest.raises((ValueError, FloatingPointError), match=message) as error:
        train(replace(finished, out=run, resume=True, max_steps=13))
    assert f"{kind}-000012" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("token", [65535, 0, 16, 48])
def test_ids_outside_of_their_codebook_are_refused(random_data, tmp_path, token):
    """Codebook 1 has the ids 16 to 31."""
    folder = shutil.copytree(random_data, tmp_path / "data")
    ids = np.fromfile(folder / "train.bin", np.uint16).reshape(-1, 6)
    ids[7, 1] = token
    ids.tofile(folder / "train.bin")
    data = TokenDataset([folder], "train", 3)
    if token == 16:
        assert data.codes(7, 1)[1] == 0
    else:
        with pytest.raises(ValueError, match="outside of their codebooks"):
            data.frames(0, 9)


def test_a_torn_log_is_mended_when_the_run_is_resumed(config):
    train(replace(config, max_steps=6))
    log = config.out / "log.jsonl"
    good = log.read_bytes()
    log.write_bytes(good + b'not json\n{"step": 6, "lo')
    train(replace(config, max_steps=6, resume=True))
    assert log.read_bytes() == good


def test_a_reader_of_a_run_that_is_saved_meanwhile_reads_the_new_step(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished.out, tmp_path / "run")
    content, read = (run / "run.json").read_text(), checkpoint.read
    (run / "run.json").write_text(content.replace('"step": 12', '"step": 9'))  # has no weights

    def read_and_save(folder):
        found = read(folder)
        (run / "run.json").write_text(content)
        return found

    monkeypatch.setattr(checkpoint, "read", read_and_save)
    assert checkpoint.load(run)[1]["step"] == 12


def test_files_of_other_steps_are_deleted_at_the_next_checkpoint(config):
    train(replace(config, max_steps=6))
    for name in ("model-000003.safetensors", "optimizer-000004.safetensors", "mine.safetensors"):
        (config.out / name).touch()
    (config.out / "model-000009.safetensors.tmp").touch()
    train(replace(config, resume=True))
    tensors = {f"{kind}-000012.safetensors" for kind in ("model", "optimizer")}
    left = {path.name for path in config.out.iterdir()}
    assert left == {"run.json", "log.jsonl", "mine.safetensors"} | tensors
