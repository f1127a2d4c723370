"""Shared pieces: a Mimi of a few thousand random weights, data of random codes, a tiny model."""

import functools
import json
import os
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nanomimi import checkpoint
from nanomimi import codec as codec_module
from nanomimi.codec import Codec
from nanomimi.llama import LlamaConfig
from nanomimi.lm import LanguageModel
from nanomimi.tiny import digits
from nanomimi.writer import DatasetWriter
from prepare import PrepareConfig, prepare
from tests.two_processes import pytest_runtestloop  # noqa: F401, a hook of pytest

# The tensors of the tests are so small that a second thread costs more than it computes. The
# variable does the same for the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Many tests ask for the clips, which are decoded in a fifth of a second and changed by none.
digits.load_clips = functools.cache(digits.load_clips)


def small_shape() -> dict:
    """The bundled Mimi's shape with a few thousand weights."""
    shape = codec_module.read_shape(codec_module.TINY.with_suffix(".json"))
    width = dict(input_dimension=16, dim_feedforward=16, d_model=16, output_dimensions=[16])
    shape["seanet"].update(n_filters=2, dimension=16)
    shape["transformer"].update(**width, num_layers=1, num_heads=2, context=50)
    shape["quantizer"].update(input_dimension=16, output_dimension=16, n_q=6, bins=15, dimension=8)
    return shape


def save_random_mimi(path: Path, shape: dict) -> Path:
    """A Mimi with random weights, as moshi stores it.

    Its codebooks are filled around the latents of noise, each codebook finer than the one before,
    so that codes differ from frame to frame.
    """
    torch.manual_seed(0)
    mimi = codec_module.build(shape)
    with torch.no_grad():
        latent = mimi.encode_to_latent(0.1 * torch.randn(1, 1, 48000), quantize=False)[
            ..., 5:
        ]  # settled
        for rvq in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            projected = rvq.input_proj(latent)[0].T
            for level, layer in enumerate(rvq.vq.layers):
                entries = (
                    torch.randn_like(layer._codebook.embedding_sum) * projected.std(0) * 0.8**level
                )
                layer._codebook.embedding_sum.copy_(
                    entries + (projected.mean(0) if level == 0 else 0)
                )
                layer._codebook._initialized.fill_(1)  # training must not draw other entries
    save_file(mimi.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"mimi": shape}))
    return path


@pytest.fixture(scope="session")
def random_mimi(tmp_path_factory) -> Path:
    return save_random_mimi(tmp_path_factory.mktemp("mimi") / "random.safetensors", small_shape())


@pytest.fixture(scope="session")
def random_codec(random_mimi) -> Codec:
    return Codec.load(str(random_mimi), 6)


@pytest.fixture(scope="session")
def random_data(tmp_path_factory, random_codec) -> Path:
    """Random codes: 30 utterances of 5 to 20 frames for training, 10 for validation."""
    folder = tmp_path_factory.mktemp("data") / "random"
    generator = torch.Generator().manual_seed(1)
    with DatasetWriter(folder, random_codec) as writer:
        for i in range(40):
            frames = int(torch.randint(5, 21, (), generator=generator))
            codes = torch.randint(0, random_codec.codebook_size, (6, frames), generator=generator)
            writer.add(
                "val" if i % 4 == 0 else "train", codes, file=f"{i}.wav", group=f"speaker{i % 3}"
            )
    return folder


@pytest.fixture(scope="session")
def counted(tmp_path_factory) -> Path:
    """Three minutes of counting through the bundled Mimi, half of the sequences held out."""
    out = tmp_path_factory.mktemp("counted") / "data"
    prepare(PrepareConfig(out=out, hours=0.05, max_digits=12, val_fraction=0.5, device="cpu"))
    return out


def small_model(
    arch: str,
    num_codebooks: int,
    max_frames: int,
    codebook_size: int = 7,
    options: dict[str, float] | None = None,
    **shape: int,
) -> LanguageModel:
    """Two layers of width 32, but for `shape`."""
    llama = LlamaConfig(
        **{**dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48), **shape}
    )
    options = options or ({"depth_n_head": 2} if arch == "hierarchical" else {})
    return checkpoint.MODELS[arch](llama, num_codebooks, codebook_size, max_frames, **options)


@pytest.fixture(params=[*checkpoint.MODELS, "flat, start_positions"])
def model(request) -> LanguageModel:
    """3 codebooks, a context of 8 frames, weights so large that choices are clear."""
    torch.manual_seed(0)
    arch, *options = request.param.split(", ")
    options = dict.fromkeys(options, 2)
    model = small_model(arch, num_codebooks=3, max_frames=8, options=options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


def tone(seconds: float, sample_rate: int, hz: float = 440.0) -> np.ndarray:
    return 0.3 * np.sin(
        2 * np.pi * hz * np.arange(round(seconds * sample_rate)) / sample_rate
    ).astype(np.float32)


def pcm_wav(path, channels: np.ndarray, rate: int) -> None:
    """16-bit wav of (C, S) by the standard library."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).astype("<i2").tobytes())
