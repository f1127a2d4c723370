"""Seeded mutations of everything that comes from outside: python -m tests.fuzz --seed 0 --count 300

A case mutates a file or a flag and runs a script. The result of the unmutated input and one line with
status 2 are right; a traceback, another result, a hang and the end of the process are wrong.
"""

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import sphn
import torch
from safetensors.torch import load_file, save_file

import prepare
import sample
import train
from nanomimi.audio import write_wav
from nanomimi.config import run_script
from nanomimi.evaluate import __main__ as evaluate
from nanomimi.tiny import train_codec
from tests.conftest import save_random_mimi, small_shape, tone

SCRIPTS = {
    "prepare.py": (prepare.PrepareConfig, prepare.prepare),
    "train.py": (train.TrainConfig, train.main),
    "sample.py": (sample.SampleConfig, sample.sample),
    "evaluate.py": (evaluate.EvaluateConfig, evaluate.evaluate),
    "train_codec.py": (train_codec.CodecConfig, train_codec.train),
}
SMALL = "--num_codebooks 2 --max_frames 8 --n_layer 1 --n_head 2 --n_embd 8 --n_hidden 8 --log_every 1"
CODEC = "--minutes 0.1 --batch_size 1 --frames 1 --max_steps 1 --shape mimi.json --out codec"
COMMANDS = {
    "prepare": "prepare.py audio --codec mimi.safetensors --num_codebooks 3 --out data2",
    "again": "prepare.py audio --codec mimi.safetensors --num_codebooks 3 --val_fraction 0.5 --out data",
    "train": f"train.py --data data --out run2 {SMALL} --batch_size 2 --max_steps 1 --dtype float32",
    "resume": "train.py --out run --resume --max_steps 3",
    "sample": "sample.py --run run --seconds 0.3 --num_samples 1 --prompt audio/a/0.wav --prompt_seconds 0.3",
    "evaluate": "evaluate.py --run run --trials 4 --batch_size 4",
    "codec": f"train_codec.py {CODEC} --resume",
}
RESULTS = ("data2/train.bin", "data2/utterances.jsonl", "data/val.bin", "run2/model-000001.safetensors")
RESULTS += ("run/model-000003.safetensors", "samples/sample-0.wav", "run/evaluation.json")
# Never valid, or equal to what is valid.
ODD = [None, -1, -0.5, "", "x", [], {}, [[]], True, 2**70, 1e300, float("nan"), float("-inf"), "\0"]
FLAGS = ["-1", "0", "nan", "inf", "-inf", "1e-320", "1e308", "9" * 30, "", "x", "\0", "2", "0.5", "é"]


def call(line: list[str]) -> tuple[int, str]:
    """Status and last line of standard error of a script that runs in this process."""
    sys.argv, err = line, io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_script(*SCRIPTS[line[0]])
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, err.getvalue().replace("\r", "\n").strip().rpartition("\n")[2]


def make_world(folder: Path) -> None:
    """Small audio, codec, data and run, all valid, in the folder, which becomes the current one."""
    os.chdir(folder)
    save_random_mimi(Path("mimi.safetensors"), small_shape())
    for i in range(6):
        Path(f"audio/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        write_wav(Path(f"audio/{'ab'[i % 2]}/{i}.wav"), tone(0.9 + i / 10, 24000, 200 + 90 * i), 24000)
    sphn.write_opus("audio/a/6.opus", tone(0.9, 24000), 24000)
    shutil.copy(train_codec.digits.FOLDER / "slt.ogg", "audio/b/7.ogg")
    for line in (
        COMMANDS["again"],
        COMMANDS["train"].replace("run2", "run").replace("max_steps 1", "max_steps 2"),
        f"train_codec.py {CODEC}",
    ):
        assert call(line.split())[0] == 0, line


def results() -> list[bytes]:
    """What a command has written."""
    return [path.read_bytes() if path.exists() else b"" for path in map(Path, RESULTS)]


def damage_bytes(rng: np.random.Generator, path: Path) -> None:
    """Cut, extend, empty or replace the file, or make it something else."""
    content, how = path.read_bytes(), rng.integers(7)
    if how == 5:
        path.unlink()
        return rng.choice([path.mkdir, lambda: os.mkfifo(path), lambda: None])()
    junk = rng.bytes(50)
    cut = content[: rng.integers(len(content))]
    path.write_bytes([cut, content + junk, b"", junk, cut + junk, None, junk + content][how])


def damage_json(rng: np.random.Generator, path: Path) -> None:
    """Delete an entry of a JSON file, or of a line of it, or give it an odd value."""
    texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    line = rng.integers(len(texts))
    root = inside = json.loads(texts[line])
    while isinstance(inside, (dict, list)) and inside and (inside is root or rng.random() < 0.8):
        place, keys = inside, list(inside) if isinstance(inside, dict) else range(len(inside))
        key = keys[rng.integers(len(keys))]
        inside = place[key]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = ODD[rng.integers(len(ODD))]
    texts[line] = "[" * 100_000 if rng.random() < 0.03 else json.dumps(root)
    path.write_text("".join(f"{text}\n" for text in texts))


def damage_tensors(rng: np.random.Generator, path: Path) -> None:
    """Remove, shorten, add or poison a tensor."""
    tensors = load_file(path)
    name = sorted(tensors)[rng.integers(len(tensors))]
    tensor, how = tensors.pop(name), rng.integers(4)
    if how == 1:
        tensors[name] = tensor.flatten()[:-1].clone()
    elif how == 2:
        tensors |= {name: tensor, "another": torch.zeros(2)}
    elif how == 3 and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, torch.nan)
    save_file(tensors, path)


