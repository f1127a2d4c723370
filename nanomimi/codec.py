"""Step 1, wav <-> codes: Mimi, Kyutai's neural codec. The only file that imports moshi.

Mimi (Moshi, arXiv 2410.00037, section 3.3) turns 80 ms of speech into one frame of Q codes.
Codebook 0 stands alone; in Kyutai's weights, it is semantic. The others are a residual vector
quantizer (RVQ): codebook 1 quantizes the same frame, and each further one what is left over.
"""

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging

# moshi's switches. Chunks differ in length, which its CUDA graphs do not allow. Compiling would
# take a C compiler and half a minute. Both hold for the process, because threads share them.
os.environ.update(NO_CUDA_GRAPH="1", NO_TORCH_COMPILE="1")

from moshi.models import MimiModel, loaders
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor
from torch.nn import functional as F

from nanomimi.files import load_tensors, read_json

TINY = Path(__file__).parent / "tiny" / "mimi.safetensors"
CHUNK_SECONDS = 10  # longer audio is encoded and decoded in chunks: memory stays constant


class Codec:
    """Mimi with its first `num_codebooks` codebooks.

    Attributes: name, sha256 (of the weights), sample_rate (Hz), frame_rate (Hz), frame_size
    (samples), codebook_size, num_codebooks, device.
    """

    def __init__(self, mimi: MimiModel, name: str, sha256: str) -> None:
        self.mimi, self.name, self.sha256 = mimi.eval().requires_grad_(False), name, sha256
        self.sample_rate, self.frame_rate = mimi.sample_rate, mimi.frame_rate
        self.frame_size, self.codebook_size = mimi.frame_size, mimi.cardinality
        self.num_codebooks, self.device = mimi.num_codebooks, next(mimi.parameters()).device
        # Convolutions in TF32, a GPU's default, round enough to change codes. The switch is the
        # process's; nothing else here has convolutions.
        torch.backends.cudnn.allow_tf32 = False

    @classmethod
    def load(cls, source: str, num_codebooks: int, device: torch.device | str = "cpu") -> "Codec":
        """`source`: "tiny" (bundled), "mimi" (Kyutai's, from the hub) or a .safetensors path.

        A .json beside the path, as nanomimi.tiny.train_codec writes it, gives another shape. Raises
        FileNotFoundError where the weights cannot be had, ValueError where they do not fit.
        """
        path = _weights(source)
        shape_path = path.with_suffix(".json")
        shape = KYUTAI if source == "mimi" or not shape_path.exists() else read_shape(shape_path)
        most = shape["quantizer"]["n_q"]
        if not 1 <= num_codebooks <= most:
            raise ValueError(
                f"--num_codebooks must be 1 to {most} for {source}; got {num_codebooks}"
            )
        # Not by moshi: its errors are bare, and it does not look at the numbers.
        mimi, remedy = build(shape, device), f"it must hold the Mimi of {shape_path.name} beside it"
        mimi.load_state_dict(load_tensors(path, mimi.state_dict(), remedy, device))
        mimi.set_num_codebooks(num_codebooks)
        return cls(mimi, source, hashlib.sha256(path.read_bytes()).hexdigest())

    def with_shared_weights(self) -> "Codec":
        """A codec of the same weights that another thread can use at the same time."""
        shared = {id(t): t for t in (*self.mimi.parameters(), *self.mimi.buffers())}
        return Codec(copy.deepcopy(self.mimi, shared), self.name, self.sha256)

    @torch.inference_mode()
    def encode(self, wav: Tensor) -> Tensor:
        """(B, 1, S) float32 in [-1, 1] -> codes (B, Q, T) int64, T = ceil(S / frame_size).

        The last frame is padded with zeros. Mimi is causal, so the clips of a batch may be padded
        on the right and their codes cut to ceil(S / frame_size) frames each.
        """
        if wav.ndim != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(f"wav must have the shape (B, 1, S), S > 0; got {tuple(wav.shape)}")
        wav = F.pad(wav, (0, -wav.shape[-1] % self.frame_size))
        chunks = torch.split(wav, CHUNK_SECONDS * self.sample_rate, dim=2)
        with self._streaming(len(wav)) if len(chunks) > 1 else contextlib.nullcontext():
            return torch.cat([self.mimi.encode(chunk.to(self.device)) for chunk in chunks], dim=2)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, Q, T), Q at most num_codebooks -> (B, 1, T * frame_size) float32."""
        self._check(codes)
        chunks = torch.split(codes, round(CHUNK_SECONDS * self.frame_rate), dim=2)
        with self._streaming(len(codes)) if len(chunks) > 1 else contextlib.nullcontext():
            return torch.cat([self.mimi.decode(chunk.to(self.device)) for chunk in chunks], dim=2)

    @torch.inference_mode()
    def decode_stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive codes (B, Q, T), at most CHUNK_SECONDS each -> the audio of each, as `decode`
        would give it for all together.
        """
        with contextlib.ExitStack() as stack:
            for i, codes in enumerate(blocks):
                if i == 0:
                    stack.enter_context(self._streaming(len(codes)))
                self._check(codes)
                yield self.mimi.decode(codes.to(self.device))

    @contextlib.contextmanager
    def _streaming(self, batch_size: int) -> Iterator[None]:
        """moshi's streaming, made exact for chunks of up to CHUNK_SECONDS.

        moshi's key-value caches hold only the attention's context, so the last positions of a chunk
        overwrite keys that its first ones still need. Here they have room for a chunk as well.
        """
        chunk = round(CHUNK_SECONDS * self.mimi.encoder_frame_rate)
        with self.mimi.streaming(batch_size):
            for module in self.mimi.modules():
                if isinstance(module, StreamingMultiheadAttention):
                    old = module._streaming_state.kv_cache
                    _, _, heads, context, head_dim = old.cache.shape
                    shape = (batch_size, heads, head_dim, context + chunk)
                    kind = (old.respect_exec_mask, old.cache.device, old.cache.dtype)
                    module._streaming_state.kv_cache = type(old)(*shape, *kind)
            yield

    def _check(self, codes: Tensor) -> None:
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.num_codebooks or not codes.numel():
            shape = f"(B, 1 to {self.num_codebooks}, T > 0)"
            raise ValueError(f"codes must have the shape {shape}; got {tuple(codes.shape)}")
        low, high, size = int(codes.min()), int(codes.max()), self.codebook_size
        if low < 0 or high >= size:  # END has no sound
            raise ValueError(f"codes must lie in 0..{size - 1} (trim at END); got {low}..{high}")


