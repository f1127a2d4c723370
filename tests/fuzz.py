"""Seeded mutations of everything that comes from outside: python -m tests.fuzz --seed 0 --count 300

A case mutates audio, data, a run, a codec or flags, and runs a script. It ends rightly in the result
of the unmutated input (or in a file that was rightly read), or in one line with status 2. A
traceback, another result, a hang and the end of the interpreter are wrong. Cases run in a child
process, which is replaced when it hangs or dies.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
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
    "train": f"train.py --data data --out run2 {SMALL} --batch_size 2 --max_steps 1 --dtype float32",
    "resume": "train.py --out run --resume --max_steps 3",
    "sample": "sample.py --run run --seconds 0.3 --num_samples 1 --prompt audio/a/0.wav --prompt_seconds 0.3",
    "evaluate": "evaluate.py --run run --trials 4 --batch_size 4",
    "codec": f"train_codec.py {CODEC} --resume",
}
RESULTS = ("data2/train.bin", "data2/utterances.jsonl", "run2/model-000001.safetensors")
RESULTS += ("run/model-000003.safetensors", "samples/sample-0.wav", "run/evaluation.json")
# Never valid, or equal to what is valid.
ODD = [None, -1, -0.5, "", "x", [], {}, [[]], True, 2**70, 1e300, float("nan"), float("-inf"), "\0"]
FLAGS = ["-1", "0", "nan", "inf", "-inf", "1e-320", "1e308", "9" * 30, "", "x", "\0", "2", "0.5", "é"]
Mutation = Callable[[np.random.Generator, Path], bool]  # -> may another result be right?


def call(line: list[str]) -> tuple[int, str]:
    """Status and last line of standard error of a script that runs in this process."""
    sys.argv, err = line, io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_script(*SCRIPTS[line[0]])
            status = 0
        except SystemExit as stop:
            status = stop.code
    text = err.getvalue().replace("\r", "\n").strip()
    return status, text.splitlines()[-1] if text else ""


def make_world(folder: Path) -> None:
    """Small audio, codec, data and run, all valid, in the folder, which becomes the current one."""
    os.chdir(folder)
    save_random_mimi(Path("mimi.safetensors"), small_shape())
    for i in range(6):
        Path(f"audio/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        write_wav(Path(f"audio/{'ab'[i % 2]}/{i}.wav"), tone(0.9 + i / 10, 24000, 200 + 90 * i), 24000)
    sphn.write_opus("audio/a/6.opus", tone(0.9, 24000), 24000)
    shutil.copy(train_codec.digits.FOLDER / "diana.ogg", "audio/b/7.ogg")
    for line in (
        COMMANDS["prepare"].replace("data2", "data") + " --val_fraction 0.5",
        COMMANDS["train"].replace("run2", "run").replace("max_steps 1", "max_steps 2"),
        f"train_codec.py {CODEC}",
    ):
        assert call(line.split())[0] == 0, line


def results() -> str:
    """What a command has written, as a hash."""
    written = hashlib.sha256()
    for path in map(Path, RESULTS):
        written.update(path.read_bytes() if path.exists() else b"none")
    return written.hexdigest()


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
    root = json.loads(texts[line])
    place = root
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[rng.integers(len(keys))]
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    if rng.random() < 0.3:
        del place[key]
    else:
        place[key] = ODD[rng.integers(len(ODD))]
    texts[line] = "[" * 100_000 if rng.random() < 0.03 else json.dumps(root)
    path.write_text("".join(f"{text}\n" for text in texts))


def damage_tensors(rng: np.random.Generator, path: Path) -> None:
    """Remove, add, reshape, cast or poison a tensor."""
    tensors = load_file(path)
    name = list(tensors)[rng.integers(len(tensors))]
    tensor, how = tensors[name], rng.integers(5)
    if how == 0 or tensor.dtype == torch.uint8:
        del tensors[name]
    elif how < 3:
        other = tensor.flatten()[:-1] if how == 1 else tensor.double()
        tensors[name] = other.clone() if tensor.numel() else torch.zeros(3)
    elif how == 3:
        tensors["another"] = torch.zeros(2)
    else:
        tensors[name] = torch.full_like(tensor, torch.nan)
    save_file(tensors, path)


def mutate_audio(rng: np.random.Generator, folder: Path) -> bool:
    path = list((folder / "audio").rglob("*.*"))[rng.integers(8)]
    if path.suffix != ".wav" or rng.random() < 0.4:
        damage_bytes(rng, path)
    elif rng.random() < 0.5:  # a byte of the header
        content = bytearray(path.read_bytes())
        content[rng.integers(44)] = rng.integers(256)
        path.write_bytes(content)
    else:
        wav = tone(0.9, 24000)
        wav[rng.integers(len(wav))] = rng.choice([np.nan, np.inf, -1e38, 1e38, 1e4])
        rate = int(rng.choice([1, 100, 8000, 24000, 44100, 2**31]))
        head = b"RIFF\0\0\0\0WAVEfmt " + np.array([16, 0x10003, rate, 0], "<u4").tobytes()
        head += np.array([4, 32], "<u2").tobytes() + b"data"
        path.write_bytes(head + np.uint32(wav.nbytes).tobytes() + wav.tobytes())
    return True  # what can be read is read


def mutate_data(rng: np.random.Generator, folder: Path) -> bool:
    names = ["meta.json", "utterances.jsonl", "train.bin", "val.bin"]
    path = folder / "data" / names[rng.integers(4)]
    if path.suffix != ".bin":
        (damage_json if rng.random() < 0.7 else damage_bytes)(rng, path)
    elif rng.random() < 0.5:
        damage_bytes(rng, path)
    else:
        ids = np.fromfile(path, np.uint16)
        ids[rng.integers(len(ids), size=40)] = rng.choice([65535, 16 * 3])
        ids.tofile(path)
    return path.name == "utterances.jsonl"  # names of files and groups are free


def mutate_run(rng: np.random.Generator, folder: Path) -> bool:
    names = ["run.json", "log.jsonl", "model-000002.safetensors", "optimizer-000002.safetensors"]
    path = folder / "run" / names[rng.integers(4)]
    fits = damage_tensors if path.suffix == ".safetensors" else damage_json
    (fits if rng.random() < 0.6 else damage_bytes)(rng, path)
    return path.suffix == ".json"  # such as another seed


def mutate_codec(rng: np.random.Generator, folder: Path) -> bool:
    names = ["mimi.json", "mimi.safetensors", "codec/training.safetensors"]
    path = folder / names[rng.integers(3)]
    fits = damage_json if path.suffix == ".json" else damage_tensors
    (fits if rng.random() < 0.6 else damage_bytes)(rng, path)
    return path.suffix == ".json"


MUTATIONS: dict[str, tuple[Mutation | None, list[str]]] = {
    "audio": (mutate_audio, ["prepare", "sample"]),
    "data": (mutate_data, ["train", "evaluate"]),
    "run": (mutate_run, ["resume", "sample", "evaluate"]),
    "codec": (mutate_codec, ["prepare", "codec"]),
    "flags": (None, list(COMMANDS)),
}


def case(world: Path, seed: int, index: int, expected: dict[str, str]) -> tuple[str, str]:
    """Run one case; returns its outcome and what is known about it."""
    rng, folder = np.random.default_rng((seed, index)), world.with_name("case")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder)
    os.chdir(folder)
    kind = list(MUTATIONS)[rng.integers(len(MUTATIONS))]
    mutate, commands = MUTATIONS[kind]
    name = commands[rng.integers(len(commands))]
    line = COMMANDS[name].split()
    if mutate is None:
        config = SCRIPTS[line[0]][0]
        flags = [n for n, f in config.__dataclass_fields__.items() if not f.metadata["positional"]]
        free = True
        line.append(f"--{flags[rng.integers(len(flags))]}={FLAGS[rng.integers(len(FLAGS))]}")
    else:
        free = mutate(rng, folder)
    told = f"case {index}, {kind}: {' '.join(line)!a}"
    try:
        status, last = call(line)
    except BaseException:
        return "wrong: traceback", f"{told}\n{traceback.format_exc()}"
    if status == 0 and (free or results() == expected[name]):
        return "right", told
    if status in (1, 2) and last.startswith(line[0]):
        return "one line", f"{told}\n    {last}"
    return f"wrong: status {status}", f"{told}\n    {last}"


def child(pipe, world: Path, seed: int, indices: range, expected: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Rust reports its panics
    for index in indices:
        pipe.send((index, *case(world, seed, index, expected)))


def fuzz(seed: int, count: int, start: int = 0, timeout: float = 60.0) -> list[tuple[str, str]]:
    """(outcome, description) of the cases `start` to `start + count - 1`."""
    torch.set_num_threads(1)
    before, outcomes, context = Path.cwd(), [], multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        world, expected = Path(name) / "world", {}
        world.mkdir()
        make_world(world)
        for command, line in COMMANDS.items():
            shutil.copytree(world, world.with_name("case"))
            os.chdir(world.with_name("case"))
            assert call(line.split())[0] == 0, line
            expected[command] = results()
            shutil.rmtree(world.with_name("case"))
        while len(outcomes) < count:
            ours, theirs = context.Pipe()
            indices = range(start + len(outcomes), start + count)
            process = context.Process(target=child, args=(theirs, world, seed, indices, expected))
            process.start()
            theirs.close()
            try:
                while len(outcomes) < count:
                    if not ours.poll(timeout):
                        raise TimeoutError
                    outcomes.append(ours.recv()[1:])
            except (TimeoutError, EOFError) as error:
                how = "hang" if isinstance(error, TimeoutError) else "the interpreter ended"
                outcomes.append((f"wrong: {how}", f"case {start + len(outcomes)}"))
                process.kill()
            process.join()
        os.chdir(before)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--start", type=int, default=0, help="the first case")
    flags = parser.parse_args()
    found = fuzz(flags.seed, flags.count, flags.start)
    print(*(text for outcome, text in found if outcome.startswith("wrong")), sep="\n")
    print(dict(collections.Counter(outcome for outcome, _ in found)))
