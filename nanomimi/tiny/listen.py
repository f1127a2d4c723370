"""Does a run count upwards, and in the prompt's voice? python -m nanomimi.tiny.listen --run RUN

A segment between pauses is recognised as the nearest bundled clip, by dynamic time warping (DTW) of
log-mels. A digit is right if it follows the one before it, a voice if it is the prompt's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanomimi import checkpoint
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.lm import LanguageModel, Sampler
from nanomimi.sampling import make_sampler
from nanomimi.tiny import digits, train_codec
from nanomimi.tokens import separator, trim_at_end


@dataclass(frozen=True)
class ListenConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    prompts: int = option(100, "prompts of three digits", at_least=1)
    seed: int = option(0, "seed of prompts and draws", at_least=0)


def log_mel(wav: np.ndarray) -> np.ndarray:
    """(S,) -> (T, 40 bands), independent of loudness; a frame every 21 ms."""
    level = np.sqrt(np.mean(wav**2)) + 1e-9
    return train_codec.log_mel(torch.from_numpy(0.1 * wav / level)[None], 2048, 40)[0].T.numpy()


def dtw(query: np.ndarray, references: list[np.ndarray]) -> np.ndarray:
    """Mean distance along the best warping path of query (T, 40) to each reference."""
    lengths = np.array([len(r) for r in references])
    padded = np.stack([np.pad(r, ((0, max(lengths) - len(r)), (0, 0))) for r in references], axis=1)
    previous = np.full((max(lengths) + 1, len(references)), np.inf)
    previous[0] = 0
    for distance in np.abs(query[:, None, None] - padded).mean(-1):  # (T', references)
        current = np.full_like(previous, np.inf)
        for j, step in enumerate(distance):
            current[j + 1] = step + np.minimum.reduce((previous[j], previous[j + 1], current[j]))
        previous = current
    return previous[lengths, np.arange(len(references))] / (len(query) + lengths)


def segments(wav: np.ndarray, pause: float = 0.1) -> list[np.ndarray]:
    """The stretches of sound between pauses (in seconds), at least 0.1 s long."""
    block = digits.SAMPLE_RATE // 100
    level = np.sqrt(np.mean(wav[: len(wav) // block * block].reshape(-1, block) ** 2, axis=1))
    # Low enough to keep the soft s of a low voice: without it, six sounds like two.
    loud = np.flatnonzero(level > 0.02 * np.percentile(level, 95)) if len(level) else level
    runs = np.split(loud, np.flatnonzero(np.diff(loud) > pause * 100) + 1)
    return [wav[int(r[0]) * block : int(r[-1] + 1) * block] for r in runs if len(r) >= 10]


def make_recogniser(codec: Codec) -> Callable[[np.ndarray], list[tuple[str, int]]]:
    """wav (S,) -> (voice, digit) of its segments. Clips are compared as the codec renders them."""
    labels, references = [], []
    for voice, takes in digits.load_clips().items():
        for digit, clip in (pair for take in takes for pair in enumerate(take)):
            wav = codec.decode(codec.encode(torch.from_numpy(clip)[None, None]))
            labels.append((voice, digit))
            references.append(log_mel(wav[0, 0, : len(clip)].numpy()))
    return lambda wav: [labels[dtw(log_mel(s), references).argmin()] for s in segments(wav)]


def continue_wav(model: LanguageModel, codec: Codec, wav: np.ndarray, sampler: Sampler) -> tuple:
    """Codes (1, Q, T) of the whole frames of wav (S,), and of up to 5 s of continuation."""
    wav = wav[None, None, : len(wav) // codec.frame_size * codec.frame_size]  # (1, 1, S)
    prompt = codec.encode(torch.from_numpy(wav))
    start, count = separator(model.num_codebooks, model.codebook_size), round(5 * codec.frame_rate)
    frames = model.generate(torch.cat([start[None], prompt], dim=2), count, sampler)
    return prompt, trim_at_end(torch.stack(list(frames), dim=2)[0], codec.codebook_size)[None]


def listen(config: ListenConfig) -> dict[str, float]:
    """Shares of right next digits and of right voices among the digits recognised."""
    model, run = checkpoint.load(config.run)
    codec, voices = Codec.load(run["data"]["codec"], model.num_codebooks), digits.load_clips()
    recognise, rng = make_recogniser(codec), np.random.default_rng(config.seed)
    sampler = make_sampler(temperature=0.8, top_k=30, seed=config.seed)
    right, own, silent = [], [], 0
    for i in tqdm(range(config.prompts), unit="prompt"):
        name, first = list(voices)[i % len(voices)], i // len(voices) % 10
        said = digits.speak(voices[name], [(first + k) % 10 for k in range(3)], rng)
        prompt, new = continue_wav(model, codec, said, sampler)
        wav = codec.decode(torch.cat([prompt, new], dim=2))[0, 0]
        heard = recognise(wav[prompt.shape[2] * codec.frame_size :].numpy())
        silent += not heard
        before = [first + 2, *(digit for _, digit in heard)]
        right += [digit == (last + 1) % 10 for last, (_, digit) in zip(before, heard)]
        own += [voice == name for voice, _ in heard]
    share = lambda hits: sum(hits) / max(1, len(hits))
    shares = {"right_next_digit": share(right), "prompts_voice": share(own)}
    return {**shares, "digits": len(right), "silent": silent}


if __name__ == "__main__":
    run_script(ListenConfig, lambda config: print(listen(config)), __doc__)
