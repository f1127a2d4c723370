"""python -m nanomimi.evaluate: on models that know nothing, one voice, or the truth."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomimi import Codec, DatasetWriter, TokenDataset, checkpoint, salmon
from nanomimi.audio import read_audio, write_wav
from nanomimi.evaluate import EvaluateConfig, continuation, evaluate, table
from nanomimi.likelihood import nats_of
from nanomimi.tiny import digits
from prepare import PrepareConfig, prepare
from train import TrainConfig, _about, train

QUICK = dict(trials=20, prompts=6, device="cpu")
VOICES = ("diana", "john")


@pytest.fixture(scope="session")
def counted(tmp_path_factory) -> Path:
    """A data folder of counting with half of the sequences held out."""
    out = tmp_path_factory.mktemp("evaluate") / "data"
    prepare(PrepareConfig(out=out, hours=0.1, val_fraction=0.5, num_codebooks=4, device="cpu"))
    return out


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """SALMon's layout: a positive in diana's voice, a negative in john's, and the reverse."""
    folder, voices = tmp_path_factory.mktemp("salmon"), digits.load_clips()
    rng = np.random.default_rng(0)
    for part, swapped in zip(salmon.PARTS, (False, True)):
        (folder / part).mkdir()
        for i in range(12):
            said = [(i + k) % 10 for k in range(2)]
            for k, voice in enumerate(reversed(VOICES) if swapped else VOICES):
                wav = digits.speak(voices[voice], said, rng)
                write_wav(folder / part / f"sample_{i}_{k}.wav", wav, digits.SAMPLE_RATE)
    return folder


def fresh_run(data: Path, out: Path, arch: str, seed: int = 0) -> Path:
    """A run folder whose model has learned nothing."""
    config = TrainConfig(data=data, out=out, arch=arch, n_layer=1, n_embd=32, max_frames=64)
    about = _about(config, TokenDataset(data, "train").meta, torch.float32)
    torch.manual_seed(seed)
    model = checkpoint.build(about["model"])
    out.mkdir()
    checkpoint.save(out, 0, model, torch.optim.AdamW(model.parameters()), about)
    return out


@pytest.mark.parametrize("arch", ["flat", "hierarchical"])
def test_an_untrained_model_is_at_chance_in_every_pairwise_test(arch, counted, pairs, tmp_path):
    run = fresh_run(counted, tmp_path / "run", arch)
    results = evaluate(EvaluateConfig(run=run, salmon=pairs, trials=100, prompts=2, device="cpu"))
    for name in ("acoustic_consistency", "counting"):
        low, high = results[name]["interval"]
        assert low <= 0.5 <= high, (name, low, high)
        assert abs(results[name]["margin"]) < 0.01
    assert results["held_out"]["nats_per_token"] == pytest.approx(np.log(257), abs=0.1)
    # The parts of the folder mirror one another, and so must a preference for a voice.
    shares = [results["salmon"][part] for part in salmon.PARTS[:2]]
    error = np.hypot(*(share["standard_error"] for share in shares))
    assert abs(shares[0]["accuracy"] + shares[1]["accuracy"] - 1) <= 2 * error


@pytest.fixture(scope="session")
def one_voice(tmp_path_factory) -> Path:
    """A run that has heard diana alone."""
    folder, codec = tmp_path_factory.mktemp("voice"), Codec.load("tiny", 4)
    with DatasetWriter(folder / "data", codec) as writer:
        for u in digits.utterances(1.0, 0.1, seed=0):
            if u.voice == VOICES[0] and writer.seconds < 400:
                codes = codec.encode(torch.from_numpy(u.wav)[None, None])[0]
                writer.add(u.split, codes, file="diana", group="diana")
    config = TrainConfig(
        data=folder / "data",
        out=folder / "run",
        n_layer=2,
        n_embd=64,
        max_frames=64,
        max_steps=100,
        warmup_steps=10,
        dtype="float32",
        device="cpu",
    )
    train(config)
    return folder / "run"


@pytest.fixture(scope="session")
def judged(one_voice, pairs) -> dict:
    return evaluate(EvaluateConfig(run=one_voice, salmon=pairs, **QUICK))


def test_a_model_of_one_voice_prefers_that_voice(judged):
    assert judged["salmon"][salmon.PARTS[0]]["accuracy"] >= 0.9
    assert judged["salmon"][salmon.PARTS[1]]["accuracy"] <= 0.1
    assert judged["acoustic_consistency"]["groups"] > 1  # one voice: files are compared


