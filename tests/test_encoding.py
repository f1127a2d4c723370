from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from nanomimi import encoding
from nanomimi.codec import Codec
from nanomimi.encoding import Recording, in_batches, in_threads


@pytest.fixture
def recordings(random_codec) -> list[Recording]:
    """Short, long, empty and unreadable ones, each in the pieces that a file is read in."""
    rng, rate = np.random.default_rng(0), random_codec.sample_rate
    lengths = (1.0, 25.0, 0.01, 2.0, 3.3, 13.0, 9.9, 0.5, 10.01, 0.81, 0.8)
    wavs = {s: 0.1 * rng.standard_normal(round(s * rate)).astype(np.float32) for s in lengths}

    def read(seconds: float) -> Iterator[np.ndarray]:
        if seconds == 2.0:
            raise OSError("gone")
        for start in range(0, len(wavs[seconds]), 10 * rate):
            if seconds == 13.0 and start > 0:
                raise ValueError("truncated in its second piece")
            yield wavs[seconds][start : start + 10 * rate]

    return [Recording("train", f"{s}", "all", partial(read, s)) for s in lengths]


def alone(recording: Recording, codec: Codec) -> torch.Tensor | Exception:
    try:
        return codec.encode_chunks(recording.chunks())
    except (ValueError, OSError) as error:
        return error


@pytest.mark.parametrize("way", [in_threads, in_batches])
@pytest.mark.parametrize("block", [4, 64])
def test_codes_are_those_of_each_recording_alone_in_their_order(
    recordings, random_codec, way, block, monkeypatch
):
    monkeypatch.setattr(encoding, "BLOCK", block)
    monkeypatch.setattr(encoding, "BATCH_SECONDS", 12)
    encoded = list(way(iter(recordings), random_codec, cores=2))
    assert [recording for recording, _ in encoded] == recordings
    differ = total = 0
    for recording, codes in encoded:
        expected = alone(recording, random_codec)
        if isinstance(expected, Exception):
            assert repr(codes) == repr(expected)
        else:
            assert codes.shape == expected.shape
            differ, total = differ + (codes != expected).sum().item(), total + codes.numel()
    # Latents agree to 1e-7; a nearest entry can still change where two are equally near.
    assert differ < 0.002 * total
    assert sum(isinstance(codes, Exception) for _, codes in encoded) == 2


def test_a_batch_holds_clips_of_similar_length_and_no_more_than_asked():
    lengths = [5, 90, 40, 41, 6, 200, 7, 39]
    clips = {i: np.zeros(length) for i, length in enumerate(lengths)}
    batches = list(encoding._batches(clips, most=120))
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    padded = [max(lengths[i] for i in batch) * len(batch) for batch in batches]
    assert all(size <= 120 or len(batch) == 1 for size, batch in zip(padded, batches))
    assert [[lengths[i] for i in batch] for batch in batches] == [
        [200],
        [90],
        [41, 40],
        [39, 7, 6],
        [5],
    ]


def test_the_next_block_is_read_while_one_is_encoded(random_codec):
    """Recordings are taken from their source one block ahead of those that are given out."""
    taken = []

    def source() -> Iterator[Recording]:
        for i in range(6 * encoding.BLOCK):
            taken.append(i)
            yield Recording("train", str(i), "all", lambda: [np.zeros(100, np.float32)])

    encoded = in_batches(source(), random_codec, cores=2)
    next(encoded)
    assert encoding.BLOCK < len(taken) <= 3 * encoding.BLOCK
    assert len(list(encoded)) == 6 * encoding.BLOCK - 1
