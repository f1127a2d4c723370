"""Nothing is lost, nothing is silent, nothing is executed: crashes, signals and hostile files."""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomimi import DatasetWriter, TokenDataset, checkpoint, make_sampler
from nanomimi.audio import read_audio, write_wav
from nanomimi.config import parse
from nanomimi.distributed import catch_signals
from nanomimi.evaluate.__main__ import EvaluateConfig, evaluate
from nanomimi.files import Positive, fits, lock
from nanomimi.tiny import train_codec
from prepare import PrepareConfig, prepare
from sample import SampleConfig, sample
from tests.conftest import tone
from tests.fuzz import fuzz
from tests.test_train import SMALL, same, weights
from train import TrainConfig, train

ROOT = Path(__file__).parent.parent
FILES = ("train.bin", "val.bin", "utterances.jsonl", "settings.json", "meta.json")


@pytest.fixture
def config(random_data, tmp_path) -> TrainConfig:
    return TrainConfig(data=(random_data,), out=tmp_path / "run", **SMALL)


@pytest.fixture(scope="module")
def finished(random_data, tmp_path_factory) -> TrainConfig:
    config = TrainConfig(data=(random_data,), out=tmp_path_factory.mktemp("trust") / "run", **SMALL)
    train(config)
    return config


@pytest.fixture
def recordings(random_mimi, tmp_path) -> PrepareConfig:
    """Eight readable files and one that is not."""
    audio = tmp_path / "audio"
    audio.mkdir()
    for i in range(8):
        write_wav(audio / f"{i}.wav", tone(0.5 + i / 10, 24000, 200 + 50 * i), 24000)
    (audio / "bad.wav").write_text("no audio")
    flags = dict(codec=str(random_mimi), num_codebooks=3, device="cpu", val_fraction=0.4)
    return PrepareConfig(audio=(audio,), out=tmp_path / "whole", **flags)


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


def test_a_truncated_mp3_is_refused_if_its_header_has_the_length(tmp_path):
    silence = bytes([0xFF, 0xFB, 0x10, 0xC4]) + bytes(100)  # a frame of 1,152 samples at 44.1 kHz
    header = silence[:4] + bytes(17) + b"Info" + struct.pack(">II", 1, 20)  # 20 frames follow
    path = tmp_path / "a.mp3"
    path.write_bytes(header.ljust(104, b"\0") + 20 * silence)
    assert len(read_audio(path, 44100)) == 20 * 1152
    path.write_bytes(header.ljust(104, b"\0") + 10 * silence)
    with pytest.raises(ValueError, match="is truncated: its header announces 0.5 s"):
        read_audio(path, 44100)
    path.write_bytes(20 * silence)
    assert len(read_audio(path, 44100)) == 20 * 1152


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
    (config.out / "model-000003.safetensors").touch()  # of a finished run
    train(replace(config, resume=True))
    tensors = {f"{kind}-000012.safetensors" for kind in ("model", "optimizer")}
    left = {path.name for path in config.out.iterdir()}
    assert left == {"run.json", "log.jsonl", "mine.safetensors"} | tensors


def test_a_folder_has_one_writer(config, recordings):
    for path, write in ((config.out, lambda: train(config)), (recordings.out, lambda: prepare(recordings))):
        with lock(path), pytest.raises(ValueError, match="in use by another process"):
            write()


