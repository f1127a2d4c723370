"""Train a Mimi: python -m nanomimi.tiny.train_codec [FOLDER_OR_FILE ...] --out runs/codec

It hears the bundled digits and the given audio. Held out are every tenth file, and the voice and
the takes that digits.py holds out. `prepare.py --codec` takes the file runs/codec/mimi.safetensors.

The L1 distance of log-mels keeps no pitch; `--waveform` adds the error below 1.5 kHz, which does.
With `--init_from`, that codec is then a teacher: codebook 0 keeps its entries, and the teacher has
to hear in the output what it hears in the input. Kyutai's was WavLM (arXiv 2410.00037, 3.3).
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn, optim
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.audio import audio_files, read_audio
from nanomimi.codec import TINY, MimiModel, build, read_shape
from nanomimi.config import Config, option, run_script
from nanomimi.distributed import catch_signals, resolve_device
from nanomimi.files import load_tensors, lock, replacing, save_tensors
from nanomimi.tiny import digits, sound


@dataclass(frozen=True)
class CodecConfig(Config):
    audio: tuple[Path, ...] = option((), "folders or files; none: digits alone", positional=True)
    out: Path = option(Path("runs/codec"), "folder for the codec and its training state")
    shape: Path = option(TINY.with_suffix(".json"), "a .json with moshi's description of the Mimi")
    minutes: float = option(60.0, "minutes of audio held in memory", above=0)
    digits: float = option(0.2, "share of digits in them", at_least=0, at_most=1)
    init_from: Path | None = option(None, "mimi.safetensors of the same shape to start from")
    batch_size: int = option(8, "crops per step", at_least=1)
    frames: int = option(12, "frames per crop, 80 ms each", at_least=1)
    max_steps: int = option(9000, "optimizer steps", at_least=1)
    waveform: float = option(0.0, "weight of the error that keeps pitch", at_least=0)
    lr: float = option(1.5e-3, "peak learning rate; a cosine ends at a twentieth", above=0)
    save_every: int = option(1000, "steps between checkpoints and evaluations", at_least=1)
    resume: bool = option(False, "continue from the last checkpoint in --out")
    seed: int = option(0, "seed of weights, data and crops", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")


def load_audio(config: CodecConfig, share: float, held_out: bool) -> Tensor:
    """(S,) float32: shuffled files and a share of digits, --minutes at most. ValueError if none."""
    files, rng = audio_files(config.audio), np.random.default_rng(config.seed)
    clips = digits.load_clips()
    rng.shuffle(files)
    files = files[::10] if held_out else [file for i, file in enumerate(files) if i % 10]
    kinds = [digits.KNOWN, digits.UNHEARD] if held_out else [digits.TRAIN]
    say = lambda: digits.utter(clips, rng.integers(0, 10, size=6), rng.choice(kinds), rng).wav
    wavs, own, total, limit = [], 0, 0, config.minutes * (6 if held_out else 60) * sound.SAMPLE_RATE
    while (files or share == 1) and total < limit:
        speaks = own < share * (total + 1)
        try:
            wavs.append(say() if speaks else read_audio(files.pop(), sound.SAMPLE_RATE))
        except (ValueError, OSError) as error:
            print(f"skipped: {error}")
            continue
        own, total = own + len(wavs[-1]) * speaks, total + len(wavs[-1])
    if total == own and share < 1:
        raise ValueError(f"no audio in {config.audio[0]}; give folders of at least two files")
    return torch.from_numpy(np.concatenate(wavs))


def crops(wav: Tensor, count: int, size: int, rng: np.random.Generator, vary: bool) -> Tensor:
    """(count, 1, size) pieces of wav (S,); varied ones differ in speed, pitch and level."""
    if len(wav) < 2 * size:
        raise ValueError(f"{len(wav)} samples are too few for crops of {size}; lower --frames")
    pieces = []
    for _ in range(count):
        # A codec that hears only a few voices memorises them; resampling makes many of them.
        length = size // 96 * int(rng.integers(77, 121)) if vary and rng.random() < 0.5 else size
        gain = 10 ** (rng.uniform(-10, 3) / 20) if vary else 1.0  # from -10 to 3 dB
        start = rng.integers(0, len(wav) - length)
        spectrum = torch.fft.rfft(wav[start : start + length])
        if vary and rng.random() < 0.3:  # a telephone's band, or a cheap microphone's
            spectrum[int(rng.uniform(3400, 8000) * size / sound.SAMPLE_RATE) :] = 0
        pieces.append(gain * size / length * torch.fft.irfft(spectrum, size))
    return torch.stack(pieces)[:, None]


def initialise(mimi: MimiModel) -> None:
    """Convolutions that keep the variance: torch's default loses a factor of three in each."""
    for module in mimi.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            stride = module.stride[0] if isinstance(module, nn.ConvTranspose1d) else 1
            fan_in = module.in_channels * module.kernel_size[0] / module.groups / stride
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def losses(models: tuple, wav: Tensor, waveform: float) -> tuple[Tensor, Tensor]:
    """Of (B, 1, S), with the codebooks in use: the loss, and the mel distance in it."""
    mimi, teacher = models  # the teacher may be None
    latent, q = mimi.encode_to_latent(wav, quantize=False), mimi.num_codebooks  # (B, D, T)
    first = mimi.quantizer.rvq_first.train(not teacher)(latent, mimi.frame_rate)
    quantized, penalty = first.x, first.penalty / q
    if teacher:
        # A language model hardly finds words in a codebook that learns to render pitch.
        quantized = mimi.quantizer.rvq_first.decode(first.codes)
        hear, project = teacher.encode_to_latent, teacher.quantizer.rvq_first.input_proj
        target = project(hear(wav, quantize=False))
        miss = lambda latent: (project(latent) - target).square().mean() / target.var()
    if q > 1:
        rest = mimi.quantizer.rvq_rest(latent, mimi.frame_rate)
        quantized, penalty = quantized + rest.x, penalty + rest.penalty * (q - 1) / q
    out = mimi.decoder(mimi.decoder_transformer(mimi.upsample(quantized))[0])[..., : wav.shape[-1]]
    distance = sound.mel_distance(out[:, 0], wav[:, 0])
    loss = distance + 0.1 * (out - wav).abs().mean() + 0.05 * penalty
    if teacher:
        loss = loss + miss(latent) + miss(hear(out, quantize=False))
    # Two codebooks have no room for a waveform.
    return loss + (waveform * sound.low_error(out, wav) if q > 2 else 0.0), distance


