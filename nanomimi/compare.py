"""The comparison of models at equal training FLOPs: python -m nanomimi.compare --budget small

F is flat, H hierarchical, D the delay pattern; H16 is H with a depth decoder that is trained on a
sixteenth of the frames. They predict the same tokens. The plan:

1. learning rates: least FLOPs, two widths, on --tune_data, which no table reports
2. every arm at every width and number of FLOPs: isoFLOP curves, flops.svg
3. seeds of each arm at its best width, evaluated along the training: consistency.svg, the test

The test: d' of F minus that of H, H16 and D at equal nats per frame, on unheard voices, with the
seeds of step 3; Holm's correction. Everything else is exploratory. The commands are printed as they
run. A second call goes on with what was stopped and repeats nothing.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, log10
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.bench import training_flops
from nanomimi.config import Config, option, parse, run_script
from nanomimi.data import TokenDataset
from nanomimi.evaluate.contrast import contrast, holm, nats_per_frame
from nanomimi.picture import plot
from nanomimi.tiny.digits import UNHEARD
from train import TrainConfig, describe

ARMS = {"F": "--arch flat", "H": "--arch hierarchical", "D": "--arch delay"}
# Variants have the width and the rate of their arm. By Q: half of the seeds, the last model alone.
H16 = {"H16": ("H", "--depth_fraction 0.0625")}
BY_Q = {f"{arm}, Q = {q}": (arm, f"--num_codebooks {q}") for q in (1, 2, 8) for arm in "FH"}
EQUIVALENT = 0.1  # d'


@dataclass(frozen=True)
class Plan:
    """`rates`: the grid of step 1, at width 192; a single one is used as it is. The first number
    of FLOPs takes the first four widths of each arm; each further one leaves out the next smallest.
    """

    rates: tuple[float, ...]
    widths: dict[str, tuple[int, ...]]
    flops: tuple[float, ...]
    variants: dict[str, tuple[str, str]]
    seeds: range  # of step 3; 0 is the run of step 2
    kept: int  # models along a training of step 3


WIDTHS = {"F": (64, 96, 128, 192, 256, 384), "H": (128, 192, 256, 384, 512, 768)}
WIDTHS["D"] = WIDTHS["H"]
PLANS = {
    "small": Plan((3e-3,), {"F": (128,), "H": (256,), "D": (256,)}, (1e13,), H16, range(2), 3),
    "full": Plan((1e-3, 2e-3, 4e-3, 8e-3), WIDTHS, (1e13, 4e13, 16e13), H16 | BY_Q, range(1, 5), 16),
}


@dataclass(frozen=True)
class CompareConfig(Config):
    data: tuple[Path, ...] = option((Path("data/digits"),), "folders written by prepare.py")
    tune_data: tuple[Path, ...] = option((Path("data/tune"),), "others, for the learning rates")
    out: Path = option(Path("runs/compare"), "folder for the runs, the tables and the pictures")
    budget: Literal["small", "full"] = option("small", "1e13 FLOPs a run, or up to 1.6e14")
    scale: float = option(1.0, "factor of all training FLOPs", above=0)
    trials: int = option(400, "trials of each prefix swap", at_least=1)
    listen: bool = option(True, "listen to generated digits")
    jobs: int = option(2, "runs at the same time, each on its share of the cores", at_least=1)


@dataclass(frozen=True)
class Cell:
    """A training."""

    arm: str
    flags: str
    width: int
    flops: float
    rate: float
    seed: int = 0
    kept: int = 0


def compare(config: CompareConfig) -> None:
    """Train and evaluate what is missing, then write OUT/tables.md and the pictures."""
    plan = PLANS[config.budget]
    flops = [config.scale * each for each in plan.flops]
    rates = {arm: tune(config, plan, arm, flops[0]) for arm in ARMS}
    grid = [
        Cell(arm, flags, width, each, rates[arm], kept=plan.kept if 0 in plan.seeds else 0)
        for i, each in enumerate(flops)
        for arm, flags in ARMS.items()
        for width in plan.widths[arm][i : i + 4]
    ]
    nats = {c: nats_per_frame(runs[-1], UNHEARD) for c, runs in trained(config, grid).items()}
    ranked = sorted(nats, key=nats.get, reverse=True)
    best = {(cell.arm, cell.flops): cell for cell in ranked}  # the last, with the least, stays
    middle = flops[len(flops) // 2]
    seeds = []
    for name, (arm, more) in ({arm: (arm, "") for arm in ARMS} | plan.variants).items():
        of = best[arm, middle]
        every, kept = (2, 0) if name in BY_Q else (1, plan.kept)
        for seed in plan.seeds[::every]:
            seeds.append(Cell(name, f"{of.flags} {more}", of.width, middle, of.rate, seed, kept))
    per_arm: dict[str, list[list[Path]]] = {}
    for cell, runs in trained(config, seeds, config.listen).items():
        per_arm.setdefault(cell.arm, []).append(runs)
    kinds = list(_read(per_arm["F"][0][0], "trials"))
    primary = UNHEARD if UNHEARD in kinds else kinds[0]
    tests = {arm: contrast(per_arm["F"], per_arm[arm], primary) for arm in ("H", "H16", "D")}
    rows: list = [["arm", "width", "learning rate", "training FLOPs", "nats per frame", ""]]
    for c, n in nats.items():
        least = "least" if best[c.arm, c.flops] == c else ""
        rows.append([c.arm, c.width, f"{_lr(c):.2g}", f"{c.flops:.2g}", f"{n:.2f}", least])
    parts = table(rows), results(per_arm, kinds, config.listen), verdict(tests, primary)
    (config.out / "tables.md").write_text(text := "\n\n".join(parts) + "\n")
    print(text, end="")
    dots = {arm: [(log10(c.flops), n) for c, n in nats.items() if c.arm == arm] for arm in ARMS}
    lowest = {arm: [(log10(f), nats[best[arm, f]]) for f in flops] for arm in ARMS}
    svg = plot("log10 of training FLOPs", "held-out nats per frame", lowest, dots)
    (config.out / "flops.svg").write_text(svg)
    point = lambda run: (nats_per_frame(run, primary), consistency(run, primary)["d_prime"])
    dots = {arm: [point(run) for runs in per_arm[arm] for run in runs] for arm in (*ARMS, *H16)}
    svg = plot("held-out nats per frame", f"d', {primary}", {}, dots)
    (config.out / "consistency.svg").write_text(svg)


def tune(config: CompareConfig, plan: Plan, arm: str, flops: float) -> float:
    """The best rate of the grid, which grows until the best is not at an edge."""
    rates, loss = list(plan.rates), {}
    while len(rates) > 1:
        cells = [
            Cell("tune", ARMS[arm], width, flops, rate)
            for rate in rates
            for width in plan.widths[arm][:4:2]
        ]
        for cell, runs in trained(config, cells).items():
            lines = (runs[-1] / "log.jsonl").read_text().splitlines()
            last = [v for line in lines if (v := json.loads(line).get("validation"))][-1]
            loss.setdefault(cell.rate, {})[cell.width] = last["nats_per_frame"]
        best = min(rates, key=lambda rate: mean(loss[rate].values()))
        if best not in (rates[0], rates[-1]):
            return best
        rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, 2 * rates[-1]]
    return rates[0]


def trained(config: CompareConfig, cells: Sequence[Cell], listen: bool = False) -> dict:
    """Of each cell, the evaluated run folders along the training; the last is the run's own."""
    with ThreadPoolExecutor(config.jobs) as pool:
        work = pool.map(functools.partial(_run, config, listen), cells)
        return dict(zip(cells, tqdm(work, total=len(cells), unit="run")))


