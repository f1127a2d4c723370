import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomimi import codec as codec_module
from nanomimi.codec import Codec, loaders
from nanomimi.tiny import digits
from tests.conftest import save_random_mimi

ROOT = Path(__file__).parent.parent
RATE = 24000


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_the_frame_is_read_from_the_codec(random_codec):
    assert (random_codec.sample_rate, random_codec.frame_rate, random_codec.frame_size) == (
        24000,
        12.5,
        1920,
    )
    assert (random_codec.num_codebooks, random_codec.codebook_size) == (6, 15)


def test_codes_differ_between_sounds(random_codec):
    codes = random_codec.encode(torch.cat([noise(19200), noise(19200, seed=1)]))
    assert all(len(codebook.unique()) > 3 for codebook in codes[0])
    assert (codes[0] != codes[1]).any()


def test_batched_encoding_equals_single_encoding(random_codec):
    lengths = [1920 * 5, 1920 * 3 + 7, 100, 1]
    clips = [noise(n, seed=n) for n in lengths]
    batch = torch.cat([torch.nn.functional.pad(c, (0, max(lengths) - c.shape[-1])) for c in clips])
    together = random_codec.encode(batch)
    for row, clip in zip(together, clips):
        alone = random_codec.encode(clip)[0]
        assert alone.shape[1] == -(-clip.shape[-1] // 1920)
        assert torch.equal(row[:, : alone.shape[1]], alone)


def test_long_recordings_have_the_same_codes_and_sound_in_chunks(random_codec):
    wav = noise(RATE * 25)
    padded = torch.nn.functional.pad(wav, (0, -wav.shape[-1] % 1920))
    codes = random_codec.encode(wav)
    # Latents agree to 1e-7; a nearest entry can still change where two are equally near.
    assert (codes != random_codec.mimi.encode(padded)).float().mean() < 0.002
    torch.testing.assert_close(
        random_codec.decode(codes), random_codec.mimi.decode(codes), atol=1e-5, rtol=0
    )


def test_codecs_with_shared_weights_encode_in_threads_as_one_codec_alone(random_codec):
    wavs = [0.1 * torch.randn(1, 1, seconds * RATE) for seconds in (1, 25, 3, 12, 31, 2)]
    codecs = [random_codec.with_shared_weights() for _ in wavs]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda codec, wav: codec.encode(wav), codecs, wavs))
    for codes, wav in zip(together, wavs):
        assert torch.equal(codes, random_codec.encode(wav))
    shared = zip(random_codec.mimi.parameters(), codecs[0].mimi.parameters(), strict=True)
    assert all(a is b for a, b in shared)


def test_fewer_codebooks_give_the_first_codes(random_codec, random_mimi):
    assert torch.equal(
        Codec.load(str(random_mimi), 2).encode(noise(9600)), random_codec.encode(noise(9600))[:, :2]
    )


def test_a_prefix_of_the_audio_gives_a_prefix_of_the_codes(random_codec):
    wav = noise(1920 * 6)
    assert torch.equal(random_codec.encode(wav[..., : 1920 * 4]), random_codec.encode(wav)[..., :4])


@pytest.mark.parametrize("block", [1, 7, 20])
def test_streaming_decoding_equals_offline_decoding(random_codec, block):
    codes = random_codec.encode(noise(1920 * 20))
    offline = random_codec.decode(codes)
    streamed = torch.cat(list(random_codec.decode_stream(codes.split(block, dim=2))), dim=2)
    torch.testing.assert_close(streamed, offline, atol=1e-6, rtol=1e-4)
    assert list(random_codec.decode_stream([])) == []


def test_streamed_frames_join_without_a_click():
    """Speech: the step from frame to frame is about as large as steps inside them."""
    codec, voice = Codec.load("tiny", 8), digits.load_clips()["rms"]
    wav = digits.speak(voice, range(10), np.random.default_rng(0))
    frames = codec.encode(torch.from_numpy(wav)[None, None]).split(1, dim=2)
    streamed = torch.cat(list(codec.decode_stream(frames)), dim=2)[0, 0]
    one_by_one = torch.cat([codec.decode(frame)[0, 0] for frame in frames])

    def click(audio: torch.Tensor) -> float:
        """The mean step at the borders, in units of the mean step elsewhere."""
        steps = audio.diff().abs()
        border = torch.arange(1, len(steps) + 1) % codec.frame_size == 0
        return (steps[border].mean() / steps[~border].mean()).item()

    assert click(streamed) < 2 and click(one_by_one) > 3


