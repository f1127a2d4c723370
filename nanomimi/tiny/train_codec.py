"""Train a Mimi: python -m nanomimi.tiny.train_codec [FOLDER_OR_FILE ...] --out runs/codec

Without arguments, this makes the bundled mimi.safetensors from the bundled digits. `--shape` takes
another mimi.json; `prepare.py --codec runs/codec/mimi.safetensors` then uses the new codec.

The loss is the L1 distance of log-mel spectrograms at five scales, a small share of the waveform's
own L1 distance, and the quantizer's commitment penalty. Kyutai trained Mimi with discriminators and
distilled codebook 0 from a speech model (Moshi, arXiv 2410.00037, section 3.3). Neither is done
here: speech sounds slightly metallic, and codebook 0 is not semantic.
"""

import functools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.audio import audio_files, read_audio, resample
from nanomimi.codec import TINY, MimiModel, build, read_shape
from nanomimi.config import Config, option, run_script
from nanomimi.distributed import catch_signals, resolve_device
from nanomimi.files import fits, load_tensors, lock, replacing, save_tensors
from nanomimi.tiny import digits

WINDOWS = {2048: 80, 1024: 64, 512: 40, 256: 32, 128: 20}  # samples: mel bands
TRAINING = "training.safetensors"
FLOOR = 3e-4  # mean amplitude of a mel band, about -70 dB: lower levels count as silence


@dataclass(frozen=True)
class CodecConfig(Config):
    audio: tuple[Path, ...] = option((), "folders or files; none: bundled digits", positional=True)
    out: Path = option(Path("runs/codec"), "folder for the codec and its training state")
    shape: Path = option(TINY.with_suffix(".json"), "a .json with moshi's description of the Mimi")
    minutes: float = option(60.0, "minutes of audio held in memory", above=0)
    batch_size: int = option(8, "crops per step", at_least=1)
    frames: int = option(12, "frames per crop, 80 ms each", at_least=1)
    max_steps: int = option(9000, "optimizer steps", at_least=1)
    lr: float = option(1.5e-3, "peak learning rate; a cosine ends at a twentieth", above=0)
    warmup_steps: int = option(100, "steps of linear warm-up", at_least=1)
    plain_steps: int = option(1000, "steps until every clip is quantized", at_least=1)
    save_every: int = option(1000, "steps between checkpoints and evaluations", at_least=1)
    resume: bool = option(False, "continue from the last checkpoint in --out")
    seed: int = option(0, "seed of weights, data and crops", at_least=0)
    device: str = option("auto", "auto, cpu, cuda or mps")


