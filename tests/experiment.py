"""The paper's comparison in small: flat against hierarchical, then one to eight codebooks.

    python -m tests.experiment --jobs 2                       the bundled digits, a run per core
    python -m tests.experiment --data data/fsdd --max_steps 150 --out runs/experiment-fsdd

Every model is trained with every seed by train.py and judged by nanomimi.evaluate, as the commands
that are printed say; finished runs are not repeated. Then speed is measured, all models in turns,
and the tables of the README are printed. OUT/experiment.svg shows the runs of the comparison.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanomimi import checkpoint, separator
from nanomimi.config import Config, option, run
from nanomimi.data import TokenDataset
from nanomimi.timing import interleave, speak_turn, train_turn, training_flops

BATCH, FRAMES = 4, 25  # windows of a step, and frames spoken, where speed is measured
SWAPS = {"acoustic_consistency": "voice", "counting": "counting"}
WIDTH, HEIGHT = 420, 360  # of a panel of the picture
COLOURS = ("#d95f02", "#1b9e77", "#7570b3")

COMPARISON = {
    "flat": "",
    "hierarchical, same parameters": "--arch hierarchical --n_hidden 480 --depth_n_hidden 320",
    "hierarchical, same compute": "--arch hierarchical --n_embd 384 --lr 1.5e-3",
}
CODEBOOKS = {f"flat, Q = {q}": f"--num_codebooks {q}" for q in (1, 2, 8)}


@dataclass(frozen=True)
class ExperimentConfig(Config):
    data: Path = option(Path("data/digits"), "folder written by prepare.py")
    out: Path = option(Path("runs/experiment"), "folder for the runs, the tables and the picture")
    seeds: int = option(3, "seeds of every model", at_least=1)
    max_steps: int = option(1200, "optimizer steps", at_least=1)
    jobs: int = option(1, "runs at once, each on its share of the cores", at_least=1)

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"


def experiment(config: ExperimentConfig) -> None:
    models = {**COMPARISON, **CODEBOOKS}
    jobs = [(name, seed) for name in models for seed in range(config.seeds)]
    config.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(config.jobs) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for _ in pool.map(lambda job: _train_and_evaluate(config, *job, models[job[0]]), jobs):
            bar.update()
    results = {
        name: [_json(config.folder(name, seed) / "evaluation.json") for seed in range(config.seeds)]
        for name in models
    }
    print(table(results, speeds(config, list(models))))
    path = config.out / "experiment.svg"
    path.write_text(picture({name: results[name] for name in COMPARISON}))
    print(path)


def _train_and_evaluate(config: ExperimentConfig, name: str, seed: int, flags: str) -> None:
    out = config.folder(name, seed)
    if not (out / "run.json").exists():
        where = f"--data {config.data} --out {out} --seed {seed} --max_steps {config.max_steps}"
        _command(f"train.py {where} {flags}", config, out.with_suffix(".log"))
    elif checkpoint.read(out)["step"] < config.max_steps:
        _command(f"train.py --out {out} --resume", config, out.with_suffix(".log"))
    if not (out / "evaluation.json").exists():
        _command(f"-m nanomimi.evaluate --run {out}", config, out.with_suffix(".log"))


def _command(words: str, config: ExperimentConfig, log: Path) -> None:
    tqdm.write(f"python {words}")
    threads = str(max(1, (os.cpu_count() or 1) // config.jobs))
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, *words.split()],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": threads},
        )
    if done.returncode:
        raise ValueError(f"python {words} failed; see {log}")


@dataclass(frozen=True)
class Speed:
    """What one frame of a model costs."""

    megaflops: float  # of training, forward and backward
    training: float  # seconds of audio per second
    generation: float  # milliseconds, of one row


def speeds(config: ExperimentConfig, names: list[str]) -> dict[str, Speed]:
    """Of the runs of seed 0, in float32, in turns."""
    models = {name: checkpoint.load(config.folder(name, 0))[0] for name in names}
    data = {name: TokenDataset(config.data, "train", m.num_codebooks) for name, m in models.items()}
    result, turns, flops = {}, {}, {}
    for name, model in models.items():
        tokens = data[name].train_batch(0, BATCH, model.max_frames, seed=0)
        flops[name] = training_flops(model, tokens) / (BATCH * model.max_frames)
        # What is trained here moves the weights, so generation has a copy of them.
        speaker = checkpoint.load(config.folder(name, 0))[0]
        prompt = separator(model.num_codebooks, model.codebook_size)[None]
        turns[f"train {name}"] = train_turn(model, tokens, torch.float32)
        turns[f"speak {name}"] = speak_turn(speaker, prompt, FRAMES)
    times = {key: sum(parts.values()) for key, parts in interleave(turns, 9, "speed").items()}
    for name, model in models.items():
        audio = BATCH * model.max_frames / data[name].meta["frame_rate"]
        spoken = 1000 * times[f"speak {name}"] / FRAMES
        result[name] = Speed(flops[name] / 1e6, audio / times[f"train {name}"], spoken)
    return result


def table(results: dict[str, list[dict[str, Any]]], speed: dict[str, Speed]) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    head = ["model", "parameters", "MFLOP per frame", "nats per frame", "by codebook"]
    swaps = [swap for swap in SWAPS if all(swap in r for runs in results.values() for r in runs)]
    head += [title for swap in swaps for title in (f"{SWAPS[swap]}, %", "margin")]
    head += ["training", "generation"]
    rows = [head, ["---"] * len(head)]
    for name, runs in results.items():
        held = [r["held_out"] for r in runs]
        by_codebook = zip(*(h["nats_per_codebook"] for h in held))
        size, s = f"{runs[0]['parameters'] / 1e6:.2f}M", speed[name]
        row = [name, size, f"{s.megaflops:.0f}", _mean([h["nats_per_frame"] for h in held], 2)]
        row.append(" ".join(f"{statistics.mean(nats):.2f}" for nats in by_codebook))
        for swap in swaps:
            row.append(_mean([100 * r[swap]["accuracy"] for r in runs], 0))
            row.append(_mean([r[swap]["margin"] for r in runs], 3))
        rows.append([*row, f"{s.training:.0f} x", f"{s.generation:.1f} ms"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def picture(results: dict[str, list[dict[str, Any]]]) -> str:
    """SVG of two panels, margins of voice and of counting over nats per frame; a dot is a run."""
    panels = [key for key in SWAPS if all(key in r for runs in results.values() for r in runs)]
    marks = [_panel(i, SWAPS[key], key, results) for i, key in enumerate(panels)]
    width, height = WIDTH * len(panels), HEIGHT + 24 * len(results)
    for i, (name, colour) in enumerate(zip(results, COLOURS)):
        y = HEIGHT + 24 * i
        marks.append(f'<circle cx="70" cy="{y}" r="5" fill="{colour}"/>')
        marks.append(f'<text x="84" y="{y + 5}">{name}</text>')
    body = "\n".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="14">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _panel(place: int, title: str, key: str, results: dict[str, list[dict[str, Any]]]) -> str:
    left, right, top, bottom = WIDTH * place + 70, WIDTH * (place + 1) - 20, 40, HEIGHT - 70
    nats = lambda r: r["held_out"]["nats_per_frame"]
    margin = lambda r: r[key]["margin"]
    every = [r for runs in results.values() for r in runs]
    low, high = min(map(nats, every)), max(map(nats, every))
    least, most = min(0.0, *map(margin, every)), max(map(margin, every))
    x = lambda value: left + 20 + (value - low) / (high - low) * (right - left - 40)
    y = lambda value: bottom - (value - least) / (most - least) * (bottom - top - 20)
    marks = [
        f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="black"/>',
        f'<text x="{left}" y="{top - 14}">{title}: margin, nats per token (more is better)</text>',
        f'<text x="{left}" y="{bottom + 40}">held-out nats per frame (less is better)</text>',
    ]
    for value in (low, high):
        marks.append(
            f'<text x="{x(value):.0f}" y="{bottom + 20}" text-anchor="middle">{value:.2f}</text>'
        )
    for value in (least, most):
        marks.append(
            f'<text x="{left - 8}" y="{y(value) + 5:.0f}" text-anchor="end">{value:.2f}</text>'
        )
    for (_, runs), colour in zip(results.items(), COLOURS):
        for r in runs:
            marks.append(
                f'<circle cx="{x(nats(r)):.1f}" cy="{y(margin(r)):.1f}" r="5" fill="{colour}"/>'
            )
    return "\n".join(marks)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


if __name__ == "__main__":
    run(ExperimentConfig, experiment, __doc__)