def _run(config: CompareConfig, listen: bool, cell: Cell) -> list[Path]:
    """Train, evaluate and listen, as far as it has not been done."""
    data = " ".join(map(str, config.tune_data if cell.arm == "tune" else config.data))
    flags = f"--data {data} {cell.flags} --n_embd {cell.width} --lr {_lr(cell):.3g} --dtype float32"
    flags += " --optimizer adamw"  # the paper's
    steps = max(2, round(cell.flops / flops_per_step(flags)))
    kept = f" --keep_every {ceil(steps / cell.kept)}" if cell.kept else ""
    name = f"{cell.arm} {cell.flags} {cell.width} {cell.flops:.1e} {cell.rate:.1e} {cell.seed}"
    run = config.out / re.sub("[^A-Za-z0-9.]+", "-", name)
    new = not (run / "run.json").exists()
    if new or checkpoint.read(run)["step"] < steps:
        # A tiny corpus allows few steps, and warm-up must not take most of them.
        flags += f" --seed {cell.seed} --warmup_steps {min(100, steps // 5)} --max_steps {steps}"
        _execute(config, run, f"train.py --out {run} {flags + kept if new else '--resume'}")
    if cell.arm == "tune":
        return [run]
    step = lambda folder: int(folder.name.removeprefix("step-"))
    # The last of the kept models may be the run itself.
    runs = [*(r for r in sorted(run.glob("step-*"), key=step) if step(r) < steps), run]
    for folder in runs:
        if not (folder / "evaluation.json").exists():
            words = f"-m nanomimi.evaluate --run {folder} --trials {config.trials}"
            _execute(config, run, words)
    if listen and not (run / "listen.json").exists():
        some = max(1, config.trials // 8)  # generating takes longer than scoring
        _execute(config, run, f"-m nanomimi.tiny.listen --run {run} --trials {some}")
    return runs


def _execute(config: CompareConfig, run: Path, words: str) -> None:
    tqdm.write(f"python {words}")
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.jobs))}
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run}.log", "a") as log:
        command = [sys.executable, *words.split()]
        if subprocess.run(command, stdout=log, stderr=log, env=env).returncode:
            raise ValueError(f"python {words} failed; see {log.name}")