@torch.no_grad()
def evaluate(mimi: MimiModel, wav: Tensor) -> dict:
    """Mel distance, pitch (share of crops with F0 within 5%) and usage (exp(entropy) / size)."""
    mimi.eval()
    f0 = lambda x: np.array([sound.pitch_and_formants(each)[0] for each in x[:, 0].cpu().numpy()])
    distances, pitch, total, own = {}, {}, mimi.total_codebooks, f0(wav)
    for q in [2**i for i in range(10) if 2**i < total] + [total]:
        mimi.set_num_codebooks(q)
        out = mimi.decode(codes := mimi.encode(wav))
        distances[q] = round(sound.mel_distance(out[:, 0], wav[:, 0]).item(), 4)
        pitch[q] = round(float(np.mean(np.abs(f0(out) - own) < 0.05)), 3)
    mimi.train()
    share = nn.functional.one_hot(codes, mimi.cardinality).float().mean(dim=(0, 2))  # (Q, V)
    usage = torch.special.entr(share).sum(dim=1).exp() / mimi.cardinality
    return dict(mel_distance=distances, pitch=pitch, usage=[round(u, 3) for u in usage.tolist()])


def save(mimi: MimiModel, optimizer: optim.AdamW, out: Path, report: dict) -> None:
    """Write mimi.safetensors (float16), mimi.json and, for --resume, training.safetensors."""
    save_tensors({n: t.half() for n, t in mimi.state_dict().items()}, out / "mimi.safetensors")
    with replacing(out / "mimi.json") as new:
        new.write_text(json.dumps(report, indent=1) + "\n")
    save_tensors(state(mimi, optimizer, report), out / "training.safetensors")


def state(mimi: MimiModel, optimizer: optim.AdamW, report: dict) -> dict[str, Tensor]:
    """All that a resumed training needs."""
    progress = {key: torch.tensor(report[key]) for key in ("step", "seconds")}
    return mimi.state_dict() | checkpoint.moments(mimi, optimizer) | progress


