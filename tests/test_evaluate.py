"""python -m nanomimi.evaluate, on untrained models and on a model of one voice."""

import ast
import itertools
import json
import runpy
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomimi import Codec, DatasetWriter, TokenDataset, checkpoint
from nanomimi.audio import read_audio, write_wav
from nanomimi.evaluate.__main__ import EvaluateConfig, evaluate, group_trials
from nanomimi.evaluate.likelihood import score, summary
from nanomimi.evaluate.pairs import find_pairs, judge
from nanomimi.tiny import digits
from train import TrainConfig, describe, train

QUICK = dict(trials=20, device="cpu")
PARTS = ("rms", "slt")  # whose voice is the positive
VOICES = ("rms", "slt")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """SALMon's layout: a positive in rms's voice, a negative in slt's, and the reverse."""
    folder, voices = tmp_path_factory.mktemp("pairs"), digits.load_clips()
    rng = np.random.default_rng(0)
    for part, swapped in zip(PARTS, (False, True)):
        (folder / part).mkdir()
        for i in range(8):
            said = [(i + k) % 10 for k in range(2)]
            for k, voice in enumerate(reversed(VOICES) if swapped else VOICES):
                wav = digits.speak(voices[voice], said, rng)
                write_wav(folder / part / f"sample_{i}_{k}.wav", wav, digits.SAMPLE_RATE)
    return folder


def fresh_run(data: Path, out: Path, arch: str, seed: int = 0) -> Path:
    """A run folder with an untrained model."""
    config = TrainConfig(data=(data,), out=out, arch=arch, n_layer=1, n_embd=32, max_frames=64)
    run = describe(config, TokenDataset([data], "train", 4).meta, torch.float32)
    torch.manual_seed(seed)
    model = checkpoint.build(run["model"])
    out.mkdir()
    checkpoint.save(out, 0, model, torch.optim.AdamW(model.parameters()), run)
    return out


@pytest.mark.parametrize("arch", checkpoint.MODELS)
def test_an_untrained_model_is_at_chance_in_every_pairwise_test(arch, counted, pairs, tmp_path):
    run = fresh_run(counted, tmp_path / "run", arch)
    results = evaluate(EvaluateConfig(run=run, pairs=pairs, trials=100, device="cpu"))
    assert set(results["consistency"]) == {digits.KNOWN, digits.UNHEARD}
    for result in results["consistency"].values():
        low, high = result["accuracy_interval"]
        assert low <= 0.5 <= high
        assert abs(result["margin"]) < 0.04
    assert results["held_out"]["nats_per_token"] == pytest.approx(np.log(257), abs=0.1)
    # The parts of the folder mirror one another, and so must a preference for a voice.
    shares = [results["pairs"][part] for part in PARTS]
    error = np.hypot(*(share["standard_error"] for share in shares))
    assert abs(shares[0]["accuracy"] + shares[1]["accuracy"] - 1) <= 2 * error


@pytest.fixture(scope="session")
def one_voice(tmp_path_factory) -> Path:
    """A run trained on rms alone."""
    folder, codec = tmp_path_factory.mktemp("voice"), Codec.load("tiny", 4)
    voice, rng = digits.load_clips()[VOICES[0]], np.random.default_rng(1)
    with DatasetWriter(folder / "data", codec) as writer:
        for i in range(24):
            wav = digits.speak(voice, [(i + k) % 10 for k in range(8)], rng)
            codes = codec.encode(torch.from_numpy(wav)[None, None])[0]
            writer.add("val" if i % 3 == 0 else "train", codes, file="rms", group="rms")
    shape = dict(n_layer=1, n_embd=32, max_frames=64, dtype="float32", device="cpu")
    steps = dict(max_steps=80, warmup_steps=5, lr=0.01, eval_windows=8)
    train(TrainConfig(data=(folder / "data",), out=folder / "run", **shape, **steps))
    return folder / "run"


@pytest.fixture(scope="session")
def judged(one_voice, pairs) -> dict:
    return evaluate(EvaluateConfig(run=one_voice, pairs=pairs, **QUICK))


def test_a_model_of_one_voice_prefers_that_voice(judged):
    assert judged["pairs"][PARTS[0]]["accuracy"] >= 0.9
    assert judged["pairs"][PARTS[1]]["accuracy"] <= 0.1
    assert judged["consistency"]["all"]["groups"] > 1  # one voice: files are compared


def test_pairs_are_in_numeric_order_and_ties_count_half(pairs, one_voice, tmp_path):
    model, _ = checkpoint.load(one_voice)
    codec = Codec.load("tiny", 4)
    part = tmp_path / "rir_consistency"
    part.mkdir()
    first, second = (pairs / PARTS[0] / f"sample_0_{k}.wav" for k in (0, 1))
    for i, (positive, negative) in enumerate([(first, second), (second, first), (first, first)]):
        # 9 comes before 10 as a number, and after it as text.
        (part / f"sample_{i}_9.wav").write_bytes(positive.read_bytes())
        (part / f"sample_{i}_10.wav").write_bytes(negative.read_bytes())
    result = judge(partial(score, model, 4), codec, find_pairs(tmp_path), model.max_frames)
    error = pytest.approx(np.std([1, 0, 0.5]) / np.sqrt(3))
    assert result == {
        "rir_consistency": {
            **{f"accuracy{by}": 0.5 for by in ("", "_of_codebook_0")},
            **{f"standard_error{by}": error for by in ("", "_of_codebook_0")},
            "pairs": 3,
        }
    }
    (part / "sample_1_9.wav").unlink()
    (part / "sample_2_9.wav").unlink()
    (part / "sample_2_10.wav").unlink()
    with pytest.raises(ValueError, match="sample 1 needs two files; has 1"):
        find_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no pairs"):
        find_pairs(part)


