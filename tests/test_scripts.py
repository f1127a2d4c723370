"""The scripts as a user runs them: the offline story in small, and a newcomer's mistakes."""

import json
import os
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from nanomimi import TokenDataset, checkpoint
from nanomimi.audio import read_audio, write_wav
from nanomimi.evaluate import EvaluateConfig, evaluate
from prepare import PrepareConfig, prepare
from sample import SampleConfig, sample
from tests.conftest import tone
from train import TrainConfig, train

ROOT = Path(__file__).parent.parent
DIANA = ROOT / "nanomimi" / "tiny" / "digits" / "diana.ogg"


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """The three scripts on the bundled digits: a folder with data and run."""
    folder = tmp_path_factory.mktemp("story")
    prepare(PrepareConfig(out=folder / "data", hours=0.1, device="cpu"))
    train(
        TrainConfig(
            data=folder / "data",
            out=folder / "run",
            max_steps=4,
            max_frames=40,
            n_layer=1,
            n_embd=32,
            warmup_steps=1,
            device="cpu",
        )
    )
    return folder


def script(name: str, *argv: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, name, *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )


def wav_of(path: Path) -> tuple[int, int]:
    """Sample rate and number of samples, by the standard library."""
    with wave.open(str(path)) as file:
        return file.getframerate(), file.getnframes()


def test_the_offline_story_ends_in_audio(story, tmp_path):
    paths = sample(
        SampleConfig(
            run=story / "run",
            prompt=DIANA,
            prompt_seconds=1.0,
            seconds=1.6,
            num_samples=3,
            out=tmp_path,
            device="cpu",
        )
    )
    assert len(paths) == 3
    for path in paths:
        rate, samples = wav_of(path)
        assert rate == 24000 and 0.96 * rate <= samples <= (0.96 + 1.6) * rate
        assert np.abs(read_audio(path, rate)).max() > 0.01
    lines = [
        json.loads(line) for line in (story / "data" / "utterances.jsonl").read_text().splitlines()
    ]
    assert {line["split"] for line in lines} == {"train", "val"}


def test_a_hierarchical_run_goes_through_the_same_scripts(story, tmp_path):
    flags = dict(max_steps=2, max_frames=40, n_layer=1, n_embd=32, device="cpu")
    train(TrainConfig(data=story / "data", out=tmp_path / "run", arch="hierarchical", **flags))
    paths = sample(
        SampleConfig(
            run=tmp_path / "run", prompt=DIANA, prompt_seconds=1.0, seconds=4, out=tmp_path
        )
    )
    assert len(paths) == 4 and all(wav_of(path)[1] >= 0.96 * 24000 for path in paths)


def test_samples_repeat_with_the_seed_and_change_with_it(story, tmp_path):
    def bytes_of(name: str, **settings) -> bytes:
        config = SampleConfig(
            run=story / "run",
            seconds=1.0,
            num_samples=1,
            out=tmp_path / name,
            device="cpu",
            **settings,
        )
        return sample(config)[0].read_bytes()

    assert bytes_of("a", seed=1) == bytes_of("b", seed=1) != bytes_of("c", seed=2)


