"""Step 4b, position after position: a pass through the decoder, recorded once and replayed.

One position is so little work that calling the layers takes longer than their products: on a GPU
the launches of hundreds of small kernels, on a CPU Python. The calls are the same for every
position, so they are recorded, as a CUDA graph or as a trace of TorchScript. Either repeats the
operations of llama.py and gives the same numbers.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanomimi.llama import KVCache, Llama, LlamaConfig

Step = Callable[[Tensor, Tensor], Tensor]  # position (1,), x (B, 1, C) -> (B, 1, C)


class Replay:
    """llama(x, cache) for one position at a time: (B, 1, C) -> (B, 1, C).

    On a GPU the tensors of the cache must stay, and the next call overwrites the result.
    """

    def __init__(self, llama: Llama, cache: KVCache) -> None:
        """`cache` has room for a position."""
        self.cache, weight = cache, llama.norm.weight
        self.position = torch.full((1,), cache.length, device=weight.device)
        x = weight.new_zeros(len(cache.layers[0][0]), 1, len(weight))
        # What the recording writes into the cache, the first call will overwrite.
        record = _graph if weight.is_cuda else _trace
        self.step = record(llama, cache, self.position, x)

    def __call__(self, x: Tensor) -> Tensor:
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        return self.step(self.position, x)


def _graph(llama: Llama, cache: KVCache, position: Tensor, x: Tensor) -> Step:
    """The kernels of one call, on the tensors of that call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device):
        # Libraries prepare themselves at their first call, which a recording must not contain.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            llama.at(position, cache.mask(position), x, cache)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            y = llama.at(position, cache.mask(position), x, cache)

    def step(_: Tensor, new: Tensor) -> Tensor:
        x.copy_(new)
        graph.replay()
        return y

    return step


# A trace holds no tensors, so one serves all decoders of a shape, whatever the batch; making it and
# its first two calls take a tenth of a second.
_traces: dict[tuple[LlamaConfig, torch.dtype], Callable[..., Tensor]] = {}


def _trace(llama: Llama, cache: KVCache, position: Tensor, x: Tensor) -> Step:
    """The operations of one call, on the tensors that each call is given."""
    tensors = [*llama.parameters(), *(part for kv in cache.layers for part in kv)]
    key = (llama.config, x.dtype)
    if key not in _traces:
        live = [llama, cache]  # emptied below, because a trace keeps the function that was traced

        def at(position: Tensor, x: Tensor, *_: Tensor) -> Tensor:
            # On a CPU the keys end with the position, so there is nothing to mask.
            return live[0].at(position, None, x, live[1])

        _traces[key] = torch.jit.trace(at, (position, x, *tensors), check_trace=False)
        live.clear()
    return lambda position, x: _traces[key](position, x, *tensors)
