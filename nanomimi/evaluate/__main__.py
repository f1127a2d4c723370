"""runs/NAME -> runs/NAME/evaluation.json, in float32: python -m nanomimi.evaluate --run runs/NAME

Held-out likelihood, voice consistency by prefix swap, and --pairs of clips in SALMon's layout.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanomimi import checkpoint
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.data import AGAIN, TokenDataset
from nanomimi.distributed import resolve_device
from nanomimi.evaluate.likelihood import Trial, held_out, prefix_swap, score
from nanomimi.evaluate.pairs import find_pairs, judge


@dataclass(frozen=True)
class EvaluateConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    data: tuple[Path, ...] | None = option(None, "data folders; default: those of the run")
    codec: str | None = option(None, "where the codec is now, if not where prepare.py found it")
    pairs: Path | None = option(None, "folder of pairs: PART/sample_I_K.wav")
    trials: int = option(400, "trials of each prefix swap", at_least=1)
    clip_seconds: float = option(2.0, "longest prefix, and longest suffix, of a trial", above=0)
    batch_size: int = option(16, "windows scored at once; changes no result", at_least=1)
    seed: int = option(0, "seed of trials, intervals and draws", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All evaluations of a run. Raises ValueError and FileNotFoundError as what it loads does."""
    device = resolve_device(config.device)
    model, run = checkpoint.load(config.run, device)
    folders = config.data or [Path(path) for path in run["config"]["data"]]
    data = TokenDataset(folders, "val", model.num_codebooks)
    codec = Codec.load(config.codec or data.meta["codec"], model.num_codebooks, device)
    for name, sha256 in ((folders[0], data.meta["codec_sha256"]), (codec.name, codec.sha256)):
        if sha256 != run["data"]["codec_sha256"]:
            raise ValueError(f"{name} has another codec than {config.run}; use --data or --codec")
    if data.meta["frame_rate"] != codec.frame_rate:
        raise ValueError(f"{folders[0]} has another frame rate than its codec; {AGAIN}")
    pairs = find_pairs(config.pairs) if config.pairs else {}
    scorer = partial(score, model, config.batch_size)
    # A prefix and a suffix together fill a window at most.
    longest = min(max(1, round(config.clip_seconds * codec.frame_rate)), model.max_frames // 2)
    trials = group_trials(data, config.trials, config.seed)
    results = {
        "arch": run["model"]["arch"],
        "step": run["step"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": [str(folder) for folder in folders],
        "seed": config.seed,
        "held_out": held_out(scorer, data, model.max_frames),
        "consistency": prefix_swap(scorer, trials, longest, config.seed),
        "pairs": judge(scorer, codec, pairs, model.max_frames),
    }
    (config.run / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def group_trials(data: TokenDataset, count: int, seed: int) -> list[Trial]:
    """Random clips of two groups, or of two files where under three groups have two utterances."""
    groups, files = defaultdict(list), {}
    for line in data.utterances():
        codes = data.codes(line["first_frame"], line["num_frames"])
        groups[line["group"]].append(codes)
        if third := codes.shape[1] // 3:
            # Neighbouring thirds would join without a splice. Composed utterances may share a name.
            name = f"{line['file']} at frame {line['first_frame']}"
            files[name] = [codes[:, :third], codes[:, -third:]]
    speakers = {name: clips for name, clips in groups.items() if len(clips) > 1}
    clips = speakers if len(speakers) > 2 else files
    if len(clips) < 2:
        raise ValueError(f"{data.folders[0]} has too few held-out utterances; hold out more")
    rng, names = np.random.default_rng(seed), sorted(clips)
    two = lambda items: [items[i] for i in rng.choice(len(items), 2, replace=False)]
    return [Trial((two(clips[a]), two(clips[b])), (a, b)) for a, b in map(two, [names] * count)]


def lines(results: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The results for the terminal: a line per entry of evaluation.json, under its name there."""
    for name, value in results.items():
        if isinstance(value, dict):
            yield from lines(value, f"{prefix}{name} ")
        else:
            shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in np.atleast_1d(value))
            yield f"{prefix + name:36} {' '.join(shown)}"


if __name__ == "__main__":
    run_script(EvaluateConfig, lambda config: print(*lines(evaluate(config)), sep="\n"), __doc__)
