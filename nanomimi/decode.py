"""Step 4b, one position at a time: a decoding step is recorded once and replayed.

The products of one position take less time than the calls around them: on a GPU the launches of
hundreds of kernels, on a CPU the Python code. The calls are the same at every position, so they are
recorded, as a CUDA graph or a TorchScript trace, which gives the same numbers.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from nanomimi.llama import KVCache, Llama, LlamaConfig

Step = Callable[[Tensor, Tensor], Tensor]  # position (1,), x (B, 1, C) -> (B, 1, C)


class DecodeStep:
    """llama(x, cache) for one position: (B, 1, C) -> (B, 1, C).

    On a GPU the cache must keep its tensors, and every call overwrites the result of the last one.
    """

    def __init__(self, llama: Llama, cache: KVCache, replay: bool = True) -> None:
        """`cache` must have room for one more position; `replay` false: nothing is recorded."""
        self.cache, weight = cache, llama.norm.weight
        self.position = torch.full((1,), cache.length, device=weight.device)
        self.step: Step = lambda at, x: llama.forward_at(at, cache.mask(at), x, cache)
        record = {"cuda": _graph, "cpu": _trace}.get(weight.device.type) if replay else None
        if record is not None:
            x = weight.new_zeros(len(cache.layers[0][0]), 1, len(weight))
            try:
                # This writes into the slot of the next position, which the first call overwrites.
                self.step = record(llama, cache, self.position, x)
            except RuntimeError as error:  # a driver can refuse for reasons that are its own
                _say(f"generating without recording ({str(error).splitlines()[0]})", sys.stderr)

    def __call__(self, x: Tensor) -> Tensor:
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        return self.step(self.position, x)


_say = functools.cache(tqdm.write)  # every line once
_stream = functools.cache(torch.cuda.Stream)  # one per GPU: cuBLAS gives each 32 MB of its own


def _graph(llama: Llama, cache: KVCache, position: Tensor, x: Tensor) -> Step:
    """A CUDA graph: the kernels of one call, on the tensors of that call."""
    graph, stream = torch.cuda.CUDAGraph(), _stream(x.device)
    with torch.cuda.device(x.device):
        # Libraries initialise themselves in their first call, which must not be recorded.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            llama.forward_at(position, cache.mask(position), x, cache)
        with torch.cuda.graph(graph, stream=stream):  # first waits for all streams
            y = llama.forward_at(position, cache.mask(position), x, cache)
    return lambda _, new: (x.copy_(new), graph.replay(), y)[-1]


# A trace holds no tensors, so one trace serves all models of a shape and all batch sizes. Recording
# and the first two calls take a tenth of a second.
_traces: dict[tuple[LlamaConfig, torch.dtype], Callable[..., Tensor]] = {}


def _trace(llama: Llama, cache: KVCache, position: Tensor, x: Tensor) -> Step:
    """A TorchScript trace: the operations of one call, on the tensors that each call receives."""
    tensors = [*llama.parameters(), *cache.rope, *(part for kv in cache.layers for part in kv)]
    key = (llama.config, x.dtype)
    if key not in _traces:
        # A trace keeps the traced function; emptying the list below frees the model and the cache.
        live = [llama, cache]

        def forward(position: Tensor, x: Tensor, *_: Tensor) -> Tensor:
            # On a CPU the attended slots end with this position: no mask is needed.
            return live[0].forward_at(position, None, x, live[1])

        _traces[key] = torch.jit.trace(forward, (position, x, *tensors), check_trace=False)
        live.clear()
    return lambda position, x: _traces[key](position, x, *tensors)