def samples_of(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(int)


def test_streamed_wavs_are_those_decoded_at_the_end(story, tmp_path):
    flags = dict(
        run=story / "run", prompt=DIANA, prompt_seconds=0.5, num_samples=6, temperature=2.0
    )
    whole, streamed = (
        sample(SampleConfig(**flags, top_k=0, seconds=8, stream=s, out=tmp_path / str(s)))
        for s in (False, True)
    )
    lengths = {len(samples_of(path)) for path in whole}
    assert len(lengths) > 1  # some rows end before the others
    for a, b in zip(map(samples_of, whole), map(samples_of, streamed), strict=True):
        assert len(a) == len(b) and np.abs(a - b).max() <= 2  # of 32768


def test_a_stream_to_standard_output_is_the_samples_alone(story, tmp_path):
    flags = ["--run", story / "run", "--stream", "--num_samples", 1, "--seconds", 2]
    assert script("sample.py", *flags, "--out", tmp_path).returncode == 0
    command = [sys.executable, "sample.py", *map(str, flags), "--out", "-"]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert np.array_equal(np.frombuffer(piped.stdout, "<i2"), samples_of(tmp_path / "sample-0.wav"))
    assert b"x real time" in piped.stderr


def test_samples_go_on_past_the_context(story, tmp_path):
    config = SampleConfig(
        run=story / "run",
        prompt=DIANA,
        prompt_seconds=0.5,
        seconds=8,
        num_samples=8,
        out=tmp_path,
        temperature=2.0,
        top_k=0,
        device="cpu",
    )
    context = checkpoint.read(story / "run")["model"]["max_frames"] * 1920
    assert max(wav_of(path)[1] for path in sample(config)) > context


def test_a_folder_of_any_audio_is_prepared_and_bad_files_are_listed(random_mimi, tmp_path, capsys):
    for speaker in ("anna", "ben"):
        (tmp_path / "in" / speaker).mkdir(parents=True)
        for i in range(3):
            write_wav(tmp_path / "in" / speaker / f"{i}.wav", tone(1 + i / 2, 16000), 16000)
    (tmp_path / "in" / "anna" / "bad.flac").write_text("this is no audio")
    flags = dict(audio=(tmp_path / "in",), codec=str(random_mimi), num_codebooks=6, device="cpu")
    prepare(PrepareConfig(**flags, out=tmp_path / "files"))
    out = capsys.readouterr().out
    assert out.count("skipped:") == 1 and "bad.flac" in out and "1 of 7 files skipped" in out
    lines = [
        json.loads(line)
        for line in (tmp_path / "files" / "utterances.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 6 and {Path(line["group"]).name for line in lines} == {"anna", "ben"}
    assert sum(line["num_frames"] for line in lines) == 2 * (13 + 19 + 25)  # of 1, 1.5 and 2 s

    prepare(PrepareConfig(**flags, out=tmp_path / "groups", split_by="group"))
    lines = [
        json.loads(line)
        for line in (tmp_path / "groups" / "utterances.jsonl").read_text().splitlines()
    ]
    sides = {
        side: {line["group"] for line in lines if line["split"] == side}
        for side in ("train", "val")
    }
    assert len(sides["train"]) == len(sides["val"]) == 1 and not sides["train"] & sides["val"]


def test_several_processes_prepare_the_bytes_of_one(random_mimi, tmp_path):
    for i in range(7):
        (tmp_path / "in" / f"speaker{i % 2}").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "in" / f"speaker{i % 2}" / f"{i}.wav"
        write_wav(path, tone(0.5 + i / 4, 16000, hz=200 + 50 * i), 16000)
    (tmp_path / "in" / "speaker0" / "bad.wav").write_text("this is no audio")
    flags = ["prepare.py", tmp_path / "in", "--codec", random_mimi, "--num_codebooks", "6"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    for launch, out in (([], "one"), (torchrun, "three")):
        command = [sys.executable, *launch, *flags, "--out", tmp_path / out, "--device", "cpu"]
        threads = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=threads, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "1 of 8 files skipped" in done.stdout
    names = ["meta.json", "train.bin", "utterances.jsonl", "val.bin"]
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_the_same_file_is_never_on_both_sides(random_mimi, tmp_path):
    write_wav(tmp_path / "a.wav", tone(1, 24000), 24000)
    write_wav(tmp_path / "b.wav", tone(1, 24000), 24000)
    named_twice = (tmp_path / "a.wav", tmp_path, tmp_path / "b.wav")
    prepare(
        PrepareConfig(
            audio=named_twice,
            codec=str(random_mimi),
            num_codebooks=2,
            out=tmp_path / "d",
            device="cpu",
        )
    )
    counts = TokenDataset(tmp_path / "d", "train").meta["splits"]
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
    return {"folder": folder, "story": story}


@pytest.mark.parametrize(
    "command, message",
    [
        ("prepare.py {folder}/nowhere", "does not exist"),
        ("prepare.py {folder}/empty --codec tiny --out {folder}/d", "no audio"),
        ("prepare.py {folder}/text --codec tiny --out {folder}/d", "nothing was prepared"),
        ("prepare.py {folder}/short.wav --codec tiny --out {folder}/d", "cannot be split"),
        (
            "prepare.py --num_codebooks 0 --out {folder}/d",
            "--num_codebooks must be at least 1; got 0",
        ),
        (
            "prepare.py --num_codebooks 9 --out {folder}/d",
            "--num_codebooks must be 1 to 8 with codec tiny; got 9",
        ),
        (
            "prepare.py --codec nowhere.safetensors --out {folder}/d",
            "neither tiny nor mimi nor a file",
        ),
        ("prepare.py --val_fraction 0 --out {folder}/d", "--val_fraction must be above 0"),
        ("prepare.py --hours 0.001 --out {folder}/file/d", "Not a directory"),
        ("prepare.py --hours 0.001 --out {folder}/d", "nothing was prepared"),
        ("train.py --data {folder}/nowhere --out {folder}/r", "run python prepare.py"),
        ("train.py --data {folder}/foreign --out {folder}/r", "not of format"),
        (
            "train.py --data {story}/data --out {folder}/r --num_codebooks 9",
            "--num_codebooks must be 1 to 8",
        ),
        (
            "train.py --data {story}/data --out {folder}/r --num_codebooks 0",
            "--num_codebooks must be at least 1",
        ),
        ("train.py --data {story}/data --out {folder}/r --max_frames 100000", "lower --max_frames"),
        (
            "train.py --data {story}/data --out {folder}/r --n_head 5",
            "--n_embd must be --n_head times an even number",
        ),
        ("train.py --data {story}/data --out {folder}/r --n_kv_head 3", "multiple of --n_kv_head"),
        (
            "train.py --data {story}/data --out {folder}/r --arch hierarchical --n_embd 66 "
            "--n_head 3",
            "--depth_n_embd must be --depth_n_head times an even number",
        ),
        (
            "train.py --data {story}/data --out {folder}/r --device nonsense",
            "--device nonsense cannot be used",
        ),
        ("train.py --data {story}/data --out {folder}/r --lr 0", "--lr must be above 0"),
        ("train.py --data {story}/data --out {folder}/r --resume", "is not a run"),
        ("train.py --data {story}/data --out {story}/run", "holds a run already"),
        (
            "train.py --data {story}/data --out {story}/run --resume --num_codebooks 2",
            "model's shape",
        ),
        ("train.py --data {story}/data --out {folder}/file/r", "Not a directory"),
        ("sample.py --run {folder}/nowhere", "is not a run"),
        ("sample.py --run {story}/run --prompt {folder}/nowhere.wav", "does not exist"),
        ("sample.py --run {story}/run --prompt {folder}/text/0.wav", "cannot be read as audio"),
        (
            "sample.py --run {story}/run --prompt {folder}/short.wav --out {folder}/s",
            "shorter than one frame",
        ),
        (
            "sample.py --run {story}/run --prompt {diana} --prompt_seconds 9 --out {folder}/s",
            "more than the model's context",
        ),
        ("sample.py --run {story}/run --temperature -1", "--temperature must be at least 0"),
        ("sample.py --run {story}/run --codec {mimi}", "is not the one that"),
        ("sample.py --run {story}/run --out {folder}/file/s", "Not a directory"),
        ("sample.py --seconds ten", "invalid float value"),
        ("sample.py --run {story}/run --out -", "needs --stream --num_samples 1"),
        ("evaluate.py --run {folder}/nowhere", "is not a run"),
        ("evaluate.py --run {story}/run --data {folder}/nowhere", "run python prepare.py"),
        ("evaluate.py --run {story}/run --codec {mimi}", "another codec than"),
        ("evaluate.py --run {story}/run --salmon {folder}/text", "none of SALMon's parts"),
        ("evaluate.py --run {story}/run --trials 0", "--trials must be at least 1"),
    ],
)
def test_a_mistake_gets_one_line_that_says_what_to_do(
    command, message, wrong, random_mimi, monkeypatch, capsys
):
    import prepare as prepare_script
    import sample as sample_script
    import train as train_script
    from nanomimi.config import run

    name, *argv = command.format(**wrong, diana=DIANA, mimi=random_mimi).split()
    parts = {
        "prepare.py": (PrepareConfig, prepare_script.prepare),
        "train.py": (TrainConfig, train_script.main),
        "sample.py": (SampleConfig, sample_script.sample),
        "evaluate.py": (EvaluateConfig, evaluate),
    }
    monkeypatch.setattr("sys.argv", [name, *argv])
    with pytest.raises(SystemExit) as stop:
        run(*parts[name])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{name}: ") and message in last, last


def test_the_scripts_run_as_scripts(story, tmp_path):
    shown = script("prepare.py", "--help")
    assert shown.returncode == 0 and "--out" in shown.stdout
    failed = script("sample.py", "--run", tmp_path)
    assert (
        failed.returncode == 2
        and failed.stderr.startswith("sample.py: ")
        and "Traceback" not in failed.stderr
    )
    resumed = script("train.py", "--out", story / "run", "--resume", "--max_steps", 5)
    assert resumed.returncode == 0, resumed.stderr
    assert checkpoint.read(story / "run")["step"] == 5
