"""Train a Mimi: python -m nanomimi.tiny.train_codec [FOLDER_OR_FILE ...] --out runs/codec

With no arguments: the small Mimi that is bundled as mimi.safetensors, on the bundled digits. With
folders or files: a Mimi of any size on your own audio; `--codec runs/codec/mimi.safetensors` then
uses it.

The model is moshi's own. The loss is the L1 distance of log-mel spectrograms at five scales, a
little of the waveform's own, and the quantizer's commitment penalty. Kyutai's Mimi was trained with
discriminators instead of a spectral loss and with a distilled semantic codebook (Moshi, arXiv
2410.00037, section 3.3); neither is here, so speech is intelligible and slightly metallic, and
codebook 0 is not semantic.
"""

import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi.audio import audio_files, read_audio, resample
from nanomimi.codec import MimiModel, build, mimi_shape
from nanomimi.config import Config, argument, option, resolve_device, run
from nanomimi.tiny import digits

WINDOWS = {2048: 80, 1024: 64, 512: 40, 256: 32, 128: 20}  # samples: mel bands
FLOOR = 3e-4  # of a mel band's mean amplitude, about -70 dB: what is below it is silence


SHAPE = (
    "n_filters dimension n_layer n_head n_hidden context num_codebooks codebook_size codebook_dim"
).split()


@dataclass(frozen=True)
class CodecConfig(Config):
    audio: tuple[Path, ...] = argument("folders or files to train on; none: the bundled digits")
    out: Path = option(Path("runs/codec"), "folder for mimi.safetensors, mimi.json and training.pt")
    n_filters: int = option(16, "channels at the sample rate, doubled at every stride", at_least=1)
    dimension: int = option(128, "width of the latent and of both transformers", at_least=8)
    n_layer: int = option(2, "layers of either transformer", at_least=1)
    n_head: int = option(4, "attention heads", at_least=1)
    n_hidden: int = option(512, "hidden width of the transformers' MLP", at_least=1)
    context: int = option(24, "reach of the transformers' attention, 40 ms each", at_least=1)
    num_codebooks: int = option(8, "codebooks; the first stands apart", at_least=2)
    codebook_size: int = option(256, "entries per codebook", at_least=2)
    codebook_dim: int = option(64, "dimension of an entry", at_least=1)
    minutes: float = option(60.0, "minutes of audio held in memory", above=0)
    batch_size: int = option(8, "crops per step", at_least=1)
    frames: int = option(12, "frames per crop, 80 ms each", at_least=1)
    max_steps: int = option(9000, "optimizer steps", at_least=1)
    lr: float = option(1.5e-3, "peak learning rate, cosine to 5%", above=0)
    warmup_steps: int = option(100, "steps of linear warm-up", at_least=1)
    plain_steps: int = option(1000, "steps over which quantization sets in", at_least=1)
    save_every: int = option(1000, "steps between checkpoints and evaluations", at_least=1)
    resume: bool = option(False, "go on from the last checkpoint in --out")
    seed: int = option(0, "seed of weights, data and crops", at_least=0)
    device: str = option("auto", "auto, cpu or cuda")


