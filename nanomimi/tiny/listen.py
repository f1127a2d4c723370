"""Does a run count on, and in the prompt's voice? python -m nanomimi.tiny.listen --run RUN

A prompt says three digits. A digit of the continuation is right if it follows the one before it.
The voice, judged from all digits, is right if it is the prompt's, and its factor at most a step of
the recogniser's grid away. People's (--prompts) are told apart by F0 and formants.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
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
from nanomimi.tiny import digits, sound
from nanomimi.tiny.digits import Utterance, Voice
from nanomimi.tokens import separator, trim_at_end

HUMAN = "people"


@dataclass(frozen=True)
class ListenConfig(Config):
    run: Path = option(Path("runs/digits"), "run folder written by train.py")
    trials: int = option(100, "prompts of every kind", at_least=1)
    temperature: float = option(0.8, "of the model's draws, as in sample.py", at_least=0)
    prompts: Path | None = option(None, "recordings of people, SPEAKER/DIGIT_TAKE.wav")
    seed: int = option(0, "seed of prompts and draws", at_least=0)


def make_prompts(trials: int, people: dict[str, Voice], seed: int) -> Iterator[Utterance]:
    """Three digits in a known voice, in an unheard one and in a person's, `trials` times."""
    clips, rng = digits.load_clips(), np.random.default_rng(seed)
    for _ in range(trials):
        first = int(rng.integers(10))
        said = [(first + k) % 10 for k in range(3)]
        yield digits.utter(clips, said, digits.KNOWN, rng)
        yield digits.utter(clips, said, digits.UNHEARD, rng)
        if people:
            name = str(rng.choice(list(people)))
            wav = digits.speak(people[name], said, rng)
            yield Utterance("val", HUMAN, name, 1.0, tuple(said), wav)


def continue_wav(model: LanguageModel, codec: Codec, wav: np.ndarray, sampler: Sampler) -> tuple:
    """Codes (1, Q, T) of the whole frames of wav (S,), and of up to 5 s of continuation."""
    wav = wav[None, None, : len(wav) // codec.frame_size * codec.frame_size]  # (1, 1, S)
    prompt = codec.encode(torch.from_numpy(wav))
    start, count = separator(model.num_codebooks, model.codebook_size), round(5 * codec.frame_rate)
    frames = model.generate(torch.cat([start[None], prompt], dim=2), count, sampler)
    return prompt, trim_at_end(torch.stack(list(frames), dim=2)[0], codec.codebook_size)[None]


def rate(hits: list[list[bool]]) -> tuple[float, float, int]:
    """Share of hits, its standard error and the trials. Those of one prompt are one sample."""
    total = max(1, sum(map(len, hits)))
    share = sum(map(sum, hits)) / total
    return share, sum((sum(h) - share * len(h)) ** 2 for h in hits) ** 0.5 / total, total


def listen(config: ListenConfig) -> dict[tuple[str, str], tuple[float, float, int]]:
    """Print, write to RUN/listen.json and return the rates of every kind of prompt."""
    model, run = checkpoint.load(config.run)
    codec = Codec.load(run["data"]["codec"], model.num_codebooks)
    people = digits.read_voices(config.prompts) if config.prompts else {}
    # Of every speaker and digit, the typical F0 and formants.
    measure = lambda clip: sound.pitch_and_formants(sound.render(codec, clip))
    typical = lambda clips: np.median([measure(clip) for clip in clips], axis=0)
    profiles = {name: [typical(clips) for clips in zip(*takes)] for name, takes in people.items()}
    # Plain takes are enough: the comparison warps time, and low takes are easily mistaken for low
    # factors. Without people's own clips, it hears less than half of their digits right.
    plain = {name: [takes[len(takes) // 2]] for name, takes in digits.load_clips().items()}
    recognise = sound.make_recogniser(codec, plain | people)
    sampler, hits = make_sampler(config.temperature, 30, seed=config.seed), defaultdict(list)
    prompts = make_prompts(config.trials, people, config.seed)
    for u in tqdm(prompts, total=config.trials * (3 if people else 2), unit="prompt"):
        prompt, new = continue_wav(model, codec, u.wav, sampler)
        wav = codec.decode(torch.cat([prompt, new], dim=2))[0, 0]
        pieces = sound.segments(wav[prompt.shape[2] * codec.frame_size :].numpy())
        heard, (voice, factor) = recognise(pieces) if pieces else ([], ("", 0.0))
        said = [u.digits[-1], *heard]
        right = [b == (a + 1) % 10 for a, b in zip(said, said[1:])]
        if heard and u.kind == HUMAN:
            voice, factor = sound.nearest_speaker(pieces, heard, profiles), 1.0
        own = voice == u.voice and abs(factor - u.factor) < 1.5 * sound.STEP
        hits[u.kind, "right next digit"].append(right)
        hits[u.kind, "first digit right"].append(right[:1] or [False])
        hits[u.kind, "prompt's voice"].append([own])
    rates = {row: rate(each) for row, each in hits.items()}
    for (kind, what), (share, error, trials) in rates.items():
        print(f"{kind}, {what}: {100 * share:.1f} ± {100 * error:.1f}% of {trials}")
    named = {", ".join(row): numbers for row, numbers in rates.items()}
    (config.run / "listen.json").write_text(json.dumps(named, indent=1) + "\n")
    return rates


if __name__ == "__main__":
    run_script(ListenConfig, listen, __doc__)
