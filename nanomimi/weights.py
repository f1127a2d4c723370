"""Weights of Llama and Llama-Mimi in, weights for Hugging Face's transformers out.

    python -m nanomimi.weights import llm-jp/Llama-Mimi-1.3B --codec mimi --out runs/llama-mimi
    python -m nanomimi.weights export --run runs/digits --out llama-digits

An export needs constrained decoding: token q of a frame is q * (codebook_size + 1) + code, and END
of codebook 0 is the end. A prompt is a separator (or its last start_positions tokens) and frames.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanomimi import checkpoint
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.writer import DatasetWriter

# Entries of config.json: those that are fields of LlamaConfig, and what llama.py needs of others.
NAMES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", head_dim="head_dim")
NAMES |= dict(n_kv_head="num_key_value_heads", n_embd="hidden_size", n_hidden="intermediate_size")
NAMES |= dict(norm_eps="rms_norm_eps", rope_theta="rope_theta", rope_scaling="rope_scaling")
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SUPPORTED = dict(architectures=(["LlamaForCausalLM"], ["LlamaModel"]), hidden_act=(None, "silu"))
SUPPORTED |= dict(attention_bias=(None, False), mlp_bias=(None, False), sliding_window=(None,))
SUPPORTED |= dict(rope_type=(None, "default", "llama3"), quantization_config=(None,))


@dataclass(frozen=True)
class WeightsConfig(Config):
    action: Literal["import", "export"] = option("import", "weights in, or out", positional=True)
    source: tuple[str, ...] = option((), "import: a folder or a name on the hub", positional=True)
    codec: str = option("mimi", "import: tiny, mimi or the path of the codec's .safetensors")
    max_frames: int = option(250, "import: context in frames, 80 ms each", at_least=2)
    run: Path = option(Path("runs/digits"), "export: run folder")
    out: Path = option(Path("runs/llama-mimi"), "new folder to write")


def read_llama(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Fields of LlamaConfig; tensors by their names in LlamaModel; the names in the backbone."""
    hf = json.loads((folder / "config.json").read_text("utf-8"))
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    hf = {"head_dim": None, "rope_theta": 10000.0, "rope_type": rope.get("type")} | hf | rope
    hf.setdefault("num_key_value_heads", hf["num_attention_heads"])
    for key, values in SUPPORTED.items():
        if hf.get(key) not in values:
            raise ValueError(f"{key} {hf.get(key)!r:.60} is not supported, only {values}")
    hf["rope_scaling"] = {key: hf[key] for key in ROPE} if hf["rope_type"] == "llama3" else None
    index, tensors = folder / "model.safetensors.index.json", {}
    shards = json.loads(index.read_text("utf-8"))["weight_map"].values() if index.exists() else ()
    for file in set(shards) or {"model.safetensors"}:
        tensors |= {n.removeprefix("model."): t for n, t in load_file(folder / file).items()}
    if hf.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    blocks = [n for n in tensors if n.startswith(("layers.", "norm.")) and "rotary_emb" not in n]
    return {ours: hf[theirs] for ours, theirs in NAMES.items()}, tensors, blocks


@contextlib.contextmanager
def reading(name: str) -> Iterator[tuple[Path, dict, dict[str, Tensor], list[str]]]:
    """The folder of a Llama, and what read_llama gives. Errors inside `with` become one line."""
    folder, remedy = Path(name), "it is no folder; check name and network (gated: hf auth login)"
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors"]))
        remedy = "a plain Llama in .safetensors is needed; pickled weights (.bin) are not read"
        yield folder, *read_llama(folder)
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{name} cannot be used ({reason:.200}): {remedy}") from None


def read_model(source: str | Path) -> dict[str, Any]:
    """What a source decides of run.json's "model": a run all, a Llama the shape of the backbone."""
    if isinstance(source, Path) or (Path(source) / "run.json").exists():
        return checkpoint.read(Path(source))["model"]
    with reading(source) as (_, llama, *_):
        return {"llama": llama}


