"""Cache to batches of training rows, in an order that is a function of a seed.

1. An epoch visits the shards in a seeded order, and the rows of each in a seeded order. Epochs follow one another
   without end, and batch b is rows [b*B, (b+1)*B) of that stream, so a position in it is one integer.
2. One thread brings shards: as memory maps, or read into buffers that are used again (`cache.read`). A second one
   gathers rows from them into batches, in buffers that are used again. Both run ahead by a fixed number. Of a remote
   cache the files of more shards are fetched ahead, several at a time (`data/readahead.py`).

Where several ranks share the tokens (`share`), a batch is of all of them, and only one's own rows of it are gathered:
the stream and its batches do not depend on how many share them.

Since rows are stored in an order that is random over the whole cache, a batch mixes contexts as an ideal shuffle would.
A shard of a merged cache holds a share of each part (`merged.py`), so that this is so there too.
"""

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.data.cache import Cache
from pipeline.data.codecs import COMPRESSED
from pipeline.data.options import CacheOptions, Codec, Read
from pipeline.data.pieces import Shard, Source, take
from pipeline.data.readahead import HoldAhead, n_ahead
from pipeline.data.shuffle import Permutation, derive
from pipeline.dist.share import Share
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
"""Batches that are being gathered, or wait, while the trainer has one."""

EVERYTHING = Share()

T = TypeVar("T")
Stored = list[list[Source]]
"""The rows of a shard in each of the stored arrays."""


class Batch(NamedTuple):
    """Rows of a cache, on the CPU: B is a batch, or a rank's share of one."""

    resid_mid: Tensor
    """bfloat16 [B, L, D]"""
    mlp_out: Tensor | None
    """bfloat16 [B, L, D]; None where it is recomputed (cache.targets=recompute)"""
    rows: Tensor
    """int64 [B], row numbers in the cache"""