@functools.cache
def flops_per_step(flags: str) -> float:
    """Forward and backward, two per multiply-add, attention in full."""
    config = parse(TrainConfig, flags.split())
    meta = TokenDataset(config.data, "train", config.num_codebooks).meta
    model = checkpoint.build(describe(config, meta, torch.float32)["model"]).train()
    tokens = torch.zeros(1, (model.max_frames + 1) * model.num_codebooks, dtype=torch.long)
    return config.batch_size * config.grad_accum * training_flops(model, tokens)


def _lr(cell: Cell) -> float:
    return cell.rate * 192 / cell.width


def _read(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / f"{name}.json").read_text())


def consistency(run: Path, kind: str) -> dict[str, Any]:
    return _read(run, "evaluation")["consistency"][kind]


def table(rows: Sequence[Sequence[Any]]) -> str:
    head, *body = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def results(per_arm: dict[str, list[list[Path]]], kinds: Sequence[str], listen: bool) -> str:
    """Mean ± standard deviation over the seeds of step 3."""
    columns: dict[str, Callable[[Path], float]] = {
        "M parameters": lambda run: _read(run, "evaluation")["parameters"] / 1e6
    }
    for kind in kinds:
        columns[f"nats per frame, {kind}"] = functools.partial(nats_per_frame, kind=kind)
        for name in ("d_prime", "accuracy", "margin"):
            columns[f"{name}, {kind}"] = lambda run, k=kind, n=name: consistency(run, k)[n]
    for key in _read(per_arm["F"][0][-1], "listen") if listen else ():
        columns[f"generated: {key}"] = lambda run, k=key: _read(run, "listen")[k][0]
    rows = [["arm", "seeds", *columns]]
    for arm, seeds in per_arm.items():
        values = [[of(runs[-1]) for runs in seeds] for of in columns.values()]
        show = lambda xs: " ± ".join(f"{f(xs):.2f}" for f in (mean, stdev)[: len(xs)])
        rows.append([arm, len(seeds), *map(show, values)])
    return table(rows)


def verdict(tests: dict[str, dict[str, Any]], kind: str) -> str:
    p = holm({arm: test["p"] for arm, test in tests.items()})
    within = f"equal within {EQUIVALENT}"
    rows = [[f"d' at equal nats, {kind}", "difference", "95% interval", "p, Holm", within]]
    for arm, test in tests.items():
        low, high = test["interval_90"]
        equal = "yes" if -EQUIVALENT < low and high < EQUIVALENT else "no"
        interval = "{:.2f} to {:.2f}".format(*test["interval"])
        rows.append([f"F - {arm}", f"{test['difference']:.2f}", interval, f"{p[arm]:.3f}", equal])
    return table(rows)


if __name__ == "__main__":
    run_script(CompareConfig, compare, __doc__)
