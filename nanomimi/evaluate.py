"""runs/NAME -> numbers that compare models: python -m nanomimi.evaluate --run runs/digits

    held out       likelihood of the whole validation split
    consistency    does what was heard make its own voice likelier (prefix swap)?
    counting       and the digit that is next? (bundled digits only, same voice)
    SALMon         the benchmark's own pairs (arXiv 2409.07437), with --salmon FOLDER
    continuation   how prompts from held-out audio go on, beside how they really went on

All of it is computed in float32, printed, and written to runs/NAME/evaluation.json.
"""

import functools
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi import checkpoint, salmon
from nanomimi.codec import Codec
from nanomimi.config import Config, option, resolve_device, run
from nanomimi.data import TokenDataset
from nanomimi.likelihood import Trial, held_out, nats_of, prefix_swap
from nanomimi.sampling import sample
from nanomimi.tiny import digits
from nanomimi.tokens import before_end, separator

SILENCE = -30.0  # dB below the loudest frame of the prompt


@dataclass(frozen=True)
class EvaluateConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    data: Path | None = option(None, "data folder; default: the one of the run")
    codec: str | None = option(None, "where the codec is now, if not where prepare.py found it")
    salmon: Path | None = option(None, "folder of SALMon's parts: PART/sample_I_K.wav")
    trials: int = option(400, "trials of each prefix swap", at_least=1)
    clip_seconds: float = option(2.0, "longest prefix, and longest suffix, of a trial", above=0)
    prompts: int = option(64, "held-out utterances to continue", at_least=1)
    prompt_seconds: float = option(3.0, "longest prompt, and longest continuation", above=0)
    temperature: float = option(0.8, "temperature of the continuations", at_least=0)
    top_k: int = option(30, "top-k of the continuations; 0: all", at_least=0)
    batch_size: int = option(16, "windows scored at once; changes no result", at_least=1)
    seed: int = option(0, "seed of trials, intervals and draws", at_least=0)
    device: str = option("auto", "auto, cpu or cuda")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All evaluations of a run. Raises ValueError and FileNotFoundError as what it loads does."""
    device = resolve_device(config.device)
    model, about = checkpoint.load(config.run, device)
    data = TokenDataset(config.data or Path(about["config"]["data"]), "val", model.num_codebooks)
    codec = Codec.load(config.codec or data.meta["codec"], model.num_codebooks, device)
    for name, sha256 in ((data.path, data.meta["codec_sha256"]), (codec.name, codec.sha256)):
        if sha256 != about["data"]["codec_sha256"]:
            raise ValueError(
                f"{name} has another codec than {config.run} was trained with (its weights "
                "differ); give the right one with --data or --codec"
            )
    parts = salmon.parts(config.salmon) if config.salmon else {}
    score = partial(nats_of, model, config.batch_size)
    # A prefix and a suffix together fill a window at most.
    longest = min(max(1, round(config.clip_seconds * codec.frame_rate)), model.max_frames // 2)
    trials = {"acoustic_consistency": group_trials(data, config.trials, config.seed)}
    if {line["group"] for line in data.utterances()} <= set(digits.load_clips()):
        trials["counting"] = counting_trials(codec, config.trials, config.seed)
    results = {
        "arch": about["model"]["arch"],
        "step": about["step"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": str(data.path.parent),
        "seed": config.seed,
        "held_out": held_out(score, data, model.max_frames),
        **{name: prefix_swap(score, t, longest, config.seed, name) for name, t in trials.items()},
        "salmon": salmon.judge(score, codec, parts, model.max_frames),
        "continuation": continuation(model, codec, data, config),
    }
    (config.run / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


def group_trials(data: TokenDataset, count: int, seed: int) -> list[Trial]:
    """Clips of two groups, drawn at random; where under three have two utterances, of two files.

    A file's clips are its first and its last third: were they neighbours, one sequence of two would
    have no splice.
    """
    groups: dict[str, list[Tensor]] = defaultdict(list)
    files: dict[str, list[Tensor]] = {}
    for line in data.utterances():
        codes = data.codes(line["first_frame"], line["num_frames"])
        groups[line["group"]].append(codes)
        if third := codes.shape[1] // 3:
            # Of the place too: composed utterances may say the same and so have the same name.
            name = f"{line['file']} at frame {line['first_frame']}"
            files[name] = [codes[:, :third], codes[:, -third:]]
    speakers = {name: clips for name, clips in groups.items() if len(clips) > 1}
    clips = speakers if len(speakers) > 2 else files
    if len(clips) < 2:
        raise ValueError(f"{data.path} has too few utterances for a prefix swap; hold out more")
    rng, names = np.random.default_rng(seed), sorted(clips)

    def pair(name: str) -> tuple[Tensor, Tensor]:
        first, second = rng.choice(len(clips[name]), 2, replace=False)
        return clips[name][first], clips[name][second]

    drawn = ([names[i] for i in rng.choice(len(names), 2, replace=False)] for _ in range(count))
    return [Trial(pair(a), pair(b), (a, b)) for a, b in drawn]


def counting_trials(codec: Codec, count: int, seed: int) -> list[Trial]:
    """Three digits and the two that follow, from two places in the counting of one bundled voice.

    Swapped, the voice is still right and the digits are wrong.
    """
    rng, voices = np.random.default_rng(seed), digits.load_clips()

    @functools.cache
    def clip(name: str, first: int) -> tuple[Tensor, Tensor]:
        said = [(first + k) % 10 for k in range(5)]
        wavs = (digits.speak(voices[name], part, rng) for part in (said[:3], said[3:]))
        codes = (codec.encode(rearrange(torch.from_numpy(w), "s -> 1 1 s"))[0] for w in wavs)
        prefix, suffix = (c.cpu() for c in codes)
        return prefix, suffix

    trials = []
    for _ in range(count):
        name = str(rng.choice(sorted(voices)))
        i, j = rng.choice(10, 2, replace=False)
        trials.append(Trial(clip(name, int(i)), clip(name, int(j)), (name,)))
    return trials


def continuation(
    model: nn.Module, codec: Codec, data: TokenDataset, config: EvaluateConfig
) -> dict[str, Any]:
    """What held-out utterances, cut at prompt_seconds or half, go on with: drawn, and in truth."""
    draw = partial(
        sample,
        temperature=config.temperature,
        top_k=config.top_k,
        generator=torch.Generator(codec.device).manual_seed(config.seed),
    )
    longest = min(max(1, round(config.prompt_seconds * codec.frame_rate)), model.max_frames - 1)
    lines = [line for line in data.utterances() if line["num_frames"] > 1]
    order = np.random.default_rng(config.seed).permutation(len(lines))[: config.prompts]
    by_length: dict[int, list[Tensor]] = defaultdict(list)  # prompts of one length run together
    for line in (lines[i] for i in order):
        cut = min(longest, line["num_frames"] // 2)
        count = min(cut + longest, line["num_frames"])
        by_length[cut].append(data.codes(line["first_frame"], count))

    start = separator(model.num_codebooks, model.codebook_size)
    drawn, truth = [], []
    with tqdm(total=len(order), desc="continuation", unit="prompt") as bar:
        for cut, utterances in by_length.items():
            prompts = torch.stack([codes[:, :cut] for codes in utterances])
            begun = torch.cat([repeat(start, "q t -> b q t", b=len(prompts)), prompts], dim=2)
            frames = list(model.generate(begun.to(codec.device), longest, draw))
            drawn += zip(prompts, torch.stack(frames, dim=2).cpu())
            truth += ((codes[:, :cut], codes[:, cut:]) for codes in utterances)
            bar.update(len(utterances))
    sides = {"model": _statistics(codec, drawn), "held_out": _statistics(codec, truth)}
    return {"prompts": len(order), **sides}


def _statistics(codec: Codec, continued: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Of (prompt, continuation), both (Q, T): length, validity, silence and variety of frames."""
    frames, silent = [], []
    for prompt, new in continued:
        new = before_end(new, codec.codebook_size)
        valid = new[:, (new < codec.codebook_size).all(dim=0)]
        wav = codec.decode(torch.cat([prompt, valid], dim=1)[None])[0, 0].cpu()
        power = rearrange(wav, "(t s) -> t s", s=codec.frame_size).pow(2).mean(dim=1)
        quiet = power < power[: prompt.shape[1]].max() * 10 ** (SILENCE / 10)
        frames.append(new)
        silent.append(quiet[prompt.shape[1] :])
    codes, quiet = torch.cat(frames, dim=1), torch.cat(silent)
    return {
        "seconds": codes.shape[1] / len(frames) / codec.frame_rate,
        "valid_frames": len(quiet) / max(1, codes.shape[1]),
        "silent_frames": quiet.sum().item() / max(1, len(quiet)),
        "codebook_coverage": [len(row.unique()) / codec.codebook_size for row in codes],
    }


