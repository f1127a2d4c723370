"""Recordings are encoded in threads, in order, and an unreadable one stops no other."""

from functools import partial

import numpy as np
import pytest
import torch

from nanomimi.codec import Codec
from nanomimi.tiny import digits
from prepare import PrepareConfig, Recording, describe, encode_all


@pytest.fixture
def recordings(random_codec) -> list[Recording]:
    """Short and long ones, two that cannot be read and one without samples."""
    rng, rate = np.random.default_rng(0), random_codec.sample_rate
    errors = {1: OSError("gone"), 4: ValueError("truncated")}

    def read(i: int, wav: np.ndarray) -> np.ndarray:
        if i in errors:
            raise errors[i]
        return wav

    seconds = (1.0, 2.0, 25.0, 0.01, 13.0, 0.0, 3.3, 0.5, 10.01, 0.81, 0.8)
    wavs = [0.1 * rng.standard_normal(round(s * rate)).astype(np.float32) for s in seconds]
    return [
        Recording("train", f"{i}.wav", "all", partial(read, i, wav)) for i, wav in enumerate(wavs)
    ]


def alone(recording: Recording, codec: Codec) -> torch.Tensor | Exception:
    try:
        return codec.encode(torch.from_numpy(recording.read())[None, None])[0]
    except (ValueError, OSError) as error:
        return error


@pytest.mark.parametrize("cores", [1, 3])
def test_recordings_are_encoded_as_each_alone_and_in_their_order(
    recordings, random_codec, cores, monkeypatch
):
    """Over several blocks of 32 recordings for each core."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    expected = [alone(recording, random_codec) for recording in recordings]
    assert sum(isinstance(codes, Exception) for codes in expected) == 3
    encoded = list(encode_all(iter(recordings * 10), random_codec))
    assert [recording for recording, _ in encoded] == recordings * 10
    for (_, codes), wanted in zip(encoded, expected * 10):
        if isinstance(wanted, Exception):
            assert repr(codes) == repr(wanted)
        else:
            assert torch.equal(codes, wanted)


def test_the_number_of_threads_is_restored(recordings, random_codec):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    list(encode_all(iter(recordings[:1]), random_codec))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_composed_data_depend_on_the_clips_and_other_data_do_not(
    random_codec, tmp_path, monkeypatch
):
    config, file = PrepareConfig(), tmp_path / "a.wav"
    file.write_bytes(b"audio")
    composed, recorded = (describe(config, files, random_codec) for files in ([], [file]))
    (tmp_path / "index.csv").write_text("voice,take,digit,start,length\n")
    monkeypatch.setattr(digits, "FOLDER", tmp_path)
    assert describe(config, [], random_codec) != composed
    assert describe(config, [file], random_codec) == recorded
