"""Shared pieces: a Mimi of a few thousand random weights, data of random codes, a tiny model."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nanomimi import codec as codec_module
from nanomimi.codec import Codec
from nanomimi.data import DatasetWriter
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM, csm_depth
from nanomimi.llama import LlamaConfig

SHAPE = dict(
    n_filters=2,
    dimension=16,
    n_layer=1,
    n_head=2,
    n_hidden=16,
    context=50,
    num_codebooks=6,
    codebook_size=15,
    codebook_dim=8,
)


def save_random_mimi(path: Path, shape: dict | None) -> Path:
    """A Mimi with random weights as moshi stores it; shape None is the full size.

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
    save_file(mimi.state_dict(), path)
    if shape is not None:
        path.with_suffix(".json").write_text(json.dumps({"mimi": shape}))
    return path


@pytest.fixture(scope="session")
def random_mimi(tmp_path_factory) -> Path:
    return save_random_mimi(
        tmp_path_factory.mktemp("mimi") / "random.safetensors", codec_module.mimi_shape(**SHAPE)
    )


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


def small_model(
    arch: str, num_codebooks: int, max_frames: int, codebook_size: int = 7, **shape: int
) -> nn.Module:
    """Two layers of width 32, but for `shape`."""
    llama = LlamaConfig(
        **{**dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=48), **shape}
    )
    if arch == "flat":
        return FlatLM(llama, num_codebooks, codebook_size, max_frames)
    return HierarchicalLM(
        llama, csm_depth(llama, n_head=2), num_codebooks, codebook_size, max_frames
    )


@pytest.fixture(params=["flat", "hierarchical"])
def model(request) -> nn.Module:
    """3 codebooks, a context of 8 frames, weights so large that choices are clear."""
    torch.manual_seed(0)
    model = small_model(request.param, num_codebooks=3, max_frames=8)
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
