import gc
import weakref
from dataclasses import replace

import pytest
import torch

from nanomimi.decode import DecodeStep
from nanomimi.llama import KVCache, Llama, LlamaConfig

CONFIG = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request) -> torch.device:
    return torch.device(request.param)


@torch.inference_mode()
@pytest.mark.parametrize("seed, rows, prefilled", [(0, 1, 1), (1, 3, 4), (2, 2, 7)])
def test_replayed_positions_equal_one_pass_over_all(device, seed, rows, prefilled):
    """For other weights and batch sizes too, all of which share a trace."""
    torch.manual_seed(seed)
    llama = Llama(CONFIG).to(device)
    x = torch.randn(rows, 10, 32, device=device)
    cache = KVCache(CONFIG, rows, max_positions=10, like=x)
    hidden = [llama(x[:, :prefilled], cache)]
    step = DecodeStep(llama, cache)
    hidden += [step(x[:, n : n + 1]).clone() for n in range(prefilled, 10)]
    torch.testing.assert_close(torch.cat(hidden, dim=1), llama(x), atol=1e-5, rtol=1e-4)
    assert cache.length == 10


@torch.inference_mode()
def test_a_cache_that_is_started_again_forgets_its_content(device):
    torch.manual_seed(0)
    llama, x = Llama(CONFIG).to(device), torch.randn(1, 6, 32, device=device)
    cache = KVCache(CONFIG, 1, max_positions=6, like=x)
    step = DecodeStep(llama, cache)
    for n in range(6):
        step(100 * x[:, n : n + 1])
    cache.length = 0
    hidden = [step(x[:, n : n + 1]).clone() for n in range(6)]
    torch.testing.assert_close(torch.cat(hidden, dim=1), llama(x), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_recording_keeps_neither_weights_nor_cache_alive(device):
    config = replace(CONFIG, n_hidden=48)  # a shape that was not traced before
    llama = Llama(config).to(device)
    cache = KVCache(config, 1, max_positions=6, like=llama.norm.weight)
    step = DecodeStep(llama, cache)
    step(torch.randn(1, 1, 32, device=device))
    kept = [weakref.ref(llama.norm.weight), weakref.ref(cache.layers[0][0])]
    del llama, cache, step
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
