"""runs/NAME (+ a prompt) -> wav files.

    python sample.py                                            four samples of runs/digits
    python sample.py --prompt nanomimi/tiny/digits/diana.ogg    count on in diana's voice
    python sample.py --run runs/mine --prompt me.wav --prompt_seconds 3 --seconds 20 --out me

A wav holds the prompt and its continuation, decoded together. It ends where the model draws END,
after `seconds` of new audio at the latest; `seconds` may exceed the context.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.audio import read_audio, write_wav
from nanomimi.codec import Codec
from nanomimi.config import Config, option, resolve_device, run
from nanomimi.sampling import sample as draw
from nanomimi.tokens import before_end, separator


@dataclass(frozen=True)
class SampleConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    prompt: Path | None = option(None, "audio file to continue; default: start from nothing")
    prompt_seconds: float = option(3.0, "seconds taken from the start of the prompt", above=0)
    seconds: float = option(10.0, "seconds of new audio at most", above=0)
    num_samples: int = option(4, "samples, made together", at_least=1)
    temperature: float = option(0.8, "0: the likeliest token; 1: as the model says", at_least=0)
    top_k: int = option(30, "draw from the k likeliest tokens; 0: from all", at_least=0)
    top_p: float = option(1.0, "draw from the likeliest with this share", above=0, at_most=1)
    seed: int = option(0, "seed of the draws", at_least=0)
    codec: str | None = option(None, "where the codec is now, if not where prepare.py found it")
    device: str = option("auto", "auto, cpu or cuda")
    out: Path = option(Path("samples"), "folder for sample-0.wav, sample-1.wav, ...")


def sample(config: SampleConfig) -> list[Path]:
    """Write num_samples wavs and return their paths."""
    device = resolve_device(config.device)
    model, about = checkpoint.load(config.run, device)
    meta = about["data"]
    codec = Codec.load(config.codec or meta["codec"], model.num_codebooks, device)
    if codec.sha256 != meta["codec_sha256"]:
        raise ValueError(
            f"codec {codec.name} is not the one that {config.run} was trained with (its weights "
            "differ); give the right one with --codec PATH"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    start = prompt_frames(config, codec, model)
    start_time = time.time()
    num_frames = max(1, round(config.seconds * codec.frame_rate))
    codes = generate(config, model, start, num_frames)
    wavs = [decode(codec, row) for row in codes]
    elapsed = time.time() - start_time

    paths = [config.out / f"sample-{i}.wav" for i in range(len(wavs))]
    made = 0.0
    prompted = (start.shape[2] - 1) / codec.frame_rate
    for path, wav in zip(paths, wavs):
        write_wav(path, wav, codec.sample_rate)
        seconds = len(wav) / codec.sample_rate - prompted
        made += seconds
        print(f"{path}: {prompted:.2f} s of prompt + {seconds:.2f} s")
    print(f"{made:.1f} s of audio in {elapsed:.1f} s: {made / elapsed:.1f} x real time")
    return paths


def prompt_frames(config: SampleConfig, codec: Codec, model: nn.Module) -> Tensor:
    """(num_samples, Q, 1 + T): the separator, then the whole frames of the prompt."""
    codes = separator(model.num_codebooks, model.codebook_size).to(codec.device)
    if config.prompt is not None:
        wav = read_audio(config.prompt, codec.sample_rate, config.prompt_seconds)
        # A frame that the prompt fills only in part would sound as a cut.
        wav = wav[: len(wav) // codec.frame_size * codec.frame_size]
        if not len(wav):
            raise ValueError(
                f"{config.prompt} is shorter than one frame ({1 / codec.frame_rate} s)"
            )
        spoken = codec.encode(rearrange(torch.from_numpy(wav), "s -> 1 1 s"))[0]
        codes = torch.cat([codes, spoken], dim=1)
    if codes.shape[1] > model.max_frames:
        raise ValueError(
            f"the prompt has {codes.shape[1] - 1} frames and a separator, more than the model's "
            f"context of {model.max_frames}; use --prompt_seconds "
            f"{(model.max_frames - 1) / codec.frame_rate:.1f}"
        )
    return repeat(codes, "q t -> b q t", b=config.num_samples)


def generate(config: SampleConfig, model: nn.Module, start: Tensor, num_frames: int) -> Tensor:
    """(B, Q, T): the prompt without its separator and its continuation; END where a row is over."""
    generator = torch.Generator(start.device).manual_seed(config.seed)
    draw_next = partial(
        draw,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=generator,
    )
    frames = tqdm(model.generate(start, num_frames, draw_next), total=num_frames, unit="frame")
    new = torch.stack(list(frames), dim=2)
    return torch.cat([start[:, :, 1:], new], dim=2)


def decode(codec: Codec, codes: Tensor) -> np.ndarray:
    """One row (Q, T) up to its END -> (S,) float32."""
    codes = before_end(codes, codec.codebook_size)
    if not codes.shape[1]:
        return np.zeros(0, np.float32)
    return codec.decode(codes[None])[0, 0].cpu().numpy()


if __name__ == "__main__":
    run(SampleConfig, sample, __doc__)
