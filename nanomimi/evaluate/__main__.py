"""runs/NAME -> runs/NAME/evaluation.json, in float32: python -m nanomimi.evaluate --run runs/NAME

Held-out likelihood, voice consistency by prefix swap, and --pairs of clips in SALMon's layout.
trials.json keeps d of every trial, so that any other test can be made of them.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pprint import pprint
from typing import Any

import numpy as np

from nanomimi import checkpoint
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.data import AGAIN, TokenDataset
from nanomimi.distributed import resolve_device
from nanomimi.evaluate.likelihood import Trial, held_out, kind_of, prefix_swap, score, summary
from nanomimi.evaluate.pairs import find_pairs, judge
from nanomimi.tokens import separator


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
    # Two separators, a prefix and a suffix: a window at most.
    longest = round(config.clip_seconds * codec.frame_rate)
    longest = min(max(1, longest), max(1, (model.max_frames - 1) // 2))
    end, consistency, kept = separator(model.num_codebooks, model.codebook_size), {}, {}
    for kind, trials in group_trials(data, config.trials, config.seed).items():
        d, groups = prefix_swap(scorer, trials, longest, end), [trial.groups for trial in trials]
        consistency[kind] = summary(d, groups, config.seed)
        kept[kind] = {"groups": groups, "d": d.tolist()}
    results = {
        "arch": run["model"]["arch"],
        "step": run["step"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": [str(folder) for folder in folders],
        "seed": config.seed,
        "held_out": held_out(scorer, data, model.max_frames),
        "consistency": consistency,
        "pairs": judge(scorer, codec, pairs, model.max_frames),
    }
    (config.run / "trials.json").write_text(json.dumps(kept) + "\n")
    (config.run / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def group_trials(data: TokenDataset, count: int, seed: int) -> dict[str, list[Trial]]:
    """Random clips of two groups, or of two files where under three groups have two utterances.

    A file's name may end with the digits it says; then no word of a prefix is one of a suffix.
    """
    kinds: dict[str, dict] = {}
    for line in data.utterances():
        groups, files = kinds.setdefault(kind_of(line["group"]), (defaultdict(list), {}))
        codes = data.codes(line["first_frame"], line["num_frames"])
        words = (re.findall(r" (\d+)$", line["file"]) or [""])[0]
        groups[line["group"]].append((codes, words))
        if third := codes.shape[1] // 3:
            # Neighbouring thirds would join without a splice. Composed utterances may share a name.
            name = f"{line['file']} at frame {line['first_frame']}"
            files[name] = [(codes[:, :third], ""), (codes[:, -third:], "")]
    return {kind: _trials(*both, count, seed, data) for kind, both in kinds.items()}


def _trials(groups: dict, files: dict, count: int, seed: int, data: TokenDataset) -> list[Trial]:
    speakers = {name: clips for name, clips in groups.items() if len(clips) > 1}
    clips = speakers if len(speakers) > 2 else files
    if len(clips) < 2:
        raise ValueError(f"{data.folders[0]} has too few held-out utterances; hold out more")
    rng, names, trials = np.random.default_rng(seed), sorted(clips), []
    two = lambda items: [items[i] for i in rng.choice(len(items), 2, replace=False)]
    for _ in range(1000 * count):
        a, b = two(names)
        (a1, a2), (b1, b2) = two(clips[a]), two(clips[b])
        # Prefixes are cut from the end and suffixes from the start, to four digits at most.
        if not set(a1[1][-4:] + b1[1][-4:]) & set(a2[1][:4] + b2[1][:4]):
            trials.append(Trial(((a1[0], a2[0]), (b1[0], b2[0])), (a, b)))
        if len(trials) == count:
            break
    return trials


if __name__ == "__main__":
    rounded = lambda text: json.loads(text, parse_float=lambda number: round(float(number), 4))
    show = lambda config: pprint(rounded(json.dumps(evaluate(config))), sort_dicts=False)
    run_script(EvaluateConfig, show, __doc__)