KYUTAI: dict = loaders._mimi_config  # the shape of Kyutai's Mimi


def build(shape: dict, device: torch.device | str = "cpu") -> MimiModel:
    """An untrained Mimi of that shape; its codebooks are zero. ValueError where moshi has none."""
    try:
        return loaders.get_mimi(None, shape, device, num_codebooks=shape["quantizer"]["n_q"])
    except (RuntimeError, AssertionError, ArithmeticError) as error:
        raise ValueError(f"moshi cannot build this Mimi ({' '.join(str(error).split())})") from None


def read_shape(path: Path) -> dict:
    """The shape in a .json of a Mimi, in moshi's terms. Raises FileNotFoundError, ValueError."""
    return read_json(path, {"mimi": _like(KYUTAI), ...: Any}, "it must describe a Mimi")["mimi"]


def _like(example: Any) -> Any:
    """The kind of shapes that differ from the example in numbers, not in words and switches."""
    if isinstance(example, dict):
        return {key: _like(value) for key, value in example.items()}
    if isinstance(example, list):
        return list[_like(example[0])]
    return Literal[example] if isinstance(example, (str, bool)) else type(example)


def _weights(source: str) -> Path:
    if source == "tiny":
        return TINY
    if source == "mimi":
        # The hub client reports every retry; the error below is enough.
        logging.set_verbosity_error()
        try:
            return Path(hf_hub_download(loaders.DEFAULT_REPO, loaders.MIMI_NAME))
        except OSError as error:
            raise FileNotFoundError(
                f"{loaders.MIMI_NAME} of {loaders.DEFAULT_REPO} is not cached and could not be "
                f"downloaded ({type(error).__name__}); connect to the network, give a downloaded "
                "file as --codec PATH.safetensors, or use the small Mimi with --codec tiny"
            ) from None
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"--codec {source} is neither tiny nor mimi nor a file")
    if path.suffix != ".safetensors":
        raise ValueError(f"--codec {source} must be a .safetensors file")
    return path