def damage_ids(rng: np.random.Generator, path: Path) -> None:
    """Give some tokens the ids of other codebooks."""
    ids = np.fromfile(path, np.uint16)
    ids[rng.integers(len(ids), size=40)] = rng.choice([65535, 16 * 3])
    ids.tofile(path)


def damage_wav(rng: np.random.Generator, path: Path) -> None:
    """A byte of the header, or an absurd sample and rate."""
    if rng.random() < 0.5:
        content = bytearray(path.read_bytes())
        content[rng.integers(44)] = rng.integers(256)
        return path.write_bytes(content)
    wav = tone(0.9, 24000)
    wav[rng.integers(len(wav))] = rng.choice([np.nan, np.inf, -1e38, 1e38, 1e4])
    rate = int(rng.choice([1, 100, 8000, 24000, 44100, 2**31]))
    form = np.array([16, 0x10003, rate, 0, 0x200004], "<u4").tobytes()
    head = b"RIFF\0\0\0\0WAVEfmt " + form + b"data"
    path.write_bytes(head + np.uint32(wav.nbytes).tobytes() + wav.tobytes())


DAMAGE = {".json": damage_json, ".jsonl": damage_json, ".safetensors": damage_tensors}
DAMAGE |= {".bin": damage_ids, ".wav": damage_wav}
TARGETS = {  # what is damaged, and the commands that read it
    "audio/*/*": ["prepare", "sample"],
    "data/*": ["train", "evaluate", "again"],
    "run/*": ["resume", "sample", "evaluate"],
    "mimi.*": ["prepare", "codec"],
    "codec/training.safetensors": ["codec"],
    "flags": list(COMMANDS),
}
FREE = ("run.json", "mimi.json", "utterances.jsonl", "settings.json")  # other names may be right


def fresh(world: Path) -> Path:
    """A copy of the world, which becomes the current folder."""
    folder = world.with_name("case")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder)
    os.chdir(folder)
    return folder


def case(world: Path, seed: int, index: int, expected: dict[str, list[bytes]]) -> tuple[str, str]:
    """Run one case; returns its outcome and what is known about it."""
    rng, folder = np.random.default_rng((seed, index)), fresh(world)
    target = list(TARGETS)[rng.integers(len(TARGETS))]
    name = TARGETS[target][rng.integers(len(TARGETS[target]))]
    line = COMMANDS[name].split()
    paths = sorted(folder.glob(target))
    if paths:
        path = paths[rng.integers(len(paths))]
        fits = DAMAGE.get(path.suffix, damage_bytes)
        (fits if rng.random() < 0.6 else damage_bytes)(rng, path)
        free = path.name in FREE or name == "again" or target.startswith("audio")
        target = path.name
    else:
        config, free = SCRIPTS[line[0]][0], True
        flags = [n for n, f in config.__dataclass_fields__.items() if not f.metadata["positional"]]
        line.append(f"--{flags[rng.integers(len(flags))]}={FLAGS[rng.integers(len(FLAGS))]}")
    told = f"case {index}, {target}: {' '.join(line)!a}"
    try:
        status, last = call(line)
    except BaseException:
        return "wrong: traceback", f"{told}\n{traceback.format_exc()}"
    if status == 0 and (free or results() == expected[name]):
        return "right", told
    if status in (1, 2) and last.startswith(line[0]):
        return "one line", f"{told}\n    {last}"
    return f"wrong: status {status}", f"{told}\n    {last}"


def child(pipe, world: Path, seed: int, indices: range, expected: dict[str, list[bytes]]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Rust reports its panics
    for index in indices:
        pipe.send(case(world, seed, index, expected))


def fuzz(seed: int, count: int, timeout: float = 60.0) -> list[tuple[str, str]]:
    """(outcome, description) of every case."""
    before, outcomes, context = Path.cwd(), [], multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        world, expected = Path(name) / "world", {}
        world.mkdir()
        make_world(world)
        for command, line in COMMANDS.items():
            fresh(world)
            assert call(line.split())[0] == 0, line
            expected[command] = results()
        while len(outcomes) < count:
            ours, theirs = context.Pipe()
            indices = range(len(outcomes), count)
            process = context.Process(target=child, args=(theirs, world, seed, indices, expected))
            process.start()
            theirs.close()
            try:
                while len(outcomes) < count:
                    how = "the process ended" if ours.poll(timeout) else "hang"
                    if how == "hang":
                        raise EOFError
                    outcomes.append(ours.recv())
            except EOFError:
                outcomes.append((f"wrong: {how}", f"case {len(outcomes)}"))
                process.kill()
            process.join()
        os.chdir(before)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    found = fuzz(**vars(parser.parse_args()))
    print(*(text for outcome, text in found if outcome.startswith("wrong")), sep="\n")
    print(dict(collections.Counter(outcome for outcome, _ in found)))
