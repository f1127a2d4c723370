"""Writes checkpoints and their logits with Hugging Face's transformers, which no test needs:

    python tests/make_golden.py llama llama3 llama_mimi

llama3 was written by transformers 5, the others by 4. Weights are bfloat16, logits float32.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"
SIZES = dict(num_attention_heads=4, num_hidden_layers=2, initializer_range=0.3)
SIZES |= dict(hidden_size=16, intermediate_size=24, bos_token_id=0, eos_token_id=1)
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SHAPES = {
    "llama": dict(vocab_size=20, num_key_value_heads=2, head_dim=8),
    "llama3": dict(
        vocab_size=20,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        rope_theta=500000.0,  # transformers 5 moves it into rope_parameters
        rope_scaling=ROPE | dict(rope_theta=500000.0, original_max_position_embeddings=16),
    ),
    "llama_mimi": dict(vocab_size=80, num_key_value_heads=2, tie_word_embeddings=True),
}


def make(name: str) -> None:
    torch.manual_seed(0)
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **SHAPES[name])).bfloat16()
    model.save_pretrained(folder, max_shard_size="4KB" if name == "llama3" else "1MB")
    (folder / "generation_config.json").unlink()
    tokens = torch.arange(40)[None] * 7 % 20
    if name == "llama_mimi":
        ids = add_tokens(folder)
        prompt = "<|begin_of_text|> <audio>".split()
        prompt += [f"<{(5 * t + 3 * q) % 15}_{q}>" for t in range(6) for q in range(4)]
        tokens = torch.tensor([[ids[token] for token in prompt]])
    # Read back: a cast of the model would also round RoPE's frequencies.
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(tokens).logits.detach()
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")


def add_tokens(folder: Path) -> dict[str, int]:
    """A tokenizer with 4 codebooks of 15 codes, in no order; tokenizer.json keeps what is added."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    added = [f"<{code}_{q}>" for code in range(15) for q in range(4)]
    added += ["<|begin_of_text|>", "<audio>", "</audio>", "<|other|>"]
    random.Random(0).shuffle(added)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for file in [*folder.glob("tokenizer_config.json"), *folder.glob("special_tokens_map.json")]:
        file.unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": content["added_tokens"]}))
    return tokenizer.get_added_vocab()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        make(name)
