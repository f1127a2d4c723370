"""runs/NAME (+ a prompt) -> wav files.

    python sample.py                                            four samples of runs/digits
    python sample.py --prompt nanomimi/tiny/digits/awb.ogg --prompt_seconds 2.2    count on
    python sample.py --stream --num_samples 1 --out - | aplay -f S16_LE -r 24000   listen live

A wav holds the prompt and what follows, up to END or `seconds`, which may exceed the context.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.audio import STDOUT, open_wav, read_audio, trim_silence
from nanomimi.codec import CHUNK_SECONDS, Codec
from nanomimi.config import Config, option, run_script
from nanomimi.distributed import resolve_device, resolve_dtype
from nanomimi.lm import LanguageModel
from nanomimi.sampling import make_sampler
from nanomimi.tokens import separator


@dataclass(frozen=True)
class SampleConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    prompt: Path | None = option(None, "audio file to continue; default: start from nothing")
    prompt_seconds: float = option(3.0, "seconds taken from the start of the prompt", above=0)
    seconds: float = option(10.0, "seconds of new audio at most", above=0)
    min_seconds: float = option(1.0, "seconds of new audio at least", at_least=0)
    num_samples: int = option(4, "samples, generated as one batch", at_least=1)
    temperature: float = option(0.8, "0: the likeliest token; 1: as the model says", at_least=0)
    top_k: int = option(30, "draw from the k likeliest tokens; 0: from all", at_least=0)
    top_p: float = option(1.0, "draw from the likeliest with this share", above=0, at_most=1)
    seed: int = option(0, "seed of the draws", at_least=0)
    codec: str | None = option(None, "where the codec is now, if not where prepare.py found it")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 on a GPU")
    replay: bool = option(True, "record a decoding step and replay it")
    stream: bool = option(False, "write audio frame by frame, in constant memory")
    out: Path = option(Path("samples"), "folder for the wavs; -: 16-bit samples to standard output")


def sample(config: SampleConfig) -> list[Path]:
    """Write num_samples wavs and return their paths. Raises ValueError for unfit settings."""
    if config.out == STDOUT and not (config.stream and config.num_samples == 1):
        raise ValueError("--out - is one stream: it needs --stream --num_samples 1")
    device = resolve_device(config.device)
    model, run = checkpoint.load(config.run, device)
    model.to(resolve_dtype(config.dtype, device, amx=False))
    codec = Codec.load(config.codec or run["data"]["codec"], model.num_codebooks, device)
    if codec.sha256 != run["data"]["codec_sha256"]:
        mismatch = f"codec {codec.name} is not the one of {config.run} (its weights differ)"
        raise ValueError(f"{mismatch}; use --codec")
    prompt = encode_prompt(config, codec, model)
    paths = [STDOUT]
    if config.out != STDOUT:
        paths = [config.out / f"sample-{i}.wav" for i in range(config.num_samples)]
        config.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    sampler = make_sampler(config.temperature, config.top_k, config.top_p, config.seed, device)
    num_frames = max(1, round(config.seconds * codec.frame_rate))
    # A prompt unlike the training, as from a microphone, often seems to a model to have ended.
    options = config.num_samples, config.replay, round(config.min_seconds * codec.frame_rate)
    frames = model.generate(prompt, num_frames, sampler, *options)
    # The separator at the start of the prompt has no sound.
    heard = repeat(prompt[0, :, 1:], "q t -> t b q", b=config.num_samples)
    frames = itertools.chain(heard, tqdm(frames, total=num_frames, unit="frame"))
    block = 1 if config.stream else round(CHUNK_SECONDS * codec.frame_rate)
    seconds = write_audio(codec, frames, paths, block)
    elapsed, prompted = time.time() - start, (prompt.shape[2] - 1) / codec.frame_rate
    new = [length - prompted for length in seconds]
    lines = [f"{path}: {prompted:.2f} s of prompt + {n:.2f} s" for path, n in zip(paths, new)]
    lines += [f"{sum(new):.1f} s of audio, {sum(new) / elapsed:.1f} x real time"]
    # Standard output may be carrying the audio.
    print(*lines, sep="\n", file=sys.stderr if config.out == STDOUT else sys.stdout)
    return paths


def encode_prompt(config: SampleConfig, codec: Codec, model: LanguageModel) -> Tensor:
    """Codes (1, Q, 1 + T): the separator, then the whole frames of the prompt."""
    codes = separator(model.num_codebooks, model.codebook_size).to(codec.device)
    if config.prompt is not None:
        wav = trim_silence(read_audio(config.prompt, codec.sample_rate), codec.sample_rate)
        wav = wav[: round(config.prompt_seconds * codec.sample_rate)]
        # A last frame that is partly silence would sound like a cut.
        wav = wav[: len(wav) // codec.frame_size * codec.frame_size]
        if not len(wav):
            short = f"shorter than a frame ({1 / codec.frame_rate} s)"
            raise ValueError(f"{config.prompt} is silent or {short}; record it again")
        spoken = codec.encode(rearrange(torch.from_numpy(wav), "s -> 1 1 s"))
        codes = torch.cat([codes, spoken[0]], dim=1)
    if codes.shape[1] > model.max_frames:
        remedy = f"use --prompt_seconds {(model.max_frames - 1) / codec.frame_rate:.1f}"
        raise ValueError(f"the prompt is longer than the model's context; {remedy}")
    return rearrange(codes, "q t -> 1 q t")


def write_audio(codec: Codec, frames: Iterator, paths: list[Path], block: int) -> list[float]:
    """Decode frames (B, Q), `block` at a time, and write rows up to their END; returns seconds."""
    lengths = []

    def blocks() -> Iterator[Tensor]:
        while some := list(itertools.islice(frames, block)):
            codes = torch.stack(some, dim=2)
            # END has no sound: rows that have ended decode code 0 and are not written.
            end = codes == codec.codebook_size
            lengths.append((~end[:, 0]).sum(dim=1).tolist())
            yield codes.masked_fill(end, 0)

    with contextlib.ExitStack() as stack:
        write = [stack.enter_context(open_wav(path, codec.sample_rate)) for path in paths]
        for audio in codec.decode_stream(blocks()):
            for row, length in enumerate(lengths[-1]):
                write[row](audio[row, 0, : length * codec.frame_size].cpu().numpy())
    return [sum(row) / codec.frame_rate for row in zip(*lengths)]


if __name__ == "__main__":
    run_script(SampleConfig, sample, __doc__)
