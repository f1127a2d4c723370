"""The GPU path: on fake CUDA tensors where there is no GPU, and on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanomimi.checkpoint import MODELS
from nanomimi.codec import Codec
from nanomimi.distributed import resolve_device, resolve_dtype
from nanomimi.llama import KVCache, Llama, LlamaConfig
from nanomimi.sampling import make_sampler
from nanomimi.tokens import flatten
from tests.conftest import small_model
from train import TrainConfig, train

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BFLOAT16 = torch.bfloat16
greedy = make_sampler(temperature=0)


class Strict(TorchFunctionMode):
    """No float64 on a GPU, and indexing by views: torch 2.9 asks a driver for its device first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return self.index(*args)
        if func is Tensor.__setitem__:
            return self.index(*args[:2]).fill_(args[2])
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        result = func(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.is_cuda and result.dtype == torch.float64)
        return result

    def attend(self, q, k, v, attn_mask=None, is_causal=False, enable_gqa=False) -> Tensor:
        """torch asks the driver which kernel fits. The rules by which none is the slow one:"""
        assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
        if enable_gqa:  # flash attention alone
            assert attn_mask is None and q.dtype == BFLOAT16
        else:
            assert q.shape[1] == k.shape[1] == v.shape[1]
        if attn_mask is not None:  # not converted and not copied in every layer
            assert attn_mask.dtype == q.dtype and attn_mask.shape == (q.shape[2], k.shape[2])
            assert attn_mask.shape[1] % 8 == 0
        return torch.empty_like(q)

    def index(self, x: Tensor, index) -> Tensor:
        axis = 0
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice):
                x = torch.ops.aten.slice(x, axis, part.start, part.stop, part.step or 1)
            elif part is None:
                x = x.unsqueeze(axis)
            elif isinstance(part, Tensor):
                x = x.index_select(axis, part)
            else:
                x, axis = x.select(axis, part), axis - 1
            axis += 1
        return x


@pytest.fixture
def fake():
    """Tensors without content, which refuse to mix devices or to tell a value (synchronization)."""
    with Strict(), FakeTensorMode():
        try:
            torch.empty(2, device="cpu").to("cuda:0")
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"torch cannot fake a GPU here: {str(error).splitlines()[0]}")
        yield


def moved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with fake weights on a GPU: Module.to cannot replace fake ones."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            weight = torch.empty(p.shape, dtype=dtype, device="cuda:0")
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("n_kv_head", [2, 4])
@pytest.mark.parametrize("arch", MODELS)
@torch.inference_mode()
def test_scoring_generating_and_a_second_prefill_stay_on_the_gpu(fake, arch, n_kv_head, dtype):
    model = moved(small_model(arch, 3, max_frames=8, n_kv_head=n_kv_head), dtype)
    tokens = torch.zeros(2, 9 * 3, dtype=torch.long, device="cuda:0")
    assert model(tokens).device == tokens.device and model(tokens).dtype == torch.float32
    cache = KVCache(model.backbone.config, 2, model.num_positions(9), like=model.embedding.weight)
    steps = model.decode_steps(cache, replay=False)
    for _ in range(2):
        cache.length = 0
        hidden = model.backbone(model.embed(tokens[:, :12]), cache)[:, -1:]
        frame, hidden = model.next_frame(hidden, tokens[:, :12], steps, greedy)
        assert frame.shape == (2, 3) and frame.is_cuda and hidden.dtype == dtype
    assert cache.length == model.num_positions(5)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("arch", MODELS)
def test_a_training_step_never_reads_a_value(arch, dtype):
    """On the device meta, whose tensors have no values: torch 2.9 cannot differentiate fake CUDA
    tensors without a driver."""
    model = small_model(arch, 3, max_frames=8).to("meta", dtype)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    model(torch.zeros(2, 27, dtype=torch.long, device="meta")).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    grads = [p.grad for p in model.parameters()]
    assert {(g.dtype, g.device.type) for g in grads} == {(dtype, "meta")}