def test_the_codec_can_be_used_again_after_a_stream_was_abandoned(random_codec):
    codes = random_codec.encode(noise(1920 * 4))
    before = random_codec.decode(codes)
    stream = random_codec.decode_stream(codes.split(1, dim=2))
    next(stream)
    stream.close()
    torch.testing.assert_close(random_codec.decode(codes), before)


@pytest.mark.parametrize(
    "codes",
    [
        torch.zeros(1, 7, 2),
        torch.zeros(1, 6, 0),
        torch.zeros(6, 2),
        torch.full((1, 6, 2), 15),
        torch.full((1, 6, 2), -1),
    ],
)
def test_impossible_codes_are_refused(random_codec, codes):
    with pytest.raises(ValueError, match="codes must"):
        random_codec.decode(codes.long())


def test_a_full_size_mimi_loads_from_a_file_and_from_the_hub_cache(tmp_path, monkeypatch):
    path = save_random_mimi(tmp_path / "mimi.safetensors", codec_module.KYUTAI)
    codec = Codec.load(str(path), 32)
    assert sum(p.numel() for p in codec.mimi.parameters()) > 70e6
    assert (codec.codebook_size, codec.num_codebooks) == (2048, 32)
    codes = codec.encode(noise(1920 * 3 + 1))
    assert codes.shape == (1, 32, 4) and len(codes.unique()) > 20
    assert codec.decode(codes).shape == (1, 1, 1920 * 4)

    # The hub's cache: refs name the commit of a branch, snapshots hold its files.
    repo = tmp_path / "hub" / ("models--" + loaders.DEFAULT_REPO.replace("/", "--"))
    commit = "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    shutil.move(path, repo / "snapshots" / commit / loaders.MIMI_NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = Codec.load("mimi", 8)
    assert cached.sha256 == codec.sha256
    assert torch.equal(cached.encode(noise(1920 * 3 + 1)), codes[:, :8])


def test_without_network_and_cache_the_error_names_three_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        Codec.load("mimi", 8)
    for remedy in ("network", "--codec PATH.safetensors", "--codec tiny"):
        assert remedy in str(error.value)


def test_files_that_are_not_this_codec_are_refused(random_mimi, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        Codec.load("nowhere.safetensors", 8)
    with pytest.raises(ValueError, match="must be 1 to 6"):
        Codec.load(str(random_mimi), 7)
    shutil.copy(random_mimi, tmp_path / "alone.safetensors")  # without its .json
    with pytest.raises(ValueError, match="must hold the Mimi of alone.json"):
        Codec.load(str(tmp_path / "alone.safetensors"), 4)
    (tmp_path / "alone.json").write_text('{"vocab_size": 65}')
    with pytest.raises(ValueError, match="must describe a Mimi"):
        Codec.load(str(tmp_path / "alone.safetensors"), 4)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="text.safetensors is damaged"):
        Codec.load(str(tmp_path / "text.safetensors"), 4)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="must be a .safetensors"):
        Codec.load(str(tmp_path / "model.pt"), 4)


PEAKS = """
import resource, sys, torch
from nanomimi.codec import Codec

codec = Codec.load(sys.argv[1], 6)
for minutes in (1, 6):
    codec.encode(torch.zeros(1, 1, minutes * 60 * codec.sample_rate))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)  # MiB
"""


def test_encoding_six_minutes_needs_little_more_than_their_samples(random_mimi):
    # A process of its own: peak memory never falls, and other tests need more.
    command = [sys.executable, "-c", PEAKS, random_mimi]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    one, six = map(int, shown.stdout.split())
    # Five minutes of samples and their padded copy take 55 MiB; unchunked activations take 1 GiB.
    assert six - one < 80


def test_the_shape_of_another_mimi_is_read_from_its_json(random_mimi):
    shape = codec_module.read_shape(random_mimi.with_suffix(".json"))
    assert codec_module.build(shape).total_codebooks == 6
