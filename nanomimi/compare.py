"""The paper's comparison in small, a run per core: python -m nanomimi.compare --jobs 2

Every model is trained and evaluated with every seed, by the commands that are printed; finished
runs are not repeated. OUT/compare.svg shows every run of flat against hierarchical.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.bench import training_flops
from nanomimi.config import Config, option, run_script
from nanomimi.picture import plot

COMPARISON = {
    "flat": "",
    "hierarchical, same parameters": "--arch hierarchical --n_hidden 480 --depth_n_hidden 320",
    "hierarchical, same compute": "--arch hierarchical --n_embd 384 --lr 1.5e-3",
}
MODELS = {**COMPARISON, **{f"flat, Q = {q}": f"--num_codebooks {q}" for q in (1, 2, 8)}}


@dataclass(frozen=True)
class CompareConfig(Config):
    data: Path = option(Path("data/digits"), "folder written by prepare.py")
    out: Path = option(Path("runs/compare"), "folder for the runs, the table and the picture")
    seeds: int = option(3, "seeds of every model", at_least=1)
    max_steps: int = option(1200, "optimizer steps", at_least=1)
    jobs: int = option(1, "runs at the same time, each on its share of the cores", at_least=1)


def compare(config: CompareConfig) -> None:
    """Train and evaluate what is missing, then print the table and draw the picture."""
    config.out.mkdir(parents=True, exist_ok=True)
    jobs = [(config, name, seed) for name in MODELS for seed in range(config.seeds)]
    with ThreadPoolExecutor(config.jobs) as pool:
        runs = list(tqdm(pool.map(train_and_evaluate, *zip(*jobs)), total=len(jobs), unit="run"))
    results, flops = {}, {}  # flops: millions for training one frame, forward and backward
    for name, *seeds in zip(MODELS, *(runs[i :: config.seeds] for i in range(config.seeds))):
        results[name] = [json.loads((run / "evaluation.json").read_text()) for run in seeds]
        model, _ = checkpoint.load(seeds[0])
        tokens = torch.zeros(1, (model.max_frames + 1) * model.num_codebooks, dtype=torch.long)
        flops[name] = training_flops(model, tokens) / model.max_frames / 1e6
    print(table(results, flops))
    # A dot is a run.
    point = lambda run: (run["held_out"]["nats_per_frame"], run["consistency"]["margin"])
    series = {name: [point(run) for run in results[name]] for name in COMPARISON}
    svg = plot("held-out nats per frame", "voice margin, nats per token", series, lines=False)
    (config.out / "compare.svg").write_text(svg)


def train_and_evaluate(config: CompareConfig, name: str, seed: int) -> Path:
    """The run folder, after what is missing of training and evaluation."""
    run = config.out / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}"
    if (run / "evaluation.json").exists():
        return run
    new = f"--data {config.data} --seed {seed} --max_steps {config.max_steps} {MODELS[name]}"
    flags = "--resume" if (run / "run.json").exists() else new
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.jobs))}
    for words in (f"train.py --out {run} {flags}", f"-m nanomimi.evaluate --run {run}"):
        tqdm.write(f"python {words}")
        with open(run.with_suffix(".log"), "a") as log:
            command = [sys.executable, *words.split()]
            if subprocess.run(command, stdout=log, stderr=log, env=env).returncode:
                raise ValueError(f"python {words} failed; see {log.name}")
    return run


def table(results: dict[str, list[dict]], flops: dict[str, float]) -> str:
    """Markdown: mean ± standard deviation over the seeds, or the number of a single seed."""
    head = "model | parameters | MFLOP per frame | nats per frame | by codebook | voice % | margin"
    rows = [head, "|".join(["---"] * 7)]
    show = lambda xs, digits: " ± ".join(f"{f(xs):.{digits}f}" for f in (mean, stdev)[: len(xs)])
    for name, runs in results.items():
        of = lambda part, key: [run[part][key] for run in runs]
        cells = [name, f"{runs[0]['parameters'] / 1e6:.2f}M", f"{flops[name]:.0f}"]
        by_codebook = (f"{mean(q):.2f}" for q in zip(*of("held_out", "nats_per_codebook")))
        cells += [show(of("held_out", "nats_per_frame"), 2), " ".join(by_codebook)]
        cells += [show([100 * share for share in of("consistency", "accuracy")], 0)]
        rows.append(" | ".join([*cells, show(of("consistency", "margin"), 3)]))
    return "\n".join(f"| {row} |" for row in rows)


if __name__ == "__main__":
    run_script(CompareConfig, compare, __doc__)