class Unread(TorchDispatchMode):
    """Refuses what makes a program wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero"), func
        return func(*args, **(kwargs or {}))


def test_drawing_never_reads_a_value():
    draw, logits = make_sampler(0.8, top_k=3, top_p=0.9), torch.zeros(4, 8)
    with Unread():
        assert draw(logits).shape == (4,)
        with pytest.raises(AssertionError):
            logits[0, 0].item()


@pytest.mark.parametrize("arch", MODELS)
@torch.inference_mode()
def test_scoring_and_a_decoding_step_are_captured_as_one_graph(arch):
    model = small_model(arch, 3, max_frames=8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    tokens = torch.zeros(1, 27, dtype=torch.long)
    assert torch.equal(compiled(tokens), model(tokens))
    # With the fixed shapes of a GPU; the device meta has no values that a step could depend on.
    llama = model.backbone.to("meta")
    cache = KVCache(llama.config, 1, 8, like=llama.norm.weight)
    forward = lambda at, x: llama.forward_at(at, cache.mask(at), x, cache)
    step = torch.compile(forward, fullgraph=True, backend="eager")
    at, x = torch.zeros(1, dtype=torch.long, device="meta"), torch.zeros(1, 1, 32, device="meta")
    assert step(at, x).shape == (1, 1, 32)


@torch.inference_mode()
def test_folded_query_groups_equal_heads_with_keys_of_their_own():
    """A model whose key and value heads are copied for every query head is the same function."""
    torch.manual_seed(0)
    grouped = LlamaConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_hidden=40)
    shared, single = Llama(grouped), Llama(replace(grouped, n_kv_head=4))
    state = shared.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].view(2, 8, 32)
            state[name] = heads.repeat_interleave(2, dim=0).view(32, 32)
    single.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    for pieces in ([9], [4, 5], [3, 1, 1, 4]):
        hidden = []
        for llama in (shared, single):
            cache = KVCache(llama.config, 2, 9, like=x)
            hidden.append(torch.cat([llama(part, cache) for part in x.split(pieces, 1)], dim=1))
        torch.testing.assert_close(*hidden, atol=1e-5, rtol=1e-4)


def refuse(*_, **__) -> None:
    raise RuntimeError("the driver is too old\nand more")


@pytest.mark.parametrize("arch", MODELS)
def test_a_recording_that_fails_says_so_in_one_line_and_stops_nobody(arch, monkeypatch, capsys):
    prompt = torch.zeros(1, 3, 2, dtype=torch.long)
    # A shape that was not traced before, neither by another model.
    model = small_model(arch, 3, max_frames=8, n_hidden=56 + 8 * list(MODELS).index(arch))
    monkeypatch.setattr(torch.jit, "trace", refuse)
    unrecorded = torch.stack(list(model.generate(prompt, 4, greedy, replay=False)))
    assert capsys.readouterr().err == ""  # nothing was tried
    refused = torch.stack(list(model.generate(prompt, 4, greedy)))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the driver is too old" in said and "more" not in said
    monkeypatch.undo()
    recorded = torch.stack(list(model.generate(prompt, 4, greedy)))
    assert torch.equal(unrecorded, refused) and torch.equal(unrecorded, recorded)


def test_a_compilation_that_fails_trains_as_without_it(random_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    small = dict(num_codebooks=3, max_frames=8, n_layer=1, n_head=2, n_embd=32, n_hidden=32)
    small |= dict(max_steps=2, eval_windows=4, device="cpu", dtype="float32", data=(random_data,))
    plain = train(TrainConfig(**small, out=tmp_path / "plain", compile=False))
    assert train(TrainConfig(**small, out=tmp_path / "compiled", compile=True)) == plain
    assert "training is not compiled (" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_named(monkeypatch):
    for name in {"cuda", "mps"} - {torch.accelerator.current_accelerator() or ""}:
        if not (torch.cuda if name == "cuda" else torch.mps).is_available():
            with pytest.raises(ValueError, match=f"--device {name} cannot be used"):
                resolve_device(name)


def test_samples_use_float32_on_every_cpu_and_mps():
    for device in ("cpu", "mps"):
        assert resolve_dtype("auto", torch.device(device), amx=False) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu"), amx=False) == BFLOAT16


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_replayed_generation_equals_eager_generation(model, dtype):
    model.to("cuda", dtype)
    prompt = torch.zeros(2, 3, 2, dtype=torch.long, device="cuda")
    replayed, eager = (list(model.generate(prompt, 12, greedy, 2, replay)) for replay in (1, 0))
    assert torch.equal(torch.stack(replayed), torch.stack(eager))


@GPU
def test_a_compiled_model_has_the_nats_of_the_eager_one_within_bfloat16(model):
    tokens = flatten(torch.randint(0, 7, (2, 3, 9)), 7).cuda()
    with torch.autocast("cuda", BFLOAT16):
        eager = model.cuda()(tokens)
        model.compile()
        torch.testing.assert_close(model(tokens), eager, atol=0.1, rtol=0.05)


@GPU
def test_a_gpu_encodes_as_a_cpu_but_for_a_hundredth_of_the_codes():
    wav = 0.1 * torch.randn(2, 1, 48000)
    cpu, gpu = (Codec.load("tiny", 4, device).encode(wav).cpu() for device in ("cpu", "cuda"))
    assert (cpu != gpu).float().mean() < 0.01


@GPU
def test_two_runs_of_one_seed_draw_the_same(model):
    prompt = torch.zeros(2, 3, 2, dtype=torch.long, device="cuda")
    draws = [
        torch.stack(list(model.cuda().generate(prompt, 12, make_sampler(seed=3, device="cuda"))))
        for _ in range(2)
    ]
    assert torch.equal(*(draw[: min(map(len, draws))] for draw in draws))