def test_a_signal_to_torchrun_ends_a_training_after_a_checkpoint(config):
    given = {**SMALL, "data": config.data[0], "out": config.out, "max_steps": 10**6}
    flags = [f"--{name}={value}" for name, value in given.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*torchrun, "train.py", *flags], cwd=ROOT, **pipes)
    end = time.time() + 120
    while not (config.out / "run.json").exists() and time.time() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    step = checkpoint.read(config.out)["step"]
    assert f"step {step}: stopped by a signal" in out, err
    assert not list(config.out.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_goes_on_to_the_weights_of_an_uninterrupted_one(
    config, number, monkeypatch, capsys
):
    whole = train(config)
    broken = replace(config, out=config.out.with_name("broken"))
    step, count = torch.optim.AdamW.step, []

    def interrupt(self, *args):
        count.append(step(self, *args))
        if len(count) == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(SystemExit) as stop:
        train(broken)
    monkeypatch.undo()
    assert stop.value.code == 128 + number and checkpoint.read(broken.out)["step"] == 4
    assert "step 4: stopped by a signal; --resume continues" in capsys.readouterr().out
    assert train(replace(broken, resume=True)) == whole
    assert same(weights(config.out), weights(broken.out))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(recordings, error, monkeypatch):
    prepare(recordings)
    broken, add = replace(recordings, out=recordings.out.with_name("broken")), DatasetWriter.add
    for count in (0, 1, 3, 2):  # utterances until it fails

        def fail(self, *args, left=[None] * count):
            if not left:
                raise error
            left.pop()
            add(self, *args)

        monkeypatch.setattr(DatasetWriter, "add", fail)
        with pytest.raises(type(error)):
            prepare(broken)
        monkeypatch.undo()
        for name, torn in (("train.bin", b"torn"), ("utterances.jsonl", b'{"split": "tr')):
            with open(broken.out / name, "ab") as file:
                file.write(torn)
        with pytest.raises(FileNotFoundError, match="no data folder"):
            TokenDataset([broken.out], "train", 3)
    with pytest.raises(ValueError, match="other arguments"):
        prepare(replace(broken, seed=1))
    prepare(broken)
    assert contents(broken.out) == contents(recordings.out)
    assert set(contents(broken.out)) == set(FILES)


def test_prepared_data_are_replaced_only_on_request(recordings, capsys):
    prepare(recordings)
    before = contents(recordings.out)
    prepare(recordings)
    assert "nothing is left to do" in capsys.readouterr().out
    other = replace(recordings, seed=1)
    with pytest.raises(ValueError, match="--overwrite"):
        prepare(other)
    assert contents(recordings.out) == before
    prepare(replace(other, overwrite=True))
    assert contents(recordings.out) != before


def test_a_codec_is_not_replaced(tmp_path):
    (tmp_path / "mimi.safetensors").touch()
    with pytest.raises(ValueError, match="holds a codec already"):
        train_codec.train(train_codec.CodecConfig(out=tmp_path, device="cpu"))


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(config, monkeypatch):
    train(replace(config, max_steps=6))
    before = contents(config.out)
    full = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    monkeypatch.setattr("os.fsync", full)
    more = replace(config, resume=True)
    with pytest.raises(OSError, match="log.jsonl could not be written .*No space left"):
        train(more)
    monkeypatch.undo()
    monkeypatch.setattr("nanomimi.files.save_file", lambda *_: full())
    with pytest.raises(OSError, match="model-000012.safetensors"):
        train(more)
    after = contents(config.out)
    assert after.keys() == before.keys() and after["run.json"] == before["run.json"]


@pytest.mark.parametrize(
    "value, right",
    [
        ({"rate": 1.5, "names": ["a"]}, True),
        ({"rate": 1, "names": []}, True),
        ({"rate": 1, "names": ["a"], "more": 1}, False),
        ({"rate": 1}, False),
        ({"rate": -1, "names": ["a"]}, False),
        ({"rate": 0, "names": ["a"]}, False),
        ({"rate": float("nan"), "names": ["a"]}, False),
        ({"rate": 10**400, "names": ["a"]}, False),
        ({"rate": True, "names": ["a"]}, False),
        ({"rate": 1, "names": [3]}, False),
        ({"rate": 1, "names": "a"}, False),
        ([], False),
    ],
)
def test_json_is_compared_with_its_kind(value, right):
    kind = {"rate": Positive, "names": list[str]}
    assert fits(value, kind) == right
    if isinstance(value, dict):  # with other keys allowed, the keys named still count
        assert fits({**value, "names": ["a"], "more": 1}, {**kind, ...: Any}) == fits(
            value["rate"], Positive
        )


@pytest.mark.parametrize(
    "value, kind, right",
    [
        (3, int | None, True), (None, int | None, True), ("3", int | None, False),
        ("b", Literal["a", "b"], True), ("c", Literal["a", "b"], False),
        (True, int, False), (2**63, int, False), (-(2**62), int, True),
        ((Path("a"),), tuple[Path, ...], True), (("a",), tuple[Path, ...], False),
    ],
)
def test_flags_are_compared_with_their_type(value, kind, right):
    assert fits(value, kind) == right


@pytest.mark.parametrize("name", ["run.json", "meta.json", "utterances.jsonl", "mimi.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xfd", b"[" * 100_000, b"{}", b"null"])
def test_damaged_json_gets_one_line_with_the_file(name, content, finished, random_data, tmp_path):
    folder = shutil.copytree(finished.out, tmp_path / "all")
    shutil.copytree(random_data, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(content)
    read = {
        "run.json": lambda: checkpoint.load(folder),
        "mimi.json": lambda: train_codec.read_shape(folder / name),
    }.get(name, lambda: TokenDataset([folder], "val", 3).utterances())
    with pytest.raises(ValueError, match=name) as error:
        read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_utterances_must_lie_end_to_end_in_the_stream(random_data, tmp_path):
    folder = shutil.copytree(random_data, tmp_path / "data")
    lines = (folder / "utterances.jsonl").read_text().splitlines(keepends=True)
    (folder / "utterances.jsonl").write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(ValueError, match="does not fit train.bin"):
        TokenDataset([folder], "train", 3).utterances()


def test_a_pickle_is_never_loaded(tmp_path, random_mimi):
    """Neither under the old name of the codec's training state nor under its present one."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    shape = random_mimi.with_suffix(".json")
    config = train_codec.CodecConfig(out=tmp_path, shape=shape, resume=True, device="cpu")
    shutil.copy(shape, tmp_path / "mimi.json")
    for name in ("training.pt", "training.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises((FileNotFoundError, ValueError), match="training.safetensors"):
            train_codec.train(config)
    assert not (tmp_path / "executed").exists()
    code = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("nanomimi/**/*.py")])
    assert "torch.load" not in code and "import pickle" not in code


def test_skipped_files_are_named_when_nothing_could_be_prepared(tmp_path, random_mimi, capsys):
    for i in range(2):
        (tmp_path / f"{i}.wav").write_text("no audio")
    config = PrepareConfig((tmp_path,), tmp_path / "d", str(random_mimi), 2, device="cpu")
    with pytest.raises(ValueError, match="nothing was prepared"):
        prepare(config)
    assert capsys.readouterr().out.count("skipped: ") == 2
    with pytest.raises(FileNotFoundError, match="no data folder"):
        TokenDataset([tmp_path / "d"], "train", 2)


def test_odd_flags_are_refused_or_mean_what_they_say(capsys):
    for flags in (["--out="], ["--seed", "9" * 30], ["--seconds", "1e308"], ["--seconds", "inf"]):
        with pytest.raises((SystemExit, ValueError)) as error:
            parse(SampleConfig, flags)
        assert flags[0].rstrip("=") in str(error.value) + capsys.readouterr().err
    logits = torch.randn(50, 9)
    assert torch.equal(make_sampler(temperature=1e-320)(logits), logits.argmax(dim=-1))


def test_all_scripts_repeat_with_the_seed(random_mimi, recordings, tmp_path):
    def story(name: str) -> list[bytes]:
        folder = tmp_path / name
        prepare(replace(recordings, out=folder / "data"))
        train(TrainConfig((folder / "data",), folder / "run", **{**SMALL, "max_steps": 3}))
        evaluate(EvaluateConfig(folder / "run", trials=8, device="cpu"))
        flags = dict(num_samples=2, seconds=1.0, device="cpu")
        paths = sample(SampleConfig(folder / "run", out=folder / "samples", **flags))
        results = json.loads((folder / "run" / "evaluation.json").read_text())
        results.pop("data")
        written = [folder / "data" / name for name in FILES]
        written += [*paths, folder / "run" / "model-000003.safetensors"]
        return [json.dumps(results), *(path.read_bytes() for path in written)]

    assert story("a") == story("b")


def test_a_hundred_mutated_inputs_are_read_rightly_or_refused_in_one_line():
    wrong = [text for outcome, text in fuzz(seed=7, count=100) if outcome.startswith("wrong")]
    assert not wrong, "\n".join(wrong)

