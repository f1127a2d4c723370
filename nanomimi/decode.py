"""Step 4b, one position at a time: a decoding step is recorded once and replayed.

The products of one position take less time than the calls around them: on a GPU the launches of
hundreds of kernels, on a CPU the Python code. The calls are the same at every position, so they are
recorded, as a CUDA graph or a TorchScript trace, which gives the same numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanomimi.llama import KVCache, Llama, LlamaConfig

Step = Callable[[Tensor, Tensor], Tensor]  # position (1,), x (B, 1, C) -> (B, 1, C)


class DecodeStep:
    """llama(x, cache) for one position: (B, 1, C) -> (B, 1, C).

    On a GPU the cache must keep its tensors, and every call overwrites the result of the last one.
    """

    def __init__(self, llama: Llama, cache: KVCache) -> None:
        """`cache` must have room for one more position."""
        self.cache, weight = cache, llama.norm.weight
        self.position = torch.full((1,), cache.length, device=weight.device)
        x = weight.new_zeros(len(cache.layers[0][0]), 1, len(weight))
        # Recording writes into the slot of the next position; the first call overwrites it.
        record = _graph if weight.is_cuda else _trace
        self.step = record(llama, cache, self.position, x)

    def __call__(self, x: Tensor) -> Tensor:
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        return self.step(self.position, x)


def _graph(llama: Llama, cache: KVCache, position: Tensor, x: Tensor) -> Step:
    """A CUDA graph: the kernels of one call, on the tensors of that call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device):
        # Libraries initialise themselves in their first call, which must not be recorded.
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            llama.forward_at(position, cache.mask(position), x, cache)
        torch.cuda.current_stream().wait_stream(warm_up)
        with torch.cuda.graph(graph):
            y = llama.forward_at(position, cache.mask(position), x, cache)

    def step(_: Tensor, new: Tensor) -> Tensor:
        x.copy_(new)
        graph.replay()
        return y

    return step


# A trace holds no tensors, so one trace serves all models of a shape and all batch sizes. Recording
# and the first two calls take a tenth of a second.
_traces: dict[tuple[LlamaConfig, torch.dtype], Callable[..., Tensor]] = {}


def _trace(llama: Llama, cache: KVCache, position: Tensor, x: Tensor) -> Step:
    """A TorchScript trace: the operations of one call, on the tensors that each call receives."""
    tensors = [*llama.parameters(), *(part for kv in cache.layers for part in kv)]
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