def load(mimi: MimiModel, optimizer: optim.AdamW, out: Path, report: dict) -> dict:
    """Restore the last checkpoint; returns its step and seconds. FileNotFoundError, ValueError."""
    path, told = out / "training.safetensors", out / "mimi.json"
    if path.exists() and read_shape(told) != report["mimi"]:
        raise ValueError(f"{out} has another shape than --shape; give --shape {told}")
    if path.exists() and json.loads(told.read_text()).get("taught", False) != report["taught"]:
        raise ValueError(f"{out}: --init_from and --waveform make a teacher; give them as before")
    like, device = state(mimi, optimizer, report), next(mimi.parameters()).device
    saved = load_tensors(path, like, "leave out --resume", device)
    mimi.load_state_dict({name: saved[name] for name in mimi.state_dict()})
    checkpoint.restore(saved, mimi, optimizer)
    return {key: int(saved[key]) for key in ("step", "seconds")}


def training_step(config: CodecConfig, step: int, models: tuple, optimizer, pool: Tensor) -> float:
    """Update the weights on crops of pool (S,); returns the mel distance."""
    mimi = models[0]
    rng = np.random.default_rng((config.seed, step))  # a resumed run draws the same
    torch.manual_seed(int(rng.integers(2**32)))  # moshi's generator
    # Half of the steps use all codebooks, the others 1..Q: few must be intelligible, too.
    total = mimi.total_codebooks
    mimi.set_num_codebooks(total if rng.random() < 0.5 else int(rng.integers(1, total + 1)))
    # If all clips are quantized from the start, the latent collapses to a few points.
    for rvq in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        rvq.no_quantization_rate = 0.0 if config.init_from else max(0.0, 1 - step / 1000)
        for layer in rvq.vq.layers:  # steps until moshi replaces unused entries: not saved
            layer._codebook._next_unused_check = 5 - step % 5
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
    optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / 100, decay)
    wav = crops(pool, config.batch_size, config.frames * mimi.frame_size, rng, vary=True)
    loss, distance = losses(models, wav, config.waveform)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(mimi.parameters(), 1.0)
    if not math.isfinite(distance.item() + norm.item()):
        raise FloatingPointError(f"diverged: step {step + 1}, loss {distance:.3g}; lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for buffer in mimi.buffers():
        buffer.detach_()  # moshi's moving averages otherwise keep every step's graph alive
    return distance.item()


def train(config: CodecConfig) -> dict:
    """Train in float32; returns the report. Raises FloatingPointError; SystemExit if stopped."""
    # bfloat16 fails on CPUs with AMX: oneDNN of torch 2.9 computes one of the convolutions wrongly.
    device, shape = resolve_device(config.device), read_shape(config.shape)
    torch.manual_seed(config.seed)
    mimi = build(shape).to(device).train()
    initialise(mimi)
    if not config.resume and (config.out / "mimi.safetensors").exists():
        raise ValueError(f"{config.out} holds a codec already; --resume it or change --out")
    if config.init_from:
        like, remedy = mimi.state_dict(), "it must have the shape that --shape gives"
        mimi.load_state_dict(load_tensors(config.init_from, like, remedy, device))
    report = dict(mimi=shape, taught=bool(config.init_from and config.waveform), step=0, seconds=0)
    teacher = copy.deepcopy(mimi).eval().requires_grad_(False) if report["taught"] else None
    optimizer = optim.AdamW(mimi.parameters(), lr=config.lr, betas=(0.8, 0.99), fused=True)
    if config.resume:
        report |= load(mimi, optimizer, config.out, report)
    pool = load_audio(config, config.digits if config.audio else 1.0, held_out=False).to(device)
    rng, began = np.random.default_rng(config.seed), time.time() - report["seconds"]
    tests, size = {}, config.frames * mimi.frame_size
    for source, share in [("digits", 1.0), ("files", 0.0)][: 2 if config.audio else 1]:
        tests[source] = crops(load_audio(config, share, held_out=True), 32, size, rng, vary=False)
    with lock(config.out), catch_signals() as caught:
        for step in (bar := tqdm(range(report["step"], config.max_steps), unit="step")):
            distance = training_step(config, step, (mimi, teacher), optimizer, pool)
            bar.set_postfix(mel_distance=f"{distance:.3f}", refresh=False)
            if (step + 1) % config.save_every == 0 or step + 1 == config.max_steps or caught:
                numbers = {name: evaluate(mimi, wav.to(device)) for name, wav in tests.items()}
                bar.write(f"step {step + 1}: {numbers}")
                report |= dict(step=step + 1, seconds=round(time.time() - began), held_out=numbers)
                save(mimi, optimizer, config.out, report)
            if caught:
                raise SystemExit(128 + caught[0])
    return report


if __name__ == "__main__":
    run_script(CodecConfig, train, __doc__)