def test_a_clip_is_scored_whole_as_the_mean_over_its_tokens(pairs, one_voice):
    model, _ = checkpoint.load(one_voice)
    codec, seen = Codec.load("tiny", 4), []

    def scorer(pieces):
        for codes, first in pieces:
            # Positives are likelier by so little that only a mean is right at any length.
            nats = 1.0 + 0.001 * (len(seen) % 2)
            seen.append(codes.shape[1] - first)
            rows = torch.full((codes.shape[1] - first, 4), nats)
            rows[:, 0] = 1.0 - 0.001 * (len(seen) % 2 == 0)  # codebook 0 alone says the opposite
            rows[:, 1:] += (1.0 - rows[:, :1]) / 3
            yield rows

    result = judge(scorer, codec, find_pairs(pairs), max_frames=512)
    assert all(part["accuracy"] == 1.0 for part in result.values())
    assert all(part["accuracy_of_codebook_0"] == 0.0 for part in result.values())
    assert any(positive > negative for positive, negative in zip(seen[::2], seen[1::2]))
    frames = lambda path: -(-len(read_audio(path, codec.sample_rate)) // codec.frame_size)
    paths = [pairs / p / f"sample_{i}_{k}.wav" for p in PARTS for i in range(8) for k in (0, 1)]
    assert seen == [frames(path) for path in paths]


def test_the_numbers_depend_on_the_seed_and_not_on_the_batch_size(judged, one_voice, pairs):
    config = EvaluateConfig(run=one_voice, pairs=pairs, **QUICK)
    again = evaluate(replace(config, batch_size=3))
    assert numbers(again) == pytest.approx(numbers(judged), rel=1e-5, abs=1e-5)  # float32's
    other = evaluate(replace(config, seed=1, pairs=None))
    assert other["held_out"] == judged["held_out"]
    margin = lambda results: results["consistency"]["all"]["margin"]
    assert margin(other) != margin(judged)
    assert other == json.loads((one_voice / "evaluation.json").read_text())


def test_the_command_prints_the_evaluation(one_voice, capsys, monkeypatch):
    command = f"evaluate --run {one_voice} --trials {QUICK['trials']} --device cpu"
    monkeypatch.setattr("sys.argv", command.split())
    monkeypatch.delitem(sys.modules, "nanomimi.evaluate.__main__")
    runpy.run_module("nanomimi.evaluate", run_name="__main__")
    printed = ast.literal_eval(capsys.readouterr().out)
    saved = json.loads((one_voice / "evaluation.json").read_text())
    assert numbers(printed) == pytest.approx(numbers(saved), abs=1e-4)
    assert max(len(str(number).partition(".")[2]) for number in numbers(printed)) == 4


def test_trials_keep_kinds_apart_and_share_no_word(random_codec, tmp_path):
    with DatasetWriter(tmp_path / "data", random_codec, required=("val",)) as writer:
        for i, kind in itertools.product(range(60), (digits.KNOWN, digits.UNHEARD)):
            said = "".join(str((i + k) % 10) for k in range(4 + i % 5))
            group = f"{kind}: voice {i % 4}"
            writer.add("val", torch.randint(15, (6, 9)), file=f"{group} {said}", group=group)
    data = TokenDataset([tmp_path / "data"], "val", 6)
    said = {}  # by the codes, which no two utterances share
    for u in data.utterances():
        codes = data.codes(u["first_frame"], u["num_frames"])
        said[codes.numpy().tobytes()] = u["group"], u["file"].split()[-1]
    by_kind = group_trials(data, 30, seed=0)
    assert set(by_kind) == {digits.KNOWN, digits.UNHEARD}
    for kind, trials in by_kind.items():
        assert len(trials) == 30
        for trial in trials:
            assert trial.groups[0] != trial.groups[1]
            words = []
            for clips, group in zip(trial.clips, trial.groups):
                (own, first), (same, second) = (said[clip.numpy().tobytes()] for clip in clips)
                assert own == same == group and group.startswith(f"{kind}: ")
                words.append((set(first[-4:]), set(second[:4])))
            (a1, a2), (b1, b2) = words
            assert not (a1 | b1) & (a2 | b2)


def test_every_trial_is_kept(one_voice):
    result = evaluate(EvaluateConfig(run=one_voice, **QUICK))["consistency"]["all"]
    kept = json.loads((one_voice / "trials.json").read_text())["all"]
    assert summary(np.array(kept["d"]), kept["groups"], seed=0) == result


def test_a_run_is_not_judged_with_another_codec(one_voice, random_mimi, random_data):
    config = EvaluateConfig(run=one_voice, **QUICK)
    with pytest.raises(ValueError, match="another codec than"):
        evaluate(replace(config, data=(random_data,)))
    with pytest.raises(ValueError, match="another codec than"):
        evaluate(replace(config, codec=str(random_mimi)))


def numbers(results: object) -> list:
    """All numbers of nested results, in order."""
    if isinstance(results, dict):
        return [x for value in results.values() for x in numbers(value)]
    if isinstance(results, list | tuple):
        return [x for value in results for x in numbers(value)]
    return [results] if isinstance(results, int | float) else []
