import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanomimi.codec import Codec
from nanomimi.config import parse
from nanomimi.tiny import digits, train_codec
from nanomimi.tiny.train_codec import CodecConfig, mel_distance
from tests.conftest import small_shape


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CodecConfig:
    """A finished run of 8 steps in `out`, and its state after 4 steps in `interrupted`."""
    folder, save = tmp_path_factory.mktemp("codec"), train_codec.save
    shape = small_shape()
    shape["quantizer"].update(n_q=3, bins=8)
    (folder / "shape.json").write_text(json.dumps({"mimi": shape}))
    # Fewer steps than plain_steps: moshi draws the clips to quantize in each of them.
    small = dict(minutes=0.2, batch_size=2, frames=4, save_every=4, plain_steps=10, max_steps=8)
    config = CodecConfig(shape=folder / "shape.json", out=folder / "out", device="cpu", **small)

    def save_and_copy(*args) -> None:
        save(*args)
        if not (folder / "interrupted").exists():
            shutil.copytree(config.out, folder / "interrupted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_codec, "save", save_and_copy)
        train_codec.train(config)
    return config


def test_a_codec_is_trained_saved_and_loaded(config):
    report = json.loads((config.out / "mimi.json").read_text())
    assert report["step"] == 8 and set(report["mel_distance"]) == {"1", "2", "3"}
    codec = Codec.load(str(config.out / "mimi.safetensors"), 2)
    assert codec.encode(torch.randn(1, 1, 5000)).shape == (1, 2, 3)
    weights = load_file(config.out / "mimi.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_resumed_codec_equals_an_uninterrupted_one(config):
    resumed = replace(config, out=config.out.with_name("interrupted"), resume=True)
    assert json.loads((resumed.out / "mimi.json").read_text())["step"] == 4
    train_codec.train(resumed)
    # Before they are rounded to float16: the weights, their moments and the codebooks.
    whole, again = (load_file(c.out / "training.safetensors") for c in (config, resumed))
    assert whole.keys() == again.keys() and any(name.endswith("exp_avg") for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize(
    "part, key, value", [("quantizer", "n_q", 4), ("transformer", "context", 9)]
)
def test_resuming_with_another_shape_is_one_clear_line(config, tmp_path, part, key, value):
    shape = copy.deepcopy(train_codec.read_shape(config.shape))
    shape[part][key] = value
    (tmp_path / "other.json").write_text(json.dumps({"mimi": shape}))
    with pytest.raises(ValueError, match="another shape than --shape; give --shape") as error:
        train_codec.train(replace(config, resume=True, shape=tmp_path / "other.json"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        train_codec.train(replace(config, resume=True, out=tmp_path))


def test_evaluation_agrees_with_the_codec_and_counts_the_entries_in_use(random_codec):
    mimi, wav = copy.deepcopy(random_codec.mimi), 0.1 * torch.randn(2, 1, 19200)
    numbers = train_codec.evaluate(mimi, wav)
    assert set(numbers["mel_distance"]) == {1, 2, 4, 6} and mimi.training
    codes = random_codec.encode(wav)
    for q, distance in numbers["mel_distance"].items():
        expected = mel_distance(random_codec.decode(codes[:, :q])[:, 0], wav[:, 0])
        assert distance == pytest.approx(expected.item(), abs=1e-3)
    for usage, codebook in zip(numbers["usage"], codes.transpose(0, 1).numpy(), strict=True):
        _, counts = np.unique(codebook, return_counts=True)
        share = counts / counts.sum()
        entries = np.exp(-np.sum(share * np.log(share)))
        assert usage == pytest.approx(entries / random_codec.codebook_size, abs=1e-3)


def test_the_trainer_explains_its_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(CodecConfig, ["--help"], train_codec.__doc__)
    assert stop.value.code == 0 and "--shape" in capsys.readouterr().out


def test_the_codec_trainer_takes_any_folder_of_audio(tmp_path, capsys):
    with pytest.raises(ValueError, match="no audio"):
        train_codec.from_files(CodecConfig(audio=(tmp_path,)))
    (tmp_path / "text.wav").write_text("this is no audio")
    wav = train_codec.from_files(CodecConfig(audio=(digits.FOLDER, tmp_path), minutes=3.0))
    assert "text.wav" in capsys.readouterr().out and len(wav) > 60 * digits.SAMPLE_RATE
    wav = train_codec.from_files(CodecConfig(audio=(digits.FOLDER,), minutes=0.1))
    assert 6 * digits.SAMPLE_RATE < len(wav) < 30 * digits.SAMPLE_RATE


def test_the_mel_distance_is_zero_for_the_same_and_grows_with_the_difference():
    wav = 0.1 * torch.randn(1, 9600)
    assert mel_distance(wav, wav) == 0
    near, far = mel_distance(1.1 * wav, wav), mel_distance(2 * wav, wav)
    assert 0 < near < far < np.log(2) + 1e-3