def start(run: dict, source: str | None, device: torch.device) -> tuple[nn.Module, str]:
    """The model of `run` with the weights of the source, if any, and a note on them."""
    model, saved = run["model"], read_model(source) if source else {}
    if model | saved | {"max_frames": model["max_frames"]} != model:
        raise ValueError(f"the flags change the model in {source}; leave them out")
    if "arch" in saved:
        lm, started = checkpoint.load(Path(source), device)
        if started["data"]["codec_sha256"] != run["data"]["codec_sha256"]:
            raise ValueError(f"--data has another codec than {source}; prepare data with its codec")
        lm.max_frames = model["max_frames"]
        return lm.train(), f" (from {source})"
    lm = checkpoint.build(model).to(device)
    if source is None:
        return lm, ""
    with reading(source) as (_, _, tensors, blocks):
        lm.backbone.load_state_dict({name: tensors[name] for name in blocks})
    return lm, f" (from {source}: the backbone, not its text embeddings and head)"


def import_run(config: WeightsConfig) -> None:
    """A Llama-Mimi -> a run folder, in which a separator's last two tokens stand for its start."""
    with reading(" ".join(config.source)) as (folder, llama, tensors, blocks):
        added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
        ids = {token["content"]: token["id"] for token in added}
        codebooks, codes = (sum(part in name for name in ids) for part in ("<0_", "_0>"))
        rows = torch.tensor([[ids[f"<{c}_{q}>"] for c in range(codes)] for q in range(codebooks)])
        rows = nn.functional.pad(rows, (0, 1), value=ids["</audio>"])  # END
        model = dict(arch="flat", num_codebooks=codebooks, codebook_size=codes, llama=llama)
        model |= dict(max_frames=config.max_frames, options={"start_positions": 2})
        with torch.device("meta"):  # shapes alone
            lm = checkpoint.build(model)
        lm.backbone.load_state_dict({name: tensors[name] for name in blocks}, assign=True)
        lm.lm_head = nn.Parameter(tensors["lm_head.weight"][rows])
        rows[-2:, -1] = torch.tensor([ids["<|begin_of_text|>"], ids["<audio>"]])  # separator
        lm.embedding.weight = nn.Parameter(tensors["embed_tokens.weight"][rows.flatten()])
    codec = Codec.load(config.codec, codebooks)
    if codec.codebook_size != codes:
        raise ValueError(f"--codec must have {codes} codes per codebook, not {codec.codebook_size}")
    config.out.mkdir(parents=True)
    data, source = DatasetWriter(config.out, codec).meta() | {"splits": []}, {"data": config.source}
    checkpoint.save(config.out, 0, lm, None, {"model": model, "config": source, "data": data})


def export_run(config: WeightsConfig) -> None:
    """A flat run -> a folder that transformers loads as a LlamaForCausalLM."""
    lm, run = checkpoint.load(config.run)
    if run["model"]["arch"] != "flat":
        raise ValueError(f"{config.run} is not of --arch flat; transformers has no such model")
    tensors = lm.backbone.state_dict(prefix="model.")
    tensors |= lm.embedding.state_dict(prefix="model.embed_tokens.")
    if lm.lm_head is not None:
        tensors["lm_head.weight"] = lm.lm_head.detach().flatten(0, 1)
    llama, end = asdict(lm.backbone.config), dict(bos_token_id=None, eos_token_id=lm.codebook_size)
    hf = {theirs: llama[ours] for ours, theirs in NAMES.items()}
    positions, classes = lm.num_positions(lm.max_frames + 1), lm.embedding.num_embeddings
    hf |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": classes}
    hf |= {"max_position_embeddings": positions, "tie_word_embeddings": lm.lm_head is None}
    hf["rope_scaling"] = llama["rope_scaling"] and {"rope_type": "llama3", **llama["rope_scaling"]}
    config.out.mkdir(parents=True)
    save_file(tensors, config.out / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", hf | end), ("generation_config.json", end)):
        (config.out / name).write_text(json.dumps(content, indent=1) + "\n")


def main(config: WeightsConfig) -> None:
    import_run(config) if config.action == "import" else export_run(config)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(WeightsConfig, main, __doc__)
