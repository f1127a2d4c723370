"""nanomimi: flattened speech language modeling with Mimi tokens and a Llama.

    wav (B, 1, S)  --Codec.encode-->  codes (B, Q, T)  --flatten-->  tokens (B, T*Q)  -->  train.bin
    tokens (B, (T+1)*Q)  --FlatLM, HierarchicalLM, DelayLM-->  nats (B, T, Q)   the loss: their mean
    prompt (B, Q, T)  --model.generate-->  one frame (B, Q) after another  --Codec.decode-->  wav

Letters, the same in every file: B batch, S samples of audio, T frames of 80 ms, Q codebooks, N flat
tokens (T*Q), C channels (n_embd), H heads, D dimensions per head, V classes per codebook
(codebook_size + 1, for END). Losses are in nats: a token of probability p costs -ln p.

The idea alone: tokens, data, llama, decode, lm, flat, hierarchical, sampling, optimizer, train.py.
"""

from nanomimi.audio import read_audio, write_wav
from nanomimi.codec import Codec
from nanomimi.data import TokenDataset
from nanomimi.delay import DelayLM
from nanomimi.flat import FlatLM
from nanomimi.hierarchical import HierarchicalLM
from nanomimi.llama import KVCache, Llama, LlamaConfig
from nanomimi.sampling import make_sampler
from nanomimi.tokens import flatten, separator, unflatten
from nanomimi.writer import DatasetWriter