def log_mel(wav: Tensor, window_size: int, bands: int) -> Tensor:
    """(B, S) -> (B, bands, windows): log mean amplitude of the mel bands."""
    window = torch.hann_window(window_size, device=wav.device)
    stft = torch.stft(wav, window_size, window_size // 4, window=window, return_complex=True)
    weights = _mel_weights(window_size, bands).to(wav.device)
    return torch.log(FLOOR + weights @ (stft.abs() / window.sum()))


def mel_distance(wav: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of log-mels over the scales, in nepers; both (B, S)."""
    scales = [(log_mel(wav, *s) - log_mel(target, *s)).abs().mean() for s in WINDOWS.items()]
    return torch.stack(scales).mean()


@functools.cache
def _mel_weights(window_size: int, bands: int) -> Tensor:
    """(bands, window_size // 2 + 1): triangles equally spaced in mel, each with the sum one."""
    nyquist = digits.SAMPLE_RATE / 2
    bins = torch.linspace(0, nyquist, window_size // 2 + 1)
    mels = torch.linspace(0, 2595 * math.log10(1 + nyquist / 700), bands + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    # A low band can be narrower than a bin and contain none; one bin is the least width.
    width = edges.diff().clamp(min=float(bins[1]))
    rise = 1 - (edges[1:-1, None] - bins) / width[:-1, None]
    fall = 1 - (bins - edges[1:-1, None]) / width[1:, None]
    weights = torch.minimum(rise, fall).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def counting(minutes: float, seed: int) -> Tensor:
    """(S,) float32: counting and shuffled digits, half of both at another speed and pitch."""
    rng, clips, wavs, seconds = np.random.default_rng(seed), digits.load_clips(), [], 0.0
    counted = (u for u in digits.utterances(math.inf, 0.1, seed) if u.split == "train")
    while seconds < minutes * 60:
        wav = next(counted).wav
        if rng.random() < 0.5:
            voice = list(clips.values())[rng.integers(len(clips))]
            wav = digits.speak(voice, rng.integers(0, 10, size=6), rng)
        if rng.random() < 0.5:
            # A codec that hears only a few voices memorises them; resampling makes many of them.
            wav = resample(wav, digits.SAMPLE_RATE, 100 * int(240 * rng.uniform(0.8, 1.25)))
        seconds += len(wav) / digits.SAMPLE_RATE
        wavs.append(torch.from_numpy(wav))
    return torch.cat(wavs)


def from_files(config: CodecConfig) -> Tensor:
    """(S,) float32: files in random order until `minutes` are full, or ValueError."""
    files, wavs, seconds = audio_files(config.audio), [], 0.0
    np.random.default_rng(config.seed).shuffle(files)
    while files and seconds < config.minutes * 60:
        try:
            wavs.append(torch.from_numpy(read_audio(files.pop(), digits.SAMPLE_RATE)))
            seconds += len(wavs[-1]) / digits.SAMPLE_RATE
        except (ValueError, OSError) as error:
            print(f"skipped: {error}")
    if not wavs:
        raise ValueError(f"no audio in {config.audio[0]}; give folders of speech")
    return torch.cat(wavs)


def crops(wav: Tensor, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """(count, 1, size) random pieces of wav (S,)."""
    if len(wav) <= size:
        raise ValueError(f"{len(wav)} samples are less than a crop of {size}; lower --frames")
    return torch.stack([wav[None, s : s + size] for s in rng.integers(0, len(wav) - size, count)])


def initialise(mimi: MimiModel) -> None:
    """Convolutions that keep the variance: torch's default loses a factor of three in each."""
    for module in mimi.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = module.in_channels * module.kernel_size[0] / module.groups
            if isinstance(module, nn.ConvTranspose1d):
                fan_in /= module.stride[0]
            nn.init.normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def reconstruct(mimi: MimiModel, wav: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 1, S) -> its reconstruction (B, 1, S), the codes (B, Q, T) and the commitment penalty."""
    quantized = mimi.quantizer(mimi.encode_to_latent(wav, quantize=False), mimi.frame_rate)
    (hidden,) = mimi.decoder_transformer(mimi.upsample(quantized.x))
    return mimi.decoder(hidden)[..., : wav.shape[-1]], quantized.codes, quantized.penalty


@torch.no_grad()
def evaluate(mimi: MimiModel, wav: Tensor) -> dict:
    """Mel distance with 1, 2, 4, ... codebooks, and each codebook's usage: exp(entropy) / size."""
    mimi.eval()
    distances, total = {}, mimi.total_codebooks
    for q in [2**i for i in range(10) if 2**i < total] + [total]:
        mimi.set_num_codebooks(q)
        out, codes, _ = reconstruct(mimi, wav)
        distances[q] = round(mel_distance(out[:, 0], wav[:, 0]).item(), 4)
    mimi.train()
    share = nn.functional.one_hot(codes, mimi.cardinality).float().mean(dim=(0, 2))  # (Q, V)
    usage = torch.special.entr(share).sum(dim=1).exp() / mimi.cardinality
    return {"mel_distance": distances, "usage": [round(u, 3) for u in usage.tolist()]}


def save(mimi: MimiModel, optimizer: torch.optim.Optimizer, out: Path, report: dict) -> None:
    """Write mimi.safetensors (float16), mimi.json and, for --resume, training.safetensors."""
    progress = {"report": report, "checks": {name: m._next_unused_check for name, m in books(mimi)}}
    halves = {name: tensor.half() for name, tensor in mimi.state_dict().items()}
    save_tensors(halves, out / "mimi.safetensors")
    with replacing(out / "mimi.json") as new:
        new.write_text(json.dumps(report, indent=1) + "\n")
    save_tensors(state(mimi, optimizer), out / TRAINING, {"json": json.dumps(progress)})


def state(mimi: MimiModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors that a resumed training needs. moshi draws from torch's generator."""
    rng = {"rng": torch.get_rng_state()}
    return mimi.state_dict() | checkpoint.moments(mimi, optimizer) | rng


def books(mimi: MimiModel) -> list[tuple[str, nn.Module]]:
    """The codebooks: moshi counts the steps until it replaces their unused entries."""
    return [(k, m) for k, m in mimi.named_modules() if hasattr(m, "_next_unused_check")]


def load(mimi: MimiModel, optimizer: torch.optim.Optimizer, out: Path, shape: dict) -> dict:
    """Restore the last checkpoint; returns its report. Raises FileNotFoundError, ValueError."""
    path, remedy = out / TRAINING, "leave out --resume"
    if path.exists() and read_shape(out / "mimi.json") != shape:
        raise ValueError(f"{out} has another shape than --shape; give --shape {out}/mimi.json")
    saved = load_tensors(path, state(mimi, optimizer), remedy, next(mimi.parameters()).device)
    with safe_open(path, "pt") as file:
        progress = json.loads((file.metadata() or {}).get("json", "{}"))
    kind = {"report": {"step": int, "seconds": int, ...: Any}, "checks": {...: Any}}
    kind["checks"] = {name: int for name, _ in books(mimi)}
    if not fits(progress, kind):
        raise ValueError(f"{path} is damaged; {remedy}")
    mimi.load_state_dict({name: saved[name] for name in mimi.state_dict()})
    checkpoint.restore(saved, mimi, optimizer)
    torch.set_rng_state(saved["rng"].cpu())
    for name, module in books(mimi):
        module._next_unused_check = progress["checks"][name]
    return progress["report"]


def training_step(
    config: CodecConfig, step: int, mimi: MimiModel, optimizer: torch.optim.Optimizer, pool: Tensor
) -> tuple[float, float]:
    """Update the weights on crops of pool (S,); returns the mel distance and the penalty."""
    rng = np.random.default_rng((config.seed, step))  # a resumed run draws the same crops
    # Half of the steps use all codebooks, the others 1..Q: few must be intelligible, too.
    total = mimi.total_codebooks
    mimi.set_num_codebooks(total if rng.random() < 0.5 else int(rng.integers(1, total + 1)))
    for rvq in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        # If all clips are quantized from the start, the latent collapses to a few points.
        rvq.no_quantization_rate = max(0.0, 1 - step / config.plain_steps)
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
    optimizer.param_groups[0]["lr"] = config.lr * min((step + 1) / config.warmup_steps, decay)
    wav = crops(pool, config.batch_size, config.frames * mimi.frame_size, rng)
    out, _, penalty = reconstruct(mimi, wav)
    distance = mel_distance(out[:, 0], wav[:, 0])
    (distance + 0.05 * penalty + 0.1 * (out - wav).abs().mean()).backward()
    norm = nn.utils.clip_grad_norm_(mimi.parameters(), 1.0)
    if not math.isfinite(distance.item() + norm.item()):
        raise FloatingPointError(f"diverged: step {step + 1}, loss {distance:.3g}; lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for buffer in mimi.buffers():
        buffer.detach_()  # moshi's moving averages otherwise keep every step's graph alive
    return distance.item(), penalty.item()


def train(config: CodecConfig) -> dict:
    """Train in float32, with a checkpoint every `save_every` steps; returns the report saved.

    Raises FloatingPointError where it diverges, SystemExit after SIGTERM or SIGINT, once saved.
    """
    # bfloat16 fails on CPUs with AMX: oneDNN of torch 2.9 computes one of the convolutions wrongly.
    device, shape = resolve_device(config.device), read_shape(config.shape)
    torch.manual_seed(config.seed)
    mimi = build(shape).to(device).train()
    initialise(mimi)
    optimizer = torch.optim.AdamW(mimi.parameters(), lr=config.lr, betas=(0.8, 0.99), fused=True)
    if not config.resume and (config.out / "mimi.safetensors").exists():
        raise ValueError(f"{config.out} holds a codec already; --resume it or change --out")
    report = load(mimi, optimizer, config.out, shape) if config.resume else dict(step=0, seconds=0)
    wav = (from_files(config) if config.audio else counting(config.minutes, config.seed)).to(device)
    pool, held_out = wav[: -len(wav) // 20], wav[-len(wav) // 20 :]
    size, began = config.frames * mimi.frame_size, time.time() - report["seconds"]
    held_out = crops(held_out, 32, size, np.random.default_rng(config.seed))
    with lock(config.out), catch_signals() as caught:
        for step in (bar := tqdm(range(report["step"], config.max_steps), unit="step")):
            distance, penalty = training_step(config, step, mimi, optimizer, pool)
            bar.set_postfix(mel=f"{distance:.3f}", penalty=f"{penalty:.3f}", refresh=False)
            if (step + 1) % config.save_every == 0 or step + 1 == config.max_steps or caught:
                numbers = {"step": step + 1, **evaluate(mimi, held_out)}
                bar.write(str(numbers))
                report = {"mimi": shape, **numbers, "seconds": round(time.time() - began)}
                save(mimi, optimizer, config.out, report)
            if caught:
                sys.exit(128 + caught[0])
    return report


if __name__ == "__main__":
    run_script(CodecConfig, train, __doc__)
