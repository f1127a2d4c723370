"""Step 3b, recordings -> codes: many of them, so that neither cores nor a GPU wait.

On a CPU a clip keeps one core busy and a batch is slower than its clips one by one, so a thread per
core has a codec of its own. On a GPU threads read ahead, and clips of similar length are encoded
together. Either way the codes of a recording are those that it has alone, but for rounding where
two entries of a codebook are equally near.
"""

import contextlib
import itertools
import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanomimi.codec import Codec
from nanomimi.data import Split

BLOCK = 64  # recordings that a GPU sorts by length
BATCH_SECONDS = 120  # of padded audio at most: 3 GB with a full-size Mimi


@dataclass(frozen=True)
class Recording:
    """What becomes one utterance; `chunks` reads its pieces (S,)."""

    split: Split
    file: str
    group: str
    chunks: Callable[[], Iterable[np.ndarray]]


Result = tuple[Recording, Tensor | Exception]  # codes (Q, T), or why there are none


def encode_all(recordings: Iterator[Recording], codec: Codec) -> Iterator[Result]:
    """Codes of every recording, in order."""
    # torchrun says how many processes share this machine.
    cores = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return (in_threads if codec.device.type == "cpu" else in_batches)(recordings, codec, cores)


def in_threads(recordings: Iterator[Recording], codec: Codec, cores: int) -> Iterator[Result]:
    """With a thread and a codec for every core."""
    codecs: queue.SimpleQueue[Codec] = queue.SimpleQueue()
    for own in [codec, *(codec.twin() for _ in range(cores - 1))]:
        codecs.put(own)

    def encode(recording: Recording) -> Result:
        own = codecs.get()
        try:
            return recording, own.encode_chunks(recording.chunks())
        except (ValueError, OSError) as error:
            return recording, error
        finally:
            codecs.put(own)

    with _threads_of_torch(1 if cores > 1 else None), ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[Result]] = deque()
        for recording in recordings:
            waiting.append(pool.submit(encode, recording))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_batches(recordings: Iterator[Recording], codec: Codec, cores: int) -> Iterator[Result]:
    """With threads that read the next block while one is encoded, by length."""
    with ThreadPoolExecutor(cores + 1) as pool:
        blocks = iter(lambda: list(itertools.islice(recordings, BLOCK)), [])
        begun = ((block, [pool.submit(_begin, r) for r in block]) for block in blocks)
        for block, futures in _ahead(begun, pool):
            yield from zip(block, _encode_block([f.result() for f in futures], codec, pool))


Begun = tuple[list[np.ndarray], Iterator[np.ndarray]] | Exception


def _begin(recording: Recording) -> Begun:
    """Up to two pieces and what follows; a recording of one piece is short."""
    try:
        chunks = iter(recording.chunks())
        return list(itertools.islice(chunks, 2)), chunks
    except (ValueError, OSError) as error:
        return error


def _encode_block(block: list[Begun], codec: Codec, pool: Executor) -> list[Tensor | Exception]:
    codes: dict[int, Tensor | Exception] = {}
    short: dict[int, np.ndarray] = {}
    for i, begun in enumerate(block):
        if isinstance(begun, Exception):
            codes[i] = begun
        elif len(begun[0]) == 1:
            short[i] = begun[0][0]
        else:
            try:
                codes[i] = codec.encode_chunks(_ahead(itertools.chain(*begun), pool))
            except (ValueError, OSError) as error:
                codes[i] = error
    for batch in _batches(short, BATCH_SECONDS * codec.sample_rate):
        codes.update(zip(batch, codec.encode_clips([short[i] for i in batch])))
    return [codes[i] for i in range(len(block))]


def _batches(clips: dict[int, np.ndarray], most: int) -> Iterator[list[int]]:
    """The clips' keys in groups of similar length, of at most `most` samples after padding."""
    keys = sorted(clips, key=lambda i: len(clips[i]), reverse=True)
    while keys:
        count = max(1, most // len(clips[keys[0]]))
        yield keys[:count]
        keys = keys[count:]


def _ahead(items: Iterable[Any], pool: Executor) -> Iterator[Any]:
    """The same items, each begun while the one before it is in use."""
    items = iter(items)
    waiting = pool.submit(next, items, None)
    while (item := waiting.result()) is not None:
        waiting = pool.submit(next, items, None)
        yield item


@contextlib.contextmanager
def _threads_of_torch(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