def log_mels(wav: Tensor) -> Iterator[Tensor]:
    """(B, S) -> per scale (B, bands, windows): log mean amplitude of the mel bands."""
    for window_size, bands in WINDOWS.items():
        window = torch.hann_window(window_size, device=wav.device)
        stft = torch.stft(wav, window_size, window_size // 4, window=window, return_complex=True)
        weights = _mel_weights(window_size, bands).to(wav.device)
        yield torch.log(FLOOR + weights @ (stft.abs() / window.sum()))


def mel_distance(wav: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of log-mels over the scales, in nepers; both (B, S)."""
    pairs = zip(log_mels(wav), log_mels(target))
    return torch.stack([(a - b).abs().mean() for a, b in pairs]).mean()


@functools.cache
def _mel_weights(window_size: int, bands: int) -> Tensor:
    """(bands, window_size // 2 + 1): triangles equally spaced in mel, each with the sum one."""
    nyquist = digits.SAMPLE_RATE / 2
    bins = torch.linspace(0, nyquist, window_size // 2 + 1)
    mels = torch.linspace(0, 2595 * math.log10(1 + nyquist / 700), bands + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    # A low band can be narrower than a bin: it then takes the bins at its distance of one bin.
    width = edges.diff().clamp(min=float(bins[1]))
    rise = 1 - (edges[1:-1, None] - bins) / width[:-1, None]
    fall = 1 - (bins - edges[1:-1, None]) / width[1:, None]
    weights = torch.minimum(rise, fall).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def counting(minutes: float, seed: int) -> Tensor:
    """(S,) float32: counting and shuffled digits alike, half at another speed and pitch."""
    rng, clips, wavs, seconds = np.random.default_rng(seed), digits.load_clips(), [], 0.0
    counted = (u for u in digits.utterances(math.inf, 0.1, seed) if u.split == "train")
    while seconds < minutes * 60:
        wav = next(counted).wav
        if rng.random() < 0.5:
            voice = list(clips.values())[rng.integers(len(clips))]
            wav = digits.speak(voice, rng.integers(0, 10, size=6), rng)
        if rng.random() < 0.5:
            # A codec that hears only the bundled voices memorises them: a few voices become many.
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
        except (ValueError, OSError) as error:
            print(f"skipped: {error}")
            continue
        seconds += len(wavs[-1]) / digits.SAMPLE_RATE
    if not wavs:
        raise ValueError(f"no audio in {', '.join(map(str, config.audio))}; give folders of speech")
    return torch.cat(wavs)


def crops(wav: Tensor, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """(count, 1, size) random pieces of wav (S,)."""
    if len(wav) <= size:
        raise ValueError(
            f"{len(wav)} samples of audio are less than one crop of {size}; lower --frames"
        )
    starts = rng.integers(0, len(wav) - size, count)
    return torch.stack([wav[s : s + size] for s in starts])[:, None]


@torch.no_grad()
def initialise(mimi: MimiModel) -> None:
    """Convolutions that keep the variance: torch's default loses a factor of three in each."""
    for module in mimi.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = module.in_channels * module.kernel_size[0] / module.groups
            if isinstance(module, nn.ConvTranspose1d):
                fan_in /= module.stride[0]
            module.weight.normal_(std=fan_in**-0.5)
            if module.bias is not None:
                module.bias.zero_()


def reconstruct(mimi: MimiModel, wav: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 1, S) -> its reconstruction (B, 1, S), the codes (B, Q, T) and the commitment penalty.

    moshi's own forward pass, but for the quantizer's float32: distances to entries need it.
    """
    with torch.autocast(wav.device.type, dtype, enabled=dtype != torch.float32):
        latent = mimi.encode_to_latent(wav, quantize=False)
    quantized = mimi.quantizer(latent.float(), mimi.frame_rate)
    with torch.autocast(wav.device.type, dtype, enabled=dtype != torch.float32):
        (hidden,) = mimi.decoder_transformer(mimi.upsample(quantized.x))
        out = mimi.decoder(hidden)
    return out[..., : wav.shape[-1]].float(), quantized.codes, quantized.penalty


@torch.no_grad()
def evaluate(mimi: MimiModel, wav: Tensor) -> dict:
    """Mel distance with 1, 2, 4, ... codebooks, and the effective share of each one's entries.

    The effective share is exp(entropy) / codebook_size: 1 where all entries are equally frequent.
    """
    mimi.eval()
    counts = [2**i for i in range(10) if 2**i < mimi.total_codebooks] + [mimi.total_codebooks]
    distances = {}
    for q in counts:
        mimi.set_num_codebooks(q)
        out, codes, _ = reconstruct(mimi, wav, torch.float32)
        distances[q] = round(mel_distance(out[:, 0], wav[:, 0]).item(), 4)
    usage = []
    for codebook in rearrange(codes, "b q t -> q (b t)"):
        share = torch.bincount(codebook, minlength=mimi.cardinality) / codebook.numel()
        usage.append(round(torch.special.entr(share).sum().exp().item() / mimi.cardinality, 3))
    mimi.train()
    return {"mel_distance": distances, "usage": usage}


def save(mimi: MimiModel, optimizer: torch.optim.Optimizer, out: Path, about: dict) -> None:
    """Write mimi.safetensors (float16) and mimi.json for the codec, training.pt to go on from."""
    weights = {k: v.half().contiguous() for k, v in mimi.state_dict().items()}
    save_file(weights, out / "mimi.safetensors.tmp")
    (out / "mimi.json.tmp").write_text(json.dumps(about, indent=1) + "\n")
    state = {"model": mimi.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": about["step"]}, out / "training.pt.tmp")
    for name in ("mimi.safetensors", "mimi.json", "training.pt"):
        (out / f"{name}.tmp").replace(out / name)


def load(mimi: MimiModel, optimizer: torch.optim.Optimizer, out: Path) -> int:
    """Put the last checkpoint in place; returns its step. Raises FileNotFoundError, ValueError."""
    path = out / "training.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; there is nothing to --resume")
    state = torch.load(path, weights_only=True)
    try:
        mimi.load_state_dict(state["model"])
    except RuntimeError:
        raise ValueError(
            f"{path} is of another shape; repeat its flags, or leave out --resume"
        ) from None
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(config: CodecConfig) -> dict:
    """Train, with a checkpoint every `save_every` steps; returns what mimi.json says."""
    device = resolve_device(config.device)
    # Not on the CPU: with AMX, oneDNN of torch 2.9 computes the bfloat16 convolution from 16 to 32
    # channels with kernel 8 and stride 4 wrongly (relative error above one); training diverges.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(config.seed)
    shape = mimi_shape(**{name: getattr(config, name) for name in SHAPE})
    mimi = build(shape).to(device).train()
    initialise(mimi)
    optimizer = torch.optim.AdamW(mimi.parameters(), lr=config.lr, betas=(0.8, 0.99), fused=True)
    start = load(mimi, optimizer, config.out) if config.resume else 0
    config.out.mkdir(parents=True, exist_ok=True)

    wav = from_files(config) if config.audio else counting(config.minutes, config.seed)
    pool, held_out = wav[: -len(wav) // 20], wav[-len(wav) // 20 :]
    size = config.frames * mimi.frame_size
    held_out = crops(held_out, 32, size, np.random.default_rng(config.seed)).to(device)
    began, about = time.time(), {}
    for step in (bar := tqdm(range(start, config.max_steps), unit="step")):
        # A stream of its own for each step: a resumed run draws what an uninterrupted one draws.
        rng = np.random.default_rng((config.seed, step))
        schedule(mimi, optimizer, step, rng, config)
        wav = crops(pool, config.batch_size, size, rng).to(device)
        out, _, penalty = reconstruct(mimi, wav, dtype)
        distance = mel_distance(out[:, 0], wav[:, 0])
        (distance + 0.05 * penalty + 0.1 * (out - wav).abs().mean()).backward()
        nn.utils.clip_grad_norm_(mimi.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for buffer in mimi.buffers():
            buffer.detach_()  # moshi's moving averages otherwise keep every step's graph alive
        if step % 20 == 0:
            bar.set_postfix(mel=f"{distance.item():.3f}", penalty=f"{penalty.item():.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.max_steps:
            numbers = evaluate(mimi, held_out)
            seconds = round(time.time() - began)
            about = {"mimi": shape, "step": step + 1, **numbers, "seconds": seconds}
            bar.write(f"step {step + 1}: {numbers}")
            save(mimi, optimizer, config.out, about)
    return about


def schedule(
    mimi: MimiModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    rng: np.random.Generator,
    config: CodecConfig,
) -> None:
    """Set the step's number of codebooks, share of quantized clips and learning rate."""
    # Half of the steps use all codebooks, the others 1..Q: few must be intelligible too.
    every = rng.random() < 0.5
    q = config.num_codebooks if every else int(rng.integers(1, config.num_codebooks + 1))
    mimi.set_num_codebooks(q)
    for rvq in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        # Quantized from the start, the latent collapses to a few points.
        rvq.no_quantization_rate = max(0.0, 1 - step / config.plain_steps)
    warmup = (step + 1) / config.warmup_steps
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * min(warmup, decay)


if __name__ == "__main__":
    run(CodecConfig, train, __doc__)
