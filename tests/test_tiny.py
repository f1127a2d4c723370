from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nanomimi.codec import TINY, Codec
from nanomimi.tiny import digits
from nanomimi.tiny.sound import clip_mel, dtw, mel_distance, pitch_and_formants, render, segments

PLAIN = str(TINY.with_name("plain.safetensors"))


def test_the_bundled_files_are_as_small_as_promised():
    size = lambda folder, pattern: sum(path.stat().st_size for path in folder.glob(pattern))
    assert size(digits.FOLDER, "*") < 2.5e6
    assert size(TINY.parent, "mimi.*") < 6e6 and size(TINY.parent, "plain.*") < 6e6


def test_seven_voices_say_ten_digits_at_three_rates_and_pitches_and_differ_in_pitch():
    voices = digits.load_clips()
    assert len(voices) == 7
    pitches = []
    for name, takes in voices.items():
        assert [len(take) for take in takes] == [10] * (3 if name == "rms" else 9)
        length = [sum(len(clip) for clip in take) for take in takes]
        assert all(slow > plain > fast for slow, plain, fast in zip(*[iter(length)] * 3))
        if len(takes) == 9:
            assert pitch(takes[1][9]) < pitch(takes[4][9]) < pitch(takes[7][9])
        for clip in (clip for take in takes for clip in take):
            assert 0.2 < len(clip) / digits.SAMPLE_RATE < 1.0 and 0.5 < np.abs(clip).max() < 0.8
        pitches.append(pitch(takes[len(takes) // 2][9]))
    assert min(pitches) < 90 and max(pitches) > 190 and len({round(p / 5) for p in pitches}) >= 7


def pitch(clip: np.ndarray) -> float:
    """Hz, from the highest peak of the autocorrelation around the loudest sample."""
    middle = np.clip(int(np.abs(clip).argmax()), 1024, len(clip) - 1024)
    piece = clip[middle - 1024 : middle + 1024]
    correlation = np.correlate(piece, piece, "full")[2047:]
    lags = slice(digits.SAMPLE_RATE // 450, digits.SAMPLE_RATE // 60)
    return digits.SAMPLE_RATE / (lags.start + int(correlation[lags].argmax()))


def test_utterances_count_upwards_modulo_ten_and_repeat_with_the_seed():
    made = list(digits.utterances(0.02, 0.1, seed=3, max_digits=8))
    assert {len(u.digits) for u in made} == {4, 5, 6, 7, 8}
    for u in made:
        assert all(b == (a + 1) % 10 for a, b in zip(u.digits, u.digits[1:]))
    again = list(digits.utterances(0.02, 0.1, seed=3, max_digits=8))
    assert all(a.digits == b.digits and np.array_equal(a.wav, b.wav) for a, b in zip(made, again))
    assert not np.array_equal(made[0].wav, next(digits.utterances(0.02, 0.1, 4, 8)).wav)
    assert 72 < sum(len(u.wav) for u in made) / digits.SAMPLE_RATE < 72 + 8


@pytest.fixture(scope="module")
def spoken() -> dict[str, list[digits.Utterance]]:
    """Kind -> utterances, whose wav holds the numbers of their takes and then their factor."""
    composed = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load_clips", lambda: {name: [*range(9)] for name in digits.FACTORS})
        fake = lambda takes, said, rng, factor: np.array([*takes] * len(said) + [factor])
        patch.setattr(digits, "speak", fake)
        # Counted as samples, the few numbers of an utterance are half a millisecond.
        for u in digits.utterances(1 / 3600, 0.5, seed=0):
            assert u.wav[-1] == u.factor
            composed[u.kind].append(u)
    return composed


def share(u: digits.Utterance) -> float:
    """Where an utterance's factor is in the range of its voice, from 0 to 1."""
    low, high = digits.FACTORS[u.voice]
    return (u.factor - low) / (high - low)


def test_no_held_out_voice_factor_or_take_is_in_training(spoken):
    train = spoken[digits.TRAIN]
    assert {u.split for u in train} == {"train"}
    assert {u.voice for u in train} == set(digits.FACTORS) - {"kal"}
    assert {tuple(sorted({*u.wav[:-1]})) for u in train} == {(0, 1, 2), (3, 5), (6, 7, 8)}
    shares = [share(u) for u in train]
    assert not any(0.4 < s < 0.6 for s in shares)
    # Nothing else is missing.
    quarters = np.quantile(shares, (0, 0.25, 0.75, 1))
    assert np.allclose(quarters, (0, 0.2, 0.8, 1), atol=0.1)
    assert len({u.digits for u in train}) == 90  # 10 starts, 9 lengths


def test_validation_has_plain_takes_of_known_voices_and_of_unheard_ones(spoken):
    known, unheard = spoken[digits.KNOWN], spoken[digits.UNHEARD]
    assert {u.split for u in known + unheard} == {"val"}
    assert all(set(u.wav[:-1]) == {4} for u in known + unheard)
    assert len(known) == pytest.approx(len(unheard), rel=0.25)
    assert len(known + unheard) == pytest.approx(len(spoken[digits.TRAIN]), rel=0.25)
    assert {u.voice for u in known} == {u.voice for u in spoken[digits.TRAIN]}
    assert not any(0.4 < share(u) < 0.6 for u in known)
    kal = [share(u) for u in unheard if u.voice == "kal"]
    others = [share(u) for u in unheard if u.voice != "kal"]
    assert len(kal) == pytest.approx(len(others), rel=0.25)
    assert 0 <= min(kal) < 0.1 and 0.9 < max(kal) <= 1
    assert 0.4 <= min(others) and max(others) <= 0.6


def test_a_voice_factor_moves_pitch_and_formants_and_keeps_the_pauses():
    voice = digits.load_clips()["rms"][1:2]
    plain, fast = (digits.speak(voice, [9] * 4, np.random.default_rng(0), f) for f in (1.0, 1.3))
    spoken = 4 * len(voice[0][9])
    assert len(fast) == pytest.approx(len(plain) - spoken + spoken / 1.3, rel=0.003)
    nines = [segments(wav)[0] for wav in (plain, fast)]
    assert pitch(nines[1]) == pytest.approx(1.3 * pitch(nines[0]), rel=0.02)
    # Where half of the energy is below: in the formants.
    centre = lambda x: np.searchsorted(np.cumsum(p := np.abs(np.fft.rfft(x)) ** 2) / p.sum(), 0.5)
    height = [centre(x) / len(x) for x in nines]
    assert height[1] == pytest.approx(1.3 * height[0], rel=0.05)


def resynthesis(
    codec: Codec, clips: list[list[np.ndarray]], rng: np.random.Generator
) -> Iterator[tuple[int, int, np.ndarray]]:
    """The ten digits of a voice in random order and takes, through 8 codebooks and through 4 of
    them: (codebooks, digit, sound).
    """
    order, pieces, places, length = rng.permutation(10), [], [], 0
    for digit in order:
        clip = clips[rng.integers(len(clips))][digit]
        pause = np.zeros(int(rng.uniform(0.1, 0.3) * digits.SAMPLE_RATE), np.float32)
        places.append((int(digit), length + len(pause), length + len(pause) + len(clip)))
        pieces += [pause, clip]
        length += len(pause) + len(clip)
    codes = codec.encode(0.7 * torch.from_numpy(np.concatenate(pieces))[None, None])
    for q in (8, 4):
        out = codec.decode(codes[:, :q])[0, 0].numpy()
        yield from ((q, digit, out[start:end]) for digit, start, end in places)


@pytest.fixture(scope="module")
def mels() -> dict[str, list[np.ndarray]]:
    """The clips of every voice; digit i has the places i, i + 10, ..."""
    voices = digits.load_clips().items()
    return {name: [clip_mel(clip) for take in takes for clip in take] for name, takes in voices}


@pytest.mark.parametrize("source", ["tiny", PLAIN])
def test_a_digit_sounds_most_like_itself_after_a_bundled_codec(source, mels):
    codec, rng, right = Codec.load(source, 8), np.random.default_rng(11), defaultdict(list)
    for voice, clips in digits.load_clips().items():
        for q, digit, piece in resynthesis(codec, clips, rng):
            right[q].append(int(dtw(clip_mel(piece), mels[voice]).argmin()) % 10 == digit)
    assert np.mean(right[8]) >= 0.97 and np.mean(right[4]) >= 0.93


def test_every_codebook_is_used_and_more_codebooks_are_nearer():
    codec = Codec.load("tiny", 8)
    wav = np.concatenate([u.wav for u in digits.utterances(0.02, 0.5, seed=5)])
    wav = torch.from_numpy(wav[: 60 * digits.SAMPLE_RATE])[None, None]
    codes = codec.encode(wav)
    assert all(len(codebook.unique()) > 0.3 * codec.codebook_size for codebook in codes[0])
    wav, codes = wav[..., : 20 * digits.SAMPLE_RATE], codes[..., :250]
    distances = [mel_distance(codec.decode(codes[:, :q])[0], wav[0]).item() for q in (1, 2, 4, 8)]
    assert distances == sorted(distances, reverse=True)


def test_the_bundled_codec_keeps_pitch_and_the_plain_one_does_not():
    clips = [take[d] for takes in digits.load_clips().values() for take in takes for d in (1, 9)]
    f0 = lambda wav: pitch_and_formants(wav)[0]
    kept = {}
    for source, every in (("tiny", 1), (PLAIN, 3)):  # far from its limit, the plain one needs fewer
        codec = Codec.load(source, 4)
        near = [abs(f0(render(codec, clip)) - f0(clip)) < 0.05 for clip in clips[::every]]
        kept[source] = np.mean(near)
    assert kept["tiny"] > 0.8 and kept[PLAIN] < 0.3


def test_its_codebook_0_says_the_digit_in_a_voice_that_it_has_not_heard():
    """By naive Bayes: of which digit are the codes, in any order, in the voices of training?"""
    right = {}
    for source in ("tiny", PLAIN):
        codec, counts, held_out = Codec.load(source, 1), torch.full((10, 256), 0.1), []
        for voice, takes in digits.load_clips().items():
            for digit, clip in (pair for take in takes[1::3] for pair in enumerate(take)):
                codes = codec.encode(torch.from_numpy(clip)[None, None])[0, 0]
                if voice == digits.HELD_OUT_VOICE:
                    held_out.append((digit, codes))
                else:
                    counts[digit] += torch.bincount(codes, minlength=256)
        logs = (counts / counts.sum(dim=1, keepdim=True)).log()
        said = [int(logs[:, codes].mean(dim=1).argmax()) == digit for digit, codes in held_out]
        right[source] = np.mean(said)
    assert right["tiny"] > 0.75 > right[PLAIN] + 0.1


def test_silence_and_nothing_have_no_segments():
    assert segments(np.zeros(0, np.float32)) == segments(np.zeros(24000, np.float32)) == []


def test_segments_are_the_digits_between_pauses():
    u = next(digits.utterances(0.01, 0.1, seed=1))
    found = segments(u.wav)
    assert len(found) == len(u.digits)
    # Without a pause after it, the last digit may be cut, and is left out.
    after = (found[-1].ctypes.data - u.wav.ctypes.data) // u.wav.itemsize + len(found[-1])
    assert [len(segments(u.wav[: after + cut])) for cut in (-2400, 1200, 2700)] == [
        len(u.digits) - 1, len(u.digits) - 1, len(u.digits)
    ]
