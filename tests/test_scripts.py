"""The scripts as a user runs them, on the bundled digits, and the mistakes of a new user."""

import json
import shutil
import subprocess
import sys
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomimi import Codec, TokenDataset, checkpoint
from nanomimi.audio import STDOUT, read_audio, write_wav
from nanomimi.evaluate.__main__ import EvaluateConfig, evaluate
from nanomimi.tiny import digits
from prepare import PrepareConfig, prepare
from sample import SampleConfig, encode_prompt, sample
from tests.conftest import tone
from train import TrainConfig, train

ROOT = Path(__file__).parent.parent
SLT = ROOT / "nanomimi" / "tiny" / "digits" / "slt.ogg"


@pytest.fixture(scope="session")
def story(tmp_path_factory, counted) -> Path:
    """The bundled digits, prepared and trained on: a folder with data and run."""
    folder = tmp_path_factory.mktemp("story")
    shutil.copytree(counted, folder / "data")
    small = dict(max_steps=4, max_frames=40, n_layer=1, n_embd=32, warmup_steps=1, device="cpu")
    train(TrainConfig(data=(folder / "data",), out=folder / "run", **small))
    return folder


def wav_of(path: Path) -> tuple[int, int]:
    """Sample rate and number of samples, by the standard library."""
    with wave.open(str(path)) as file:
        return file.getframerate(), file.getnframes()


def test_prepare_train_and_sample_end_in_audio(story, tmp_path):
    flags = dict(prompt=SLT, prompt_seconds=1.0, seconds=1.6, num_samples=3, device="cpu")
    paths = sample(SampleConfig(run=story / "run", out=tmp_path, **flags))
    assert len(paths) == 3
    for path in paths:
        rate, samples = wav_of(path)
        assert rate == 24000 and 0.96 * rate <= samples <= (0.96 + 1.6) * rate
        assert np.abs(read_audio(path, rate)).max() > 0.01
    assert {line["split"] for line in utterances(story / "data")} == {"train", "val"}
    kinds = {line["file"].split(":")[0] for line in utterances(story / "data")}
    assert kinds == {digits.TRAIN, digits.KNOWN, digits.UNHEARD}
    lengths = {len(line["file"].split()[-1]) for line in utterances(story / "data")}
    assert (min(lengths), max(lengths)) == (6, 12)  # --max_digits 12


def test_a_hierarchical_run_goes_through_the_same_scripts(story, tmp_path):
    flags = dict(max_steps=2, max_frames=40, n_layer=1, n_embd=32, device="cpu")
    train(TrainConfig(data=(story / "data",), out=tmp_path / "run", arch="hierarchical", **flags))
    flags = dict(prompt=SLT, prompt_seconds=1.0, seconds=4, device="cpu")
    paths = sample(SampleConfig(run=tmp_path / "run", out=tmp_path, **flags))
    assert len(paths) == 4 and all(wav_of(path)[1] >= 0.96 * 24000 for path in paths)


def test_samples_repeat_with_the_seed_and_change_with_it(story, tmp_path):
    def bytes_of(name: str, **settings) -> bytes:
        flags = dict(seconds=1.0, num_samples=1, device="cpu", **settings)
        return sample(SampleConfig(run=story / "run", out=tmp_path / name, **flags))[0].read_bytes()

    assert bytes_of("a", seed=1) == bytes_of("b", seed=1) != bytes_of("c", seed=2)


def test_a_prompts_level_and_leading_silence_change_nothing(story, tmp_path):
    model, _ = checkpoint.load(story / "run")
    codec, clip = Codec.load("tiny", model.num_codebooks), read_audio(SLT, 24000, max_seconds=2.0)
    codes = []
    for gain, silence in ((1.0, 0), (0.5, 0), (1.0, 12345), (0.25, 54321)):
        write_wav(tmp_path / "me.wav", gain * np.pad(clip, (silence, 0)), 24000)
        config = SampleConfig(prompt=tmp_path / "me.wav", prompt_seconds=1.5)
        codes.append(encode_prompt(config, codec, model))
    assert codes[0].shape[2] == 1 + 18  # a separator, and whole frames
    assert all((each == codes[0]).float().mean() > 0.97 for each in codes)  # of 16 bits each
    assert torch.equal(codes[0], codes[2])


