import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanomimi.audio import write_wav
from nanomimi.codec import Codec
from nanomimi.config import parse
from nanomimi.tiny import digits, train_codec
from nanomimi.tiny.sound import low_error, mel_distance
from nanomimi.tiny.train_codec import CodecConfig, crops, load_audio
from tests.conftest import small_shape, tone


def trained(folder: Path, **settings) -> CodecConfig:
    """A finished run of 8 steps in `out`, and its state after 4 steps in `interrupted`."""
    save, shape = train_codec.save, small_shape()
    shape["quantizer"].update(n_q=3, bins=8)
    (folder / "shape.json").write_text(json.dumps({"mimi": shape}))
    # From scratch, moshi draws the clips to quantize in each of the first steps.
    small = dict(minutes=0.2, batch_size=2, frames=4, save_every=4, max_steps=8)
    paths = dict(audio=(digits.FOLDER,), shape=folder / "shape.json", out=folder / "out")
    config = CodecConfig(device="cpu", **paths, **small, **settings)

    def save_and_copy(*args) -> None:
        save(*args)
        if not (folder / "interrupted").exists():
            shutil.copytree(config.out, folder / "interrupted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_codec, "save", save_and_copy)
        train_codec.train(config)
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> CodecConfig:
    return trained(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory, config) -> CodecConfig:
    """Trained with --waveform, from the codec of `config`, and not evaluated."""
    start = config.out / "mimi.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_codec, "evaluate", lambda *_: {})
        return trained(tmp_path_factory.mktemp("taught"), waveform=2.0, init_from=start)


def test_a_codec_is_trained_saved_and_loaded(config):
    report = json.loads((config.out / "mimi.json").read_text())
    assert report["step"] == 8 and set(report["held_out"]) == {"digits", "files"}
    for numbers in report["held_out"].values():
        assert set(numbers["mel_distance"]) == {"1", "2", "3"} and len(numbers["usage"]) == 3
    codec = Codec.load(str(config.out / "mimi.safetensors"), 2)
    assert codec.encode(torch.randn(1, 1, 5000)).shape == (1, 2, 3)
    weights = load_file(config.out / "mimi.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("run", ["config", "taught"])
def test_a_resumed_codec_equals_an_uninterrupted_one(run, request, monkeypatch):
    config = request.getfixturevalue(run)
    # The uninterrupted `config` was evaluated, which must leave no trace either.
    monkeypatch.setattr(train_codec, "evaluate", lambda *_: {})
    resumed = replace(config, out=config.out.with_name("interrupted"), resume=True)
    assert json.loads((resumed.out / "mimi.json").read_text())["step"] == 4
    train_codec.train(resumed)
    # Before they are rounded to float16: the weights, their moments and the codebooks.
    whole, again = (load_file(c.out / "training.safetensors") for c in (config, resumed))
    assert whole.keys() == again.keys() and any(name.endswith("exp_avg") for name in whole)
    for name in whole.keys() - {"seconds"}:
        assert torch.equal(whole[name], again[name]), name


@pytest.mark.parametrize(
    "part, key, value", [("quantizer", "n_q", 4), ("transformer", "context", 9)]
)
def test_resuming_with_another_shape_is_one_clear_line(config, tmp_path, part, key, value):
    shape = copy.deepcopy(train_codec.read_shape(config.shape))
    shape[part][key] = value
    (tmp_path / "other.json").write_text(json.dumps({"mimi": shape}))
    with pytest.raises(ValueError, match="another shape than --shape; give --shape") as error:
        train_codec.train(replace(config, resume=True, shape=tmp_path / "other.json"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        train_codec.train(replace(config, resume=True, out=tmp_path))


def test_resuming_without_the_teacher_is_one_clear_line(config, taught):
    for run, other in ((taught, None), (config, config.out / "mimi.safetensors")):
        with pytest.raises(ValueError, match="--init_from and --waveform make a teacher"):
            train_codec.train(replace(run, resume=True, waveform=2.0, init_from=other))


def test_evaluation_agrees_with_the_codec_and_counts_the_entries_in_use(random_codec):
    mimi, wav = copy.deepcopy(random_codec.mimi), 0.1 * torch.randn(2, 1, 19200)
    numbers = train_codec.evaluate(mimi, wav)
    assert set(numbers["mel_distance"]) == {1, 2, 4, 6} and mimi.training
    codes = random_codec.encode(wav)
    for q, distance in numbers["mel_distance"].items():
        expected = mel_distance(random_codec.decode(codes[:, :q])[:, 0], wav[:, 0])
        assert distance == pytest.approx(expected.item(), abs=1e-3)
    for usage, codebook in zip(numbers["usage"], codes.transpose(0, 1).numpy(), strict=True):
        _, counts = np.unique(codebook, return_counts=True)
        share = counts / counts.sum()
        entries = np.exp(-np.sum(share * np.log(share)))
        assert usage == pytest.approx(entries / random_codec.codebook_size, abs=1e-3)


def test_the_low_error_is_a_share_of_energy_and_hears_pitch_and_nothing_above():
    low, high, other = (
        torch.from_numpy(tone(0.8, digits.SAMPLE_RATE, hz))[None, None] for hz in (200, 3000, 450)
    )
    error = lambda out, wav=low: low_error(out, wav).item()
    assert error(low) == 0 and error(0 * low) == pytest.approx(1, abs=0.01)
    assert error(low + high) == pytest.approx(0, abs=1e-3)
    assert error(other) == pytest.approx(2, abs=0.03)
    # Magnitudes alone would not hear that it is upside down.
    assert error(-low) == pytest.approx(0.3 * 4, abs=0.02)
    # Every clip counts alike, however loud, but for silence.
    pair, wrong = torch.cat([low, 0.3 * low]), torch.cat([low, 0.15 * low])
    assert error(wrong, pair) == pytest.approx(0.25 / 2, rel=0.1)
    assert error(1e-4 * other, 0 * low) < 1e-3


@pytest.mark.parametrize("q", [1, 2, 3])
def test_the_loss_is_of_what_the_codec_renders(random_codec, q):
    mimi = copy.deepcopy(random_codec.mimi).requires_grad_(True).train()
    mimi.set_num_codebooks(q)
    for rvq in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        rvq.input_proj.weight.data *= 100  # far from all entries, so that the penalty counts
    wav = 0.1 * torch.randn(2, 1, 4 * 1920)
    twin, plain, kept = (copy.deepcopy(mimi) for _ in range(3))  # training moves codebooks
    quantized = twin.quantizer(twin.encode_to_latent(wav, quantize=False), twin.frame_rate)
    out = twin.decoder(twin.decoder_transformer(twin.upsample(quantized.x))[0])
    loss, distance = train_codec.losses((plain, None), wav, waveform=0.0)
    assert distance.item() == pytest.approx(mel_distance(out[:, 0], wav[:, 0]).item(), rel=1e-4)
    rest = 0.1 * (out - wav).abs().mean() + 0.05 * quantized.penalty
    assert quantized.penalty > 0.1
    assert (loss - distance).item() == pytest.approx(rest.item(), rel=0.01)
    # From the third codebook on, the low error joins in.
    more, _ = train_codec.losses((kept, None), wav, waveform=3.0)
    added = 3 * low_error(out, wav).item() * (q > 2)
    assert (more - loss).item() == pytest.approx(added, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("q", [1, 3])
def test_a_teacher_trains_the_encoder_and_hears_the_output(random_codec, q):
    teacher, wav = copy.deepcopy(random_codec.mimi), 0.1 * torch.randn(2, 1, 4 * 1920)

    def loss_and_gradients(teacher, waveform: float = 1.0) -> tuple[float, list[bool]]:
        """The loss, and whether a gradient reaches codebook 0, the others and both coders."""
        mimi = copy.deepcopy(random_codec.mimi).requires_grad_(True).train()
        mimi.set_num_codebooks(q)
        loss, _ = train_codec.losses((mimi, teacher), wav, waveform)
        loss.backward()
        first, rest = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
        coders = mimi.encoder.model[0].conv.conv, mimi.decoder.model[0].conv.conv
        modules = first.input_proj, first.output_proj, rest.output_proj, *coders
        grads = [module.weight.grad for module in modules]
        return loss.item(), [grad is not None and bool(grad.any()) for grad in grads]

    _, alone = loss_and_gradients(None)
    agreed, same = loss_and_gradients(teacher)
    # A teacher that is the codec itself finds fault only with the output. Beside the large error of
    # the waveform of noise, that would be lost in rounding.
    (less, _), (more, _) = (loss_and_gradients(each, waveform=0.0) for each in (None, teacher))
    own = copy.deepcopy(random_codec.mimi)
    own.set_num_codebooks(q)
    heard, target = (
        teacher.quantizer.rvq_first.input_proj(teacher.encode_to_latent(x, quantize=False))
        for x in (own.decode(own.encode(wav)), wav)
    )
    miss = (heard - target).square().mean() / target.var()
    assert more - less == pytest.approx(miss.item(), rel=0.01) and miss > 1e-3
    assert alone == [True, True, q > 1, True, True]
    assert same == [False, True, q > 1, q > 1, True]
    for parameter in teacher.encoder.parameters():
        parameter *= 1.5
    disagreed, other = loss_and_gradients(teacher)
    assert disagreed > agreed + 0.01 and other == [False, True, q > 1, True, True]
    # As a share of the variance: the loss does not depend on the scale of the latent.
    teacher.quantizer.rvq_first.input_proj.weight *= 10
    assert loss_and_gradients(teacher)[0] == pytest.approx(disagreed, rel=1e-3)


def test_training_with_a_teacher_keeps_codebook_0_and_moves_the_others(config, taught):
    start, end = (load_file(c.out / "mimi.safetensors") for c in (config, taught))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    first = {name for name in moved if name.startswith("quantizer.rvq_first.")}
    assert first == {"quantizer.rvq_first.output_proj.weight"}  # what it gives the decoder
    for part in ("quantizer.rvq_rest.vq", "encoder.", "decoder."):
        assert any(name.startswith(part) for name in moved)


def test_evaluation_counts_the_crops_that_keep_their_pitch(random_codec, monkeypatch):
    mimi, codes = copy.deepcopy(random_codec.mimi), torch.zeros(2, 6, 10, dtype=torch.long)
    tones = [tone(0.8, digits.SAMPLE_RATE, hz) for hz in (110, 170, 200)]
    wav, other = (torch.from_numpy(np.stack(pair))[:, None] for pair in (tones[:2], tones[::2]))
    monkeypatch.setattr(mimi, "encode", lambda wav: codes)
    for out, share in ((wav, 1), (other, 0.5), (other.flip(0), 0)):
        monkeypatch.setattr(mimi, "decode", lambda codes, out=out: out)
        assert set(train_codec.evaluate(mimi, wav)["pitch"].values()) == {share}


def test_the_trainer_explains_its_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(CodecConfig, ["--help"], train_codec.__doc__)
    assert stop.value.code == 0 and "--shape" in capsys.readouterr().out


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> CodecConfig:
    """Twenty files, of which file i is all (i + 1) / 100, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("recordings")
    for i in range(20):
        level = np.full(digits.SAMPLE_RATE, (i + 1) / 100, np.float32)
        write_wav(folder / f"{i:02}.wav", level, digits.SAMPLE_RATE)
    (folder / "text.wav").write_text("this is no audio")
    return CodecConfig(audio=(folder,), minutes=10.0)


def levels(wav: torch.Tensor) -> set[int]:
    """The numbers of the files in a wav."""
    return set((100 * wav).round().int().tolist())


def test_a_tenth_of_the_files_is_held_out_and_no_other_is_missing(recordings, capsys):
    train, held_out = (levels(load_audio(recordings, 0.0, held)) for held in (False, True))
    assert not train & held_out and train | held_out == set(range(1, 21))
    assert len(held_out) in (2, 3) and "text.wav" in capsys.readouterr().out
    assert held_out != levels(load_audio(replace(recordings, seed=1), 0.0, held_out=True))
    assert len(load_audio(replace(recordings, minutes=0.1), 0.0, False)) == 6 * digits.SAMPLE_RATE


@pytest.mark.parametrize(
    "held_out, expected", [(False, {digits.TRAIN}), (True, {digits.KNOWN, digits.UNHEARD})]
)
def test_digits_have_their_share_and_only_unheard_ones_are_held_out(
    recordings, held_out, expected, monkeypatch
):
    kinds = []

    def utter(clips, said, kind, rng) -> digits.Utterance:
        kinds.append(str(kind))
        wav = np.full(digits.SAMPLE_RATE // 4, -1, np.float32)
        return digits.Utterance("", kind, "", 1.0, said, wav)

    monkeypatch.setattr(digits, "utter", utter)
    for share in (0.2, 1.0):
        config = replace(recordings, minutes=2.0 if held_out else 0.2)
        wav = load_audio(config, share, held_out)
        assert (wav < 0).float().mean() == pytest.approx(share, abs=0.1)
        assert share < 1 or len(wav) == 12 * digits.SAMPLE_RATE
    assert set(kinds) == expected


def test_without_audio_there_is_one_clear_line(tmp_path, recordings):
    for files in ("0", "1"):
        config = CodecConfig(audio=(tmp_path,), minutes=0.1)
        with pytest.raises(ValueError, match=f"no audio in {tmp_path}"):
            load_audio(config, 0.2, held_out=False)
        (tmp_path / "text.wav").write_text("this is no audio")


def test_plain_crops_are_pieces_and_varied_ones_differ_in_pitch_and_level():
    rng, size, rate = np.random.default_rng(0), 12 * 1920, digits.SAMPLE_RATE
    noise = torch.randn(3 * rate)
    for piece in crops(noise, 3, size, rng, vary=False)[:, 0]:
        start = int((noise - piece[0]).abs().argmin())
        assert torch.allclose(piece, noise[start : start + size], atol=1e-4)
    wave = torch.from_numpy(tone(3.0, rate, hz=1000))
    spectra = torch.fft.rfft(crops(wave, 200, size, rng, vary=True)[:, 0] * torch.hann_window(size))
    pitches = spectra.abs().argmax(dim=1) * rate / size
    assert ((pitches - 1000).abs() < 2).float().mean() == pytest.approx(0.5, abs=0.15)
    assert 798 < pitches.min() < 830 and 1210 < pitches.max() < 1252
    decibels = 20 * torch.log10(spectra.abs().amax(dim=1) / (0.3 * size / 4))
    assert -11.5 < decibels.min() < -8 and 1 < decibels.max() < 3.1
    # Three of ten have the band of a telephone or of a cheap microphone, at whatever speed.
    heard = torch.fft.rfft(crops(noise, 200, size, rng, vary=True)[:, 0]).abs() > 0.01
    near = lambda hz: heard[:, int(0.99 * hz * size / rate) : int(hz * size / rate)].any(dim=1)
    assert near(3390).all() and (~near(8100)).float().mean() == pytest.approx(0.3, abs=0.1)
    with pytest.raises(ValueError, match="lower --frames"):
        crops(wave, 1, 2 * rate, rng, vary=False)


def test_fine_tuning_starts_from_a_codec_and_quantizes_at_once(config, tmp_path, monkeypatch):
    rates, losses = [], train_codec.losses

    def spy(models, wav, waveform):
        rates.append(models[0].quantizer.rvq_first.no_quantization_rate)
        return losses(models, wav, waveform)

    monkeypatch.setattr(train_codec, "losses", spy)
    monkeypatch.setattr(train_codec, "evaluate", lambda *_: {})
    start = config.out / "mimi.safetensors"
    again = dict(init_from=start, lr=1e-12, max_steps=1)
    train_codec.train(replace(config, out=tmp_path / "fine", **again))
    assert set(rates) == {0.0}
    weights, old = load_file(tmp_path / "fine" / "mimi.safetensors"), load_file(start)
    names = [name for name, _ in train_codec.build(small_shape()).named_parameters()]
    assert len(names) > 20 and all(torch.equal(weights[name], old[name]) for name in names)
    with pytest.raises(ValueError, match="shape that --shape gives"):
        bundled = train_codec.TINY.with_suffix(".json")
        train_codec.train(replace(config, out=tmp_path / "other", shape=bundled, **again))


def test_the_mel_distance_is_zero_for_the_same_and_grows_with_the_difference():
    wav = 0.1 * torch.randn(1, 9600)
    assert mel_distance(wav, wav) == 0
    near, far = mel_distance(1.1 * wav, wav), mel_distance(2 * wav, wav)
    assert 0 < near < far < np.log(2) + 1e-3