class Loader:
    """Endless batches of `batch_tokens` rows, from batch number `start` on.

    A batch lies in a buffer that is used again: it is valid until the next one is asked for, and a copy to a device
    that does not block has to be waited for before that. pin: buffers in page-locked memory, from which such copies
    run. shards_ahead: shards that are being read, or wait, while the rows of one are handed out. share: which rows of
    each batch to hand out, in their order (`Share.spans`); shards are read whole all the same. Memory: see
    `buffer_bytes`. A damaged shard raises UserError from `next`; so does, at once, a share that is empty.
    """

    def __init__(
        self,
        cache: Cache,
        batch_tokens: int,
        seed: int,
        read: Read = Read.auto,
        start: int = 0,
        pin: bool = False,
        shards_ahead: int = CacheOptions.shards_ahead,
        share: Share = EVERYTHING,
    ) -> None:
        assert batch_tokens > 0
        assert start >= 0
        share.check(batch_tokens)
        if shards_ahead < 1:
            raise UserError(f"cache.shards_ahead={shards_ahead}: shards are read ahead of the trainer; use 1 or more")
        self.cache = cache
        self.position = start
        """Batches handed out so far, those before `start` included: `start` of a loader that goes on from here."""
        self.read = choose_read(cache, read)
        self._batch_tokens = batch_tokens
        self._seed = seed
        self._shards = cache.shards()
        own = np.concatenate([np.arange(span.start, span.stop) for span in share.spans(batch_tokens)])
        self._is_own = np.zeros(batch_tokens, bool)
        self._is_own[own] = True
        n_own = self._n_own = len(own)
        shape = (n_own, cache.n_layers, cache.d_model)
        self._buffers = [
            Batch(
                torch.empty(shape, dtype=torch.bfloat16, pin_memory=pin),
                torch.empty(shape, dtype=torch.bfloat16, pin_memory=pin) if "mlp_out" in cache.stored else None,
                torch.empty(n_own, dtype=torch.int64, pin_memory=pin),
            )
            for _ in range(BATCHES_AHEAD + 1)
        ]
        n_shard_buffers = shards_ahead + 1 if self.read is Read.readinto else 0
        self._shard_buffers = [[cache.buffer(name) for name in cache.stored] for _ in range(n_shard_buffers)]
        several = any(len(shard.pieces) > 1 for shard in self._shards)
        stored = np.int8 if cache.codec is Codec["int8"] else np.uint16
        self._gathered = np.empty(shape if several or cache.codec is Codec["int8"] else 0, stored)
        """Rows of a batch that are yet to be decoded, or put where they belong."""
        n_held = n_ahead(cache, shards_ahead)
        self._visited = HoldAhead(self._visits(), lambda visit: cache.hold(visit[0]), n_held)
        self._reader = _Ahead(self._bring_shards(), shards_ahead, "shards")
        self._gatherer = _Ahead(self._gather(), BATCHES_AHEAD, "batches")

    @property
    def buffer_bytes(self) -> int:
        """Memory of the buffers: BATCHES_AHEAD + 1 batches and, when shards are read into memory,
        shards_ahead + 1 shards. Of maps, the system keeps in memory what it has room for."""
        batches = sum(t.nbytes for batch in self._buffers for t in batch if t is not None) + self._gathered.nbytes
        return batches + sum(array.nbytes for arrays in self._shard_buffers for array in arrays)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._gatherer.get()
        self.position += 1
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads."""
        self._reader.stop()
        self._gatherer.stop()
        self._visited.close()
        # Generators and the loader hold each other: its buffers would stay until Python looks for such circles.
        self._buffers.clear()
        self._shard_buffers.clear()

    def _visits(self) -> Iterator[tuple[Shard, Permutation, int]]:
        """(shard, order of its rows, first of them to take) from the start position on, without end."""
        epoch, skip = divmod(self.position * self._batch_tokens, self.cache.n_rows)
        while True:
            order = Permutation(len(self._shards), derive(self._seed, "shards", epoch))
            for number in order.forward(np.arange(len(self._shards))):
                shard = self._shards[number]
                if skip < shard.n_rows:
                    yield shard, Permutation(shard.n_rows, derive(self._seed, "rows", epoch, shard.number)), skip
                skip = max(0, skip - shard.n_rows)
            epoch += 1

    def _bring_shards(self) -> Iterator[tuple[Shard, Permutation, int, Stored]]:
        names = self.cache.stored
        for turn, (shard, order, skip) in enumerate(self._visited):
            buffers = self._shard_buffers[turn % len(self._shard_buffers)] if self._shard_buffers else None
            stored = [self.cache.bring(shard, n, buffers[i] if buffers else None) for i, n in enumerate(names)]
            yield shard, order, skip, stored

    def _gather(self) -> Iterator[Batch]:
        turn, filled, passed = 0, 0, 0
        while True:
            shard, order, done, stored = self._reader.get()
            places = np.arange(done, shard.n_rows)
            if self._n_own < self._batch_tokens:
                places = places[self._is_own[(passed + places - done) % self._batch_tokens]]
            passed += shard.n_rows - done
            # All at once: batch by batch the many small operations cost eight times as much.
            index = order.forward(places)
            numbers = shard.rows(index)
            while index.size:
                batch = self._buffers[turn % len(self._buffers)]
                n = min(index.size, self._n_own - filled)
                for sources, target in zip(stored, batch, strict=False):
                    assert target is not None
                    take(sources, index[:n], target[filled : filled + n], self._gathered)
                batch.rows.numpy()[filled : filled + n] = numbers[:n]
                index, numbers, filled = index[n:], numbers[n:], filled + n
                if filled == self._n_own:
                    yield batch
                    turn, filled = turn + 1, 0


def choose_read(cache: Cache, asked: Read) -> Read:
    """What was asked for; of auto, memory maps when the whole cache fits into the memory that is free now, so that it
    is read from disk once. Raises UserError for maps of a compressed cache."""
    if cache.codec in COMPRESSED:
        if asked is Read.mmap:
            raise UserError(
                f"cache.read=mmap: a {cache.codec} cache has to be decoded; use cache.read=readinto or auto"
            )
        return Read.readinto
    if asked is not Read.auto:
        return asked
    free = available_memory()
    read = Read.mmap if cache.n_bytes <= free else Read.readinto
    logger.debug("cache.read=auto: %s (%d MB, %d MB of memory free)", read, cache.n_bytes >> 20, free >> 20)
    return read


def available_memory() -> int:
    """Bytes that can be had without swapping, the page cache included."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class _Ahead(Generic[T]):
    """Runs a generator in a thread, `depth` items ahead of what `get` gave last. What it raises, `get` raises."""

    def __init__(self, items: Iterator[T], depth: int, name: str) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"loader-{name}")
        self._coming = deque(self._thread.submit(self._next) for _ in range(depth))

    def get(self) -> T:
        """The next item; the one before is released."""
        self._coming.append(self._thread.submit(self._next))
        return self._coming.popleft().result()

    def stop(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._coming.clear()

    def _next(self) -> T:
        for item in self._items:
            return item
        raise RuntimeError("this loader has failed before")  # a generator that has raised is at its end
