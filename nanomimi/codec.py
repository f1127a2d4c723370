"""Step 1, wav <-> codes: Mimi, Kyutai's neural codec. The only file that imports moshi.

Mimi (Moshi, arXiv 2410.00037, section 3.3) turns 80 ms of speech into one frame of Q codes by
residual vector quantization: codebook 0 is a coarse description, each further one refines what the
earlier ones left over.
"""

import contextlib
import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging
from moshi.models import MimiModel, loaders
from moshi.modules.transformer import StreamingMultiheadAttention
from moshi.utils.compile import no_cuda_graph
from safetensors import SafetensorError
from torch import Tensor

from nanomimi.audio import CHUNK_SECONDS

TINY = Path(__file__).parent / "tiny" / "mimi.safetensors"


class Codec:
    """Mimi with its first `num_codebooks` codebooks.

    Attributes: name, sha256 (of the weights), sample_rate (Hz), frame_rate (Hz), frame_size
    (samples), codebook_size, num_codebooks, device.
    """

    def __init__(self, mimi: MimiModel, name: str, sha256: str) -> None:
        self.mimi, self.name, self.sha256 = mimi.eval().requires_grad_(False), name, sha256
        self.sample_rate, self.frame_rate = mimi.sample_rate, mimi.frame_rate
        self.frame_size = mimi.frame_size
        self.codebook_size, self.num_codebooks = mimi.cardinality, mimi.num_codebooks
        self.device = next(mimi.parameters()).device

    @classmethod
    def load(cls, source: str, num_codebooks: int, device: torch.device | str = "cpu") -> "Codec":
        """`source`: "tiny" (bundled), "mimi" (Kyutai's, from the hub) or a .safetensors path.

        A path may have a .json beside it, as nanomimi.tiny.train_codec writes it, that gives
        another shape. Raises FileNotFoundError where the weights are not to be had, ValueError
        where they do not fit.
        """
        path = _weights(source)
        about = path.with_suffix(".json")
        shape = _shape(about) if about.exists() and source != "mimi" else None
        total = (shape or loaders._mimi_config)["quantizer"]["n_q"]
        if not 1 <= num_codebooks <= total:
            raise ValueError(
                f"--num_codebooks must be 1 to {total} with codec {source}; got {num_codebooks}"
            )
        try:
            mimi = loaders.get_mimi(path, shape, device, num_codebooks)
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"{path} does not hold the weights of this Mimi ({reason}); a Mimi of another "
                f"shape needs {about.name} beside it"
            ) from None
        return cls(mimi, source, hashlib.sha256(path.read_bytes()).hexdigest())

    def twin(self) -> "Codec":
        """The same weights with a streaming state of its own, to be used by another thread."""
        shared = {id(t): t for t in (*self.mimi.parameters(), *self.mimi.buffers())}
        return Codec(copy.deepcopy(self.mimi, shared), self.name, self.sha256)

    @torch.inference_mode()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, S) float32 in [-1, 1] -> codes (B, Q, T) int64, T = ceil(S / frame_size).

        The last frame is filled up with zeros. Mimi is causal, so clips of a batch may be padded on
        the right and cut to their own ceil(S / frame_size) afterwards: the codes are those of
        single clips.
        """
        if wav.ndim != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(
                f"wav must have the shape (B, 1, S) with S > 0; got {tuple(wav.shape)}"
            )
        pieces = torch.split(self._pad(wav), CHUNK_SECONDS * self.sample_rate, dim=2)
        if len(pieces) == 1:
            return self.mimi.encode(pieces[0].to(self.device)).clone()
        with self._streaming(len(wav)):
            return torch.cat([self.mimi.encode(p.to(self.device)) for p in pieces], dim=2)

    def encode_clips(self, clips: list[np.ndarray]) -> list[Tensor]:
        """Clips (S,) as one batch -> the codes (Q, T) that each has alone."""
        wav = torch.zeros(len(clips), 1, max(len(clip) for clip in clips))
        for row, clip in zip(wav, clips):
            row[0, : len(clip)] = torch.from_numpy(clip)
        frames = (-(-len(clip) // self.frame_size) for clip in clips)
        return [codes[:, :count] for codes, count in zip(self.encode(wav), frames)]

    @torch.inference_mode()
    def encode_chunks(self, chunks: Iterable[np.ndarray]) -> Tensor:
        """Consecutive pieces (S,) of one recording -> codes (Q, T), in constant memory."""
        chunks = iter(chunks)
        begin = list(itertools.islice(chunks, 2))
        if len(begin) == 1:
            # Setting up a stream takes as long as encoding a word.
            return self.encode(rearrange(torch.from_numpy(begin[0]), "s -> 1 1 s"))[0]
        chunks, codes, rest = itertools.chain(begin, chunks), [], np.zeros(0, np.float32)
        with self._streaming(1):
            for chunk in chunks:
                rest = np.concatenate([rest, chunk])
                while len(rest) >= self.frame_size:
                    size = min(len(rest), CHUNK_SECONDS * self.sample_rate)
                    size -= size % self.frame_size
                    codes.append(self._stream(rest[:size]))
                    rest = rest[size:]
            codes += [self._stream(rest)] if len(rest) else []
        if not codes:
            raise ValueError("the recording has no samples")
        return torch.cat(codes, dim=1)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, Q, T), Q at most num_codebooks -> (B, 1, T * frame_size) float32."""
        self._check(codes)
        pieces = torch.split(codes, round(CHUNK_SECONDS * self.frame_rate), dim=2)
        if len(pieces) == 1:
            return self.mimi.decode(codes.to(self.device))
        with self._streaming(len(codes)):
            return torch.cat([self.mimi.decode(p.to(self.device)) for p in pieces], dim=2)

    @torch.inference_mode()
    def decode_stream(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames (B, Q), one by one -> audio (B, frame_size) of each, as `decode` of all."""
        frames = iter(frames)
        first = next(frames, None)
        if first is None:
            return
        with self._streaming(len(first)):
            frame: Tensor | None = first
            while frame is not None:
                codes = rearrange(frame, "b q -> b q 1")
                self._check(codes)
                yield rearrange(self.mimi.decode(codes.to(self.device)), "b 1 s -> b s")
                frame = next(frames, None)

    @contextlib.contextmanager
    def _streaming(self, batch_size: int) -> Iterator[None]:
        """moshi's streaming, made exact for pieces of up to CHUNK_SECONDS.

        moshi's key-value caches hold the attention's context and no more, so the last positions of
        a piece overwrite keys that its first ones still need. Here they hold a whole piece besides.
        """
        piece = round(CHUNK_SECONDS * self.mimi.encoder_frame_rate)
        # moshi's CUDA graphs want every piece to have the same length; ours may not.
        with no_cuda_graph(), self.mimi.streaming(batch_size):
            for module in self.mimi.modules():
                if isinstance(module, StreamingMultiheadAttention):
                    cache = module._streaming_state.kv_cache
                    _, _, heads, context, head_dim = cache.cache.shape
                    module._streaming_state.kv_cache = type(cache)(
                        batch_size,
                        heads,
                        head_dim,
                        context + piece,
                        cache.respect_exec_mask,
                        cache.cache.device,
                        cache.cache.dtype,
                    )
            yield

    def _pad(self, wav: Tensor) -> Tensor:
        return torch.nn.functional.pad(wav, (0, -wav.shape[-1] % self.frame_size))

    def _stream(self, wav: np.ndarray) -> Tensor:
        wav = self._pad(torch.from_numpy(wav)).to(self.device)
        return self.mimi.encode(rearrange(wav, "s -> 1 1 s"))[0].clone()

    def _check(self, codes: Tensor) -> None:
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.num_codebooks or codes.shape[2] == 0:
            raise ValueError(
                f"codes must have the shape (B, Q, T), Q from 1 to {self.num_codebooks} and T > 0; "
                f"got {tuple(codes.shape)}"
            )
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise ValueError(
                f"codes must lie in 0..{self.codebook_size - 1}; got {int(codes.min())}.."
                f"{int(codes.max())} (END, {self.codebook_size}, has no sound: cut it off)"
            )


def moshi_version() -> str:
    """The version of the installed moshi package."""
    return version("moshi")


def build(shape: dict | None) -> MimiModel:
    """An untrained Mimi of that shape (see mimi_shape), or of Kyutai's; its codebooks are zero."""
    shape = shape or loaders._mimi_config
    return loaders.get_mimi(None, shape, num_codebooks=shape["quantizer"]["n_q"])


def mimi_shape(
    *,
    n_filters: int,
    dimension: int,
    n_layer: int,
    n_head: int,
    n_hidden: int,
    context: int,
    num_codebooks: int,
    codebook_size: int,
    codebook_dim: int,
) -> dict:
    """moshi's description of a Mimi of another size; its strides, sample and frame rate stay.

    Kyutai's own is n_filters 64, dimension 512, n_layer 8, n_head 8, n_hidden 2048, context 250 and
    32 codebooks of 2048 entries in 256 dimensions.
    """
    shape = copy.deepcopy(loaders._mimi_config)
    shape["seanet"].update(n_filters=n_filters, dimension=dimension)
    shape["transformer"].update(
        d_model=dimension,
        input_dimension=dimension,
        output_dimensions=[dimension],
        num_layers=n_layer,
        num_heads=n_head,
        dim_feedforward=n_hidden,
        context=context,
    )
    shape["quantizer"].update(
        input_dimension=dimension,
        output_dimension=dimension,
        n_q=num_codebooks,
        bins=codebook_size,
        dimension=codebook_dim,
    )
    return shape


def _shape(path: Path) -> dict:
    try:
        return json.loads(path.read_text())["mimi"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} does not describe a Mimi (no entry mimi); remove it") from None


def _weights(source: str) -> Path:
    if source == "tiny":
        return TINY
    if source == "mimi":
        # The hub client tells of every retry; the sentence below is enough.
        logging.set_verbosity_error()
        try:
            return Path(hf_hub_download(loaders.DEFAULT_REPO, loaders.MIMI_NAME))
        except OSError as error:
            raise FileNotFoundError(
                f"Mimi's weights ({loaders.MIMI_NAME} of {loaders.DEFAULT_REPO}) are not "
                f"cached and could not be downloaded ({type(error).__name__}); connect to the "
                "network, or give a downloaded file as "
                "--codec PATH.safetensors, or take the bundled small Mimi with --codec tiny"
            ) from None
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"--codec {source} is neither tiny nor mimi nor a file")
    if path.suffix != ".safetensors":
        raise ValueError(f"--codec {source} must be a .safetensors file")
    return path
