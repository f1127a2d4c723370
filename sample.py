"""runs/NAME (+ a prompt) -> wav files.

    python sample.py                                            four samples of runs/digits
    python sample.py --prompt nanomimi/tiny/digits/diana.ogg    count on in diana's voice
    python sample.py --run runs/mine --prompt me.wav --prompt_seconds 3 --seconds 20 --out me
    python sample.py --stream                                   write the wavs while they are made
    python sample.py --stream --num_samples 1 --out - | aplay -f S16_LE -r 24000   listen meanwhile

A wav holds the prompt and its continuation, decoded together. It ends where the model draws END,
after `seconds` of new audio at the latest; `seconds` may exceed the context.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.audio import PIPE, open_wav, read_audio, write_wav
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
    stream: bool = option(False, "write audio frame by frame, in constant memory")
    out: Path = option(Path("samples"), "folder for the wavs; -: 16-bit samples to standard output")


def sample(config: SampleConfig) -> list[Path]:
    """Write num_samples wavs and return their paths. Raises ValueError for unfit settings."""
    if config.out == PIPE and not (config.stream and config.num_samples == 1):
        raise ValueError("--out - is one stream: it needs --stream --num_samples 1")
    device = resolve_device(config.device)
    model, about = checkpoint.load(config.run, device)
    meta = about["data"]
    codec = Codec.load(config.codec or meta["codec"], model.num_codebooks, device)
    if codec.sha256 != meta["codec_sha256"]:
        raise ValueError(
            f"codec {codec.name} is not the one that {config.run} was trained with (its weights "
            "differ); give the right one with --codec PATH"
        )
    start = prompt_frames(config, codec, model)
    paths = [PIPE]
    if config.out != PIPE:
        config.out.mkdir(parents=True, exist_ok=True)
        paths = [config.out / f"sample-{i}.wav" for i in range(config.num_samples)]
    start_time = time.time()
    frames = generate(config, model, start, max(1, round(config.seconds * codec.frame_rate)))
    seconds = (stream if config.stream else decode)(codec, start[0, :, 1:], frames, paths)
    elapsed = time.time() - start_time

    # Standard output may be carrying the audio.
    say = partial(print, file=sys.stderr if config.out == PIPE else sys.stdout)
    prompted = (start.shape[2] - 1) / codec.frame_rate
    for path, length in zip(paths, seconds):
        say(f"{path}: {prompted:.2f} s of prompt + {length - prompted:.2f} s")
    made = sum(seconds) - prompted * len(paths)
    say(f"{made:.1f} s of audio in {elapsed:.1f} s: {made / elapsed:.1f} x real time")
    return paths


def prompt_frames(config: SampleConfig, codec: Codec, model: nn.Module) -> Tensor:
    """(1, Q, 1 + T): the separator, then the whole frames of the prompt."""
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
    return rearrange(codes, "q t -> 1 q t")


def generate(
    config: SampleConfig, model: nn.Module, start: Tensor, num_frames: int
) -> Iterator[Tensor]:
    """New frames (num_samples, Q), one by one; END where a row is over."""
    generator = torch.Generator(start.device).manual_seed(config.seed)
    draw_next = partial(
        draw,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=generator,
    )
    frames = model.generate(start, num_frames, draw_next, config.num_samples)
    return iter(tqdm(frames, total=num_frames, unit="frame"))


def decode(
    codec: Codec, prompt: Tensor, frames: Iterator[Tensor], paths: list[Path]
) -> list[float]:
    """Decode all frames together behind the prompt (Q, T); returns the seconds of every wav."""
    seconds = []
    for path, new in zip(paths, torch.stack(list(frames), dim=2)):
        codes = torch.cat([prompt, before_end(new, codec.codebook_size)], dim=1)
        wav = codec.decode(codes[None])[0, 0].cpu().numpy() if codes.shape[1] else np.zeros(0)
        write_wav(path, wav, codec.sample_rate)
        seconds.append(len(wav) / codec.sample_rate)
    return seconds


def stream(
    codec: Codec, prompt: Tensor, frames: Iterator[Tensor], paths: list[Path]
) -> list[float]:
    """The same, decoding and writing every frame as soon as it is there."""
    over = torch.zeros(len(paths), dtype=torch.bool, device=codec.device)

    def spoken() -> Iterator[Tensor]:
        for t in range(prompt.shape[1]):
            yield repeat(prompt[:, t], "q -> b q", b=len(paths))
        for frame in frames:
            over.logical_or_(frame[:, 0] == codec.codebook_size)
            if over.all():
                return
            # END has no sound; the row is decoded on with its neighbours and not written.
            yield frame.masked_fill(over[:, None], 0)

    seconds = np.zeros(len(paths))
    with contextlib.ExitStack() as stack:
        write = [stack.enter_context(open_wav(path, codec.sample_rate)) for path in paths]
        for audio in codec.decode_stream(spoken()):
            for row in range(len(paths)):
                if not over[row]:
                    write[row](audio[row].cpu().numpy())
                    seconds[row] += audio.shape[1] / codec.sample_rate
    return seconds.tolist()


if __name__ == "__main__":
    run(SampleConfig, sample, __doc__)