def test_salmon_pairs_are_in_numeric_order_and_ties_count_half(pairs, one_voice, tmp_path):
    model, _ = checkpoint.load(one_voice)
    codec = Codec.load("tiny", 4)
    part = tmp_path / "rir_consistency"
    part.mkdir()
    first, second = (pairs / salmon.PARTS[0] / f"sample_0_{k}.wav" for k in (0, 1))
    for i, (positive, negative) in enumerate([(first, second), (second, first), (first, first)]):
        # 9 comes before 10 as a number, and after it as text.
        (part / f"sample_{i}_9.wav").write_bytes(positive.read_bytes())
        (part / f"sample_{i}_10.wav").write_bytes(negative.read_bytes())
    score = partial(nats_of, model, 4)
    result = salmon.judge(score, codec, salmon.parts(tmp_path), model.max_frames)
    assert result == {
        "rir_consistency": {
            "accuracy": 0.5,
            "standard_error": pytest.approx(np.std([1, 0, 0.5]) / np.sqrt(3)),
            "pairs": 3,
        }
    }
    (part / "sample_1_9.wav").unlink()
    (part / "sample_2_9.wav").unlink()
    (part / "sample_2_10.wav").unlink()
    with pytest.raises(ValueError, match="sample 1 has not two files"):
        salmon.parts(tmp_path)
    with pytest.raises(FileNotFoundError, match="none of SALMon's parts"):
        salmon.parts(part)


def test_a_clip_of_salmon_is_scored_whole_as_the_mean_over_its_tokens(pairs, one_voice):
    model, _ = checkpoint.load(one_voice)
    codec, seen = Codec.load("tiny", 4), []

    def score(pieces):
        for codes, first in pieces:
            # Positives are likelier by so little that only a mean tells, whatever the lengths.
            nats = 1.0 + 0.001 * (len(seen) % 2)
            seen.append(codes.shape[1] - first)
            yield torch.full((codes.shape[1] - first, 4), nats)

    result = salmon.judge(score, codec, salmon.parts(pairs), max_frames=512)
    assert all(part["accuracy"] == 1.0 for part in result.values())
    assert any(positive > negative for positive, negative in zip(seen[::2], seen[1::2]))
    frames = lambda path: -(-len(read_audio(path, codec.sample_rate)) // codec.frame_size)
    paths = [
        pairs / p / f"sample_{i}_{k}.wav"
        for p in salmon.PARTS[:2]
        for i in range(12)
        for k in (0, 1)
    ]
    assert seen == [frames(path) for path in paths]


def test_the_numbers_repeat_with_the_seed_whatever_the_batch_size(judged, one_voice, pairs):
    config = EvaluateConfig(run=one_voice, salmon=pairs, **QUICK)
    again = evaluate(replace(config, batch_size=3))
    assert _flat(again) == pytest.approx(_flat(judged), abs=1e-5)
    other = evaluate(replace(config, seed=1, salmon=None))
    assert other["held_out"] == judged["held_out"]
    for name in ("acoustic_consistency", "counting"):
        assert other[name]["margin"] != judged[name]["margin"]
    assert other == json.loads((one_voice / "evaluation.json").read_text())


def test_the_table_shows_the_numbers(judged):
    text = table(judged)
    assert f"{judged['held_out']['nats_per_frame']:.3f}" in text and "speaker consistency" in text
    assert all(len(line) < 120 for line in text.splitlines())


def test_continuing_with_the_truth_has_the_statistics_of_the_truth(one_voice, monkeypatch):
    model, about = checkpoint.load(one_voice)
    data = TokenDataset(Path(about["config"]["data"]), "val", 4)
    codec, lines = Codec.load("tiny", 4), data.utterances()
    utterances = [data.codes(line["first_frame"], line["num_frames"] + 1) for line in lines]

    def remember(prompt, num_frames, sample):
        """The frames that followed the prompts in the data, their separator, then nothing."""
        assert (prompt[:, :, 0] == codec.codebook_size).all()
        length = prompt.shape[2] - 1
        rows = [next(u for u in utterances if torch.equal(u[:, :length], p[:, 1:])) for p in prompt]
        for t in range(length, length + num_frames):
            yield torch.stack([u[:, min(t, u.shape[1] - 1)] for u in rows])

    monkeypatch.setattr(model, "generate", remember)
    result = continuation(model, codec, data, EvaluateConfig(run=one_voice, **QUICK))
    assert result["prompts"] == 6 and result["model"] == result["held_out"]
    assert result["model"]["valid_frames"] == 1.0 and 0.05 < result["model"]["silent_frames"] < 0.6
    assert 0 < min(result["model"]["codebook_coverage"]) < max(result["model"]["codebook_coverage"])


def test_a_run_is_not_judged_with_another_codec(one_voice, random_mimi, random_data):
    config = EvaluateConfig(run=one_voice, **QUICK)
    with pytest.raises(ValueError, match="another codec than"):
        evaluate(replace(config, data=random_data))
    with pytest.raises(ValueError, match="another codec than"):
        evaluate(replace(config, codec=str(random_mimi)))


def _flat(results: object) -> list:
    """All numbers of nested results, in order."""
    if isinstance(results, dict):
        return [x for value in results.values() for x in _flat(value)]
    if isinstance(results, list | tuple):
        return [x for value in results for x in _flat(value)]
    return [results] if isinstance(results, int | float) else []