def table(results: dict[str, Any]) -> str:
    """The results as lines for the terminal: name, value, and what it is to be compared with."""
    percent = lambda share: f"{100 * share:.1f}%"
    each = lambda values: " ".join(f"{value:.2f}" for value in values)
    held = results["held_out"]
    low, high = held["left_context_frames"]
    behind = f"{held['frames']} frames, each behind {low} to {high}"
    codec_bits = f"of the codec's {held['codec_bits_per_second']:.0f}"
    rows = [
        ("nats per token", f"{held['nats_per_token']:.3f}", each(held["nats_per_codebook"])),
        ("nats per frame", f"{held['nats_per_frame']:.3f}", behind),
        ("bits per second", f"{held['bits_per_second']:.1f}", codec_bits),
    ]
    for name in ("acoustic_consistency", "counting"):
        if swap := results.get(name):
            low, high = (percent(bound) for bound in swap["interval"])
            counts = f"{low} to {high}; {swap['trials']} trials, {swap['groups']} groups"
            rows.append((name, percent(swap["accuracy"]), counts))
            margins = each(swap["margin_per_codebook"])
            rows.append(("  margin, nats per token", f"{swap['margin']:.3f}", margins))
    for name, part in results["salmon"].items():
        error = f"+- {percent(part['standard_error'])}; {part['pairs']} pairs"
        rows.append((name, percent(part["accuracy"]), error))
    made, real = (results["continuation"][side] for side in ("model", "held_out"))
    rows += [
        ("continued, seconds", f"{made['seconds']:.2f}", f"held out: {real['seconds']:.2f}"),
        ("  valid frames", percent(made["valid_frames"]), ""),
        ("  silent frames", percent(made["silent_frames"]), percent(real["silent_frames"])),
        ("  codes in use", each(made["codebook_coverage"]), each(real["codebook_coverage"])),
    ]
    return "\n".join(
        f"{name.replace('_', ' '):26}{value:>10}   {note}" for name, value, note in rows
    )


if __name__ == "__main__":
    run(EvaluateConfig, lambda config: print(table(evaluate(config))), __doc__)