def samples_of(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


@pytest.fixture(scope="module")
def lasting(story, tmp_path_factory) -> tuple[SampleConfig, list[Path]]:
    """Samples longer than the context, of which some end before the others."""
    draws = dict(num_samples=8, temperature=2.0, top_k=0, seconds=6, device="cpu")
    out = tmp_path_factory.mktemp("lasting")
    config = SampleConfig(run=story / "run", prompt=SLT, prompt_seconds=0.5, out=out, **draws)
    return config, sample(config)


def test_no_sample_ends_before_min_seconds(lasting, tmp_path):
    config, free = lasting
    held = sample(replace(config, min_seconds=6, out=tmp_path))
    frames = {len(samples_of(path)) // 1920 for path in held}  # of 80 ms: prompt and continuation
    assert frames == {6 + 75} and len({len(samples_of(path)) for path in free}) > 1


def test_streamed_wavs_are_those_decoded_at_the_end(lasting, tmp_path):
    config, whole = lasting
    streamed = sample(replace(config, stream=True, out=tmp_path))
    assert len({len(samples_of(path)) for path in whole}) > 1
    for a, b in zip(map(samples_of, whole), map(samples_of, streamed), strict=True):
        assert len(a) == len(b) and np.abs(a - b).max() <= 2  # of 32768


def test_a_stream_to_standard_output_is_the_samples_alone(story, tmp_path, capfdbinary):
    flags = dict(run=story / "run", stream=True, num_samples=1, seconds=2, device="cpu")
    sample(SampleConfig(**flags, out=tmp_path))
    capfdbinary.readouterr()
    sample(SampleConfig(**flags, out=STDOUT))
    shown, told = capfdbinary.readouterr()
    assert np.array_equal(np.frombuffer(shown, "<i2"), samples_of(tmp_path / "sample-0.wav"))
    assert b"x real time" in told


def test_samples_continue_past_the_context(lasting):
    config, paths = lasting
    context = checkpoint.read(config.run)["model"]["max_frames"] * 1920
    assert max(wav_of(path)[1] for path in paths) > context


def test_a_folder_of_any_audio_is_prepared_and_bad_files_are_listed(random_mimi, tmp_path, capsys):
    for speaker in ("anna", "ben"):
        (tmp_path / "in" / speaker).mkdir(parents=True)
        for i in range(3):
            write_wav(tmp_path / "in" / speaker / f"{i}.wav", tone(1 + i / 2, 16000), 16000)
    (tmp_path / "in" / "anna" / "bad.flac").write_text("this is no audio")
    flags = dict(audio=(tmp_path / "in",), codec=str(random_mimi), num_codebooks=6, device="cpu")
    prepare(PrepareConfig(**flags, out=tmp_path / "files"))
    out = capsys.readouterr().out
    assert out.count("skipped:") == 1 and "bad.flac" in out and "1 files skipped" in out
    lines = utterances(tmp_path / "files")
    assert len(lines) == 6 and {Path(line["group"]).name for line in lines} == {"anna", "ben"}
    assert sum(line["num_frames"] for line in lines) == 2 * (13 + 19 + 25)  # of 1, 1.5 and 2 s

    prepare(PrepareConfig(**flags, out=tmp_path / "groups", split_by="group"))
    lines = utterances(tmp_path / "groups")
    sides = {
        side: {line["group"] for line in lines if line["split"] == side}
        for side in ("train", "val")
    }
    assert len(sides["train"]) == len(sides["val"]) == 1 and not sides["train"] & sides["val"]


def utterances(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "utterances.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """Two speakers with six recordings each, all of different length and pitch, and a bad file."""
    folder = tmp_path_factory.mktemp("tones")
    for i in range(12):
        (folder / f"speaker{i // 6}").mkdir(exist_ok=True)
        wav = tone(0.5 + i / 8, 16000, hz=200 + 50 * i)
        write_wav(folder / f"speaker{i // 6}" / f"{i:02}.wav", wav, 16000)
    (folder / "speaker0" / "bad.wav").write_text("this is no audio")
    return folder


def test_files_are_written_in_an_order_that_depends_on_the_seed_alone(random_mimi, tones, tmp_path):
    flags = dict(audio=(tones,), codec=str(random_mimi), num_codebooks=6, device="cpu")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare(PrepareConfig(**flags, out=tmp_path / name, seed=seed))
    for name in ("train.bin", "val.bin", "utterances.jsonl", "meta.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    order = [[line["file"] for line in utterances(tmp_path / name)] for name in "ac"]
    assert sorted(order[0]) == sorted(order[1]) and len(order[0]) == 12
    assert order[0] != order[1] and sorted(order[0]) not in order


def test_every_recording_has_the_codes_that_it_has_alone(
    random_mimi, random_codec, tones, tmp_path
):
    flags = dict(audio=(tones,), codec=str(random_mimi), num_codebooks=6, device="cpu")
    prepare(PrepareConfig(**flags, val_fraction=1, out=tmp_path))
    data = TokenDataset([tmp_path], "val", 6)
    assert len(data.utterances()) == 12  # everything is held out
    for line in data.utterances():
        wav = torch.from_numpy(read_audio(Path(line["file"]), random_codec.sample_rate))
        codes = data.codes(line["first_frame"], line["num_frames"])
        assert torch.equal(codes, random_codec.encode(wav[None, None])[0])
    with pytest.raises(ValueError, match="lower --max_frames or prepare more audio"):
        TokenDataset([tmp_path], "train", 6).train_batch(0, 1, 4, seed=0)


def test_the_same_file_is_never_on_both_sides(random_mimi, tmp_path):
    write_wav(tmp_path / "a.wav", tone(1, 24000), 24000)
    write_wav(tmp_path / "b.wav", tone(1, 24000), 24000)
    named_twice = (tmp_path / "a.wav", tmp_path, tmp_path / "b.wav")
    flags = dict(codec=str(random_mimi), num_codebooks=2, device="cpu")
    prepare(PrepareConfig(audio=named_twice, out=tmp_path / "d", **flags))
    counts = TokenDataset([tmp_path / "d"], "train", 2).meta["splits"][0]
    assert counts["train"]["utterances"] == counts["val"]["utterances"] == 1


@pytest.fixture(scope="session")
def wrong(tmp_path_factory, story) -> dict[str, Path]:
    """Inputs that cannot work."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "text").mkdir()
    for i in range(2):
        (folder / "text" / f"{i}.wav").write_text("this is no audio")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "meta.json").write_text('{"vocab_size": 65}')
    (folder / "file").write_text("a file, no folder")
    write_wav(folder / "short.wav", tone(0.01, 24000), 24000)
    write_wav(folder / "silent.wav", np.zeros(24000, np.float32), 24000)
    return {"folder": folder, "story": story}


@pytest.mark.parametrize(
    "command, message",
    [
        ("prepare.py {folder}/nowhere", "does not exist"),
        ("prepare.py {folder}/empty --codec tiny --out {out}", "no audio"),
        ("prepare.py {folder}/text --codec tiny --out {out}", "nothing was prepared"),
        ("prepare.py {folder}/short.wav --codec tiny --out {out}", "cannot be split"),
        (
            "prepare.py --num_codebooks 0 --out {out}",
            "--num_codebooks must be at least 1; got 0",
        ),
        (
            "prepare.py --num_codebooks 9 --out {out}",
            "--num_codebooks must be 1 to 8 for tiny; got 9",
        ),
        (
            "prepare.py --codec nowhere.safetensors --out {out}",
            "neither tiny nor mimi nor a file",
        ),
        ("prepare.py --val_fraction 0 --out {out}", "--val_fraction must be above 0"),
        ("prepare.py --hours 0.001 --out {folder}/file/d", "Not a directory"),
        ("prepare.py --hours 0.0001 --out {out}", "nothing was prepared"),
        ("train.py --data {folder}/nowhere --out {out}", "run python prepare.py"),
        ("train.py --data {folder}/foreign --out {out}", "of another format"),
        (
            "train.py --data {story}/data --out {out} --num_codebooks 9",
            "--num_codebooks must be 1 to 8",
        ),
        (
            "train.py --data {story}/data --out {out} --num_codebooks 0",
            "--num_codebooks must be at least 1",
        ),
        ("train.py --data {story}/data --out {out} --max_frames 100000", "lower --max_frames"),
        (
            "train.py --data {story}/data --out {out} --n_head 5",
            "--n_embd must be --n_head times an even number",
        ),
        ("train.py --data {story}/data --out {out} --n_kv_head 3", "multiple of --n_kv_head"),
        (
            "train.py --data {story}/data --out {out} --arch hierarchical --n_embd 66 "
            "--n_head 3",
            "--depth_n_embd must be --depth_n_head times an even number",
        ),
        (
            "train.py --data {story}/data --out {out} --device nonsense",
            "--device nonsense cannot be used",
        ),
        ("train.py --data {story}/data --out {out} --lr 0", "--lr must be above 0"),
        ("train.py --data {story}/data --out {out} --resume", "is not a run"),
        ("train.py --data {story}/data --out {story}/run", "holds a run already"),
        (
            "train.py --data {story}/data --out {story}/run --resume --num_codebooks 2",
            "the model in",
        ),
        ("train.py --data {story}/data --out {folder}/file/r", "Not a directory"),
        ("sample.py --run {folder}/nowhere", "is not a run"),
        ("sample.py --run {story}/run --prompt {folder}/nowhere.wav", "does not exist"),
        ("sample.py --run {story}/run --prompt {folder}/text/0.wav", "cannot be read as audio"),
        (
            "sample.py --run {story}/run --prompt {slt} --prompt_seconds 0.05 --out {out}",
            "shorter than a frame",
        ),
        ("sample.py --run {story}/run --prompt {folder}/silent.wav --out {out}", "silent or"),
        (
            "sample.py --run {story}/run --prompt {slt} --prompt_seconds 9 --out {out}",
            "longer than the model's context",
        ),
        ("sample.py --run {story}/run --temperature -1", "--temperature must be at least 0"),
        ("sample.py --run {story}/run --codec {mimi}", "is not the one of"),
        ("sample.py --run {story}/run --out {folder}/file/s", "Not a directory"),
        ("sample.py --seconds ten", "invalid float value"),
        ("sample.py --run {story}/run --out -", "needs --stream --num_samples 1"),
        ("evaluate.py --run {folder}/nowhere", "is not a run"),
        ("evaluate.py --run {story}/run --data {folder}/nowhere", "run python prepare.py"),
        ("evaluate.py --run {story}/run --codec {mimi}", "another codec than"),
        ("evaluate.py --run {story}/run --pairs {folder}/text", "has no pairs"),
        ("evaluate.py --run {story}/run --trials 0", "--trials must be at least 1"),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_to_do(
    command, message, wrong, random_mimi, tmp_path, monkeypatch, capsys
):
    import prepare as prepare_script
    import sample as sample_script
    import train as train_script
    from nanomimi.config import run_script

    name, *argv = command.format(**wrong, out=tmp_path / "out", slt=SLT, mimi=random_mimi).split()
    parts = {
        "prepare.py": (PrepareConfig, prepare_script.prepare),
        "train.py": (TrainConfig, train_script.main),
        "sample.py": (SampleConfig, sample_script.sample),
        "evaluate.py": (EvaluateConfig, evaluate),
    }
    monkeypatch.setattr("sys.argv", [name, *argv])
    with pytest.raises(SystemExit) as stop:
        run_script(*parts[name])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{name}: ") and message in last, last


def script(*words: object) -> subprocess.Popen:
    """A script that has been started; `communicate` waits for its output."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, **pipes)


def test_the_scripts_run_as_scripts(tmp_path):
    """prepare.py and sample.py; tests/test_trust.py starts train.py."""
    help = script("prepare.py", "--help")
    failing = script("sample.py", "--run", tmp_path)
    assert "--out" in help.communicate()[0] and help.returncode == 0
    message = failing.communicate()[1]
    assert failing.returncode == 2 and message.startswith("sample.py: ")
    assert "Traceback" not in message
