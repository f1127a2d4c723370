"""Weights of Llama and Llama-Mimi in, weights for Hugging Face's transformers out.

    python -m nanomimi.weights import llm-jp/Llama-Mimi-1.3B --codec mimi --out runs/llama-mimi
    python -m nanomimi.weights export --run runs/digits --out llama-digits

`import` keeps the audio tokens of a Llama-Mimi. END is its </audio>, but END of the last two
codebooks is embedded as <|begin_of_text|> and <audio>, with which its sequences start: with
start_positions=2, the separator at the start becomes these two.

`export` writes a LlamaForCausalLM with the token ids of tokens.py. Its softmax covers all
codebooks, so the caller must constrain decoding: token q of a frame is q * (codebook_size + 1) +
code, or END of codebook 0, which stops. A prompt is a separator (of it only the last
start_positions tokens, if run.json has this option) and whole frames.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomimi import checkpoint
from nanomimi.codec import Codec
from nanomimi.config import Config, option, run_script
from nanomimi.writer import DatasetWriter
from nanomimi.llama import LlamaConfig, RopeScaling
from nanomimi.lm import LanguageModel

FILES = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
# Fields of LlamaConfig and RopeScaling, and their names in config.json.
NAMES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", head_dim="head_dim")
NAMES |= dict(n_kv_head="num_key_value_heads", n_embd="hidden_size", n_hidden="intermediate_size")
NAMES |= dict(norm_eps="rms_norm_eps", rope_theta="rope_theta")
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# The values of other entries that llama.py implements; transformers has more.
SUPPORTED = dict(architectures=(["LlamaForCausalLM"], ["LlamaModel"]), hidden_act=(None, "silu"))
SUPPORTED |= dict(attention_bias=(None, False), mlp_bias=(None, False), sliding_window=(None,))
SUPPORTED |= dict(rope_type=(None, "default", "llama3"), quantization_config=(None,))
# What a damaged checkpoint, and one that the hub does not give, raise.
ERRORS = (OSError, LookupError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError)


@dataclass(frozen=True)
class WeightsConfig(Config):
    action: Literal["import", "export"] = option("import", "weights in, or out", positional=True)
    source: tuple[str, ...] = option((), "import: a folder or a name on the hub", positional=True)
    codec: str = option("mimi", "import: tiny, mimi or the path of the codec's .safetensors")
    max_frames: int = option(250, "import: context in frames, 80 ms each", at_least=2)
    run: Path = option(Path("runs/digits"), "export: run folder")
    out: Path = option(Path("runs/llama-mimi"), "new folder to write")


@contextlib.contextmanager
def reading(source: str) -> Iterator[Path]:
    """The folder of a checkpoint, downloaded if need be. What is wrong with it becomes one line."""
    folder = Path(source)
    try:
        remedy = "it is no folder; check name and network, log in where it is gated (hf auth login)"
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=FILES))
        remedy = "download it again; pickled weights (.bin) are not read, convert them"
        yield folder
    except (*ERRORS, HFValidationError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{source} cannot be used ({reason:.200}): {remedy}") from None


def read_config(folder: Path) -> tuple[dict[str, Any], LlamaConfig]:
    """config.json of transformers 4 or 5, and the shape it describes."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {"rope_type": rope.get("type"), "rope_theta": 10000.0, **config, **rope}
    for key, values in SUPPORTED.items():
        if (value := config.get(key)) not in values:
            raise ValueError(f"{folder}: {key} {value!r:.60} is not supported, only {values}")
    config = {"num_key_value_heads": config["num_attention_heads"], "head_dim": None, **config}
    llama3 = config["rope_type"] == "llama3"
    scaling = RopeScaling(*(config[key] for key in ROPE)) if llama3 else None
    shape = {ours: config[theirs] for ours, theirs in NAMES.items()}
    return config, LlamaConfig(**shape, rope_scaling=scaling)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the backbone, by their names in Llama, and the others.

    They are views of the files, so memory never holds more than what is copied out of them.
    """
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    backbone, others = {}, {}
    for name, tensor in (item for file in files for item in load_file(folder / file).items()):
        name = name.removeprefix("model.")  # a LlamaModel's names lack it
        if "rotary_emb" not in name:  # old checkpoints store its frequencies
            (backbone if name.startswith(("layers.", "norm.")) else others)[name] = tensor
    return backbone, others


def read_model(source: str | Path) -> dict[str, Any]:
    """What the source decides of run.json's "model": a run (if a Path, always) all, a Llama the
    shape of the backbone.
    """
    if isinstance(source, Path) or (Path(source) / "run.json").exists():
        return checkpoint.read(Path(source))["model"]
    with reading(source) as folder:
        return {"llama": asdict(read_config(folder)[1])}


def start(
    run: dict[str, Any], source: str | None, device: torch.device
) -> tuple[LanguageModel, str]:
    """The model of `run`, with all weights of a run or the backbone of a Llama; a note on these.

    Raises ValueError where the shape, the options or the codec are not those of the source.
    """
    if source is None:
        return checkpoint.build(run["model"]).to(device), ""
    model, saved = run["model"], read_model(source)
    if model | saved | {"max_frames": model["max_frames"]} != model:
        raise ValueError(f"the flags change the model in {source}; leave them out")
    if "arch" not in saved:
        lm = checkpoint.build(model).to(device)
        with reading(source) as folder:
            lm.backbone.load_state_dict(read_tensors(folder)[0])
        return lm, f" (from {source}: the backbone, not its text embeddings and head)"
    lm, started = checkpoint.load(Path(source), device)
    if started["data"]["codec_sha256"] != run["data"]["codec_sha256"]:
        raise ValueError(f"--data has another codec than {source}; prepare the data with its codec")
    lm.max_frames = model["max_frames"]
    return lm, f" (from {source})"


def import_run(config: WeightsConfig) -> None:
    """A Llama-Mimi -> a run folder, in the dtype of the Llama-Mimi."""
    source = " ".join(config.source)
    with reading(source) as folder:
        (settings, llama), (backbone, others) = read_config(folder), read_tensors(folder)
        embedding_rows, head_rows = vocabulary(folder)
        embedding = others["embed_tokens.weight"]
        head = embedding if settings.get("tie_word_embeddings") else others["lm_head.weight"]
        tensors = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
        tensors["embedding.weight"] = embedding[embedding_rows.flatten()]
        tensors["lm_head"] = head[head_rows]
        q, codebook_size = len(head_rows), head_rows.shape[1] - 1
        model = {"arch": "flat", "num_codebooks": q, "codebook_size": codebook_size}
        model |= {"max_frames": config.max_frames, "llama": asdict(llama)}
        model |= {"options": {"start_positions": 2}}
        with torch.device("meta"):  # shapes alone
            lm = checkpoint.build(model)
        lm.load_state_dict(tensors, assign=True)
    codec = Codec.load(config.codec, q)
    if codec.codebook_size != codebook_size:
        sizes = f"{codebook_size} codes per codebook, not {codec.codebook_size}"
        raise ValueError(f"{source} has {sizes} as {codec.name}; use its --codec")
    config.out.mkdir(parents=True)
    data = DatasetWriter(config.out, codec).meta()
    run = {"model": model, "config": {"data": [source]}, "data": {**data, "splits": []}}
    checkpoint.save(config.out, 0, lm, None, run)


def vocabulary(folder: Path) -> tuple[Tensor, Tensor]:
    """Ids (Q, V) in a Llama-Mimi of our tokens: in the embedding, and in the head."""
    added = json.loads((folder / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    start, end = [ids["<|begin_of_text|>"], ids["<audio>"]], ids["</audio>"]
    num_codebooks, codes = (sum(part in name for name in ids) for part in ("<0_", "_0>"))
    if num_codebooks < len(start):
        raise ValueError(f"{folder} has {num_codebooks} codebooks; a start needs {len(start)}")
    frame = range(num_codebooks)
    head = torch.tensor([[ids[f"<{code}_{q}>"] for code in range(codes)] + [end] for q in frame])
    embedding = head.clone()
    embedding[-2:, -1] = torch.tensor(start)
    return embedding, head


def export_run(config: WeightsConfig) -> None:
    """A flat run -> a folder that transformers loads as a LlamaForCausalLM."""
    lm, run = checkpoint.load(config.run)
    if run["model"]["arch"] != "flat":
        raise ValueError(f"{config.run} is not of --arch flat; transformers has no such model")
    llama, tied = lm.backbone.config, lm.lm_head is None
    tensors = {f"model.{name}": tensor for name, tensor in lm.backbone.state_dict().items()}
    tensors["model.embed_tokens.weight"] = lm.embedding.weight.detach()
    if not tied:
        tensors["lm_head.weight"] = lm.lm_head.detach().flatten(0, 1)
    tokens = {"bos_token_id": None, "eos_token_id": lm.codebook_size}
    hf = {theirs: getattr(llama, ours) for ours, theirs in NAMES.items()} | tokens
    hf |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    hf |= {"vocab_size": lm.embedding.num_embeddings, "tie_word_embeddings": tied}
    hf["max_position_embeddings"] = lm.num_positions(lm.max_frames + 1)
    if llama.rope_scaling is not None:
        hf["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE, astuple(llama.rope_scaling)))}
    config.out.mkdir(parents=True)
    save_file(tensors, config.out / "model.safetensors", {"format": "pt"})
    for name, content in (("config.json", hf), ("generation_config.json", tokens)):
        (config.out / name).write_text(json.dumps(content, indent=1) + "\n")


def main(config: WeightsConfig) -> None:
    import_run(config) if config.action == "import" else export_run(config)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(WeightsConfig, main, __doc__)
