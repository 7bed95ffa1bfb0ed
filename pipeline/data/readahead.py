"""Files of remote shards fetched before their turn, several at a time, while the trainer has others."""

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from pipeline.data.address import Remote
from pipeline.data.cache import Cache

AHEAD = 8
"""Shards of a remote cache that are being fetched, or wait on the disk, before the trainer's thread asks for them: as
far as they fit into `cache.local_gb`."""

T = TypeVar("T")


def n_ahead(cache: Cache, shards_ahead: int) -> int:
    """How many shards to fetch before their turn; 0 for a cache on a disk.

    Raises UserError when cache.local_gb holds less than the loader has in hand: shards_ahead that wait as maps, the one
    whose rows are taken, the one that is being replaced, and one that is fetched."""
    if not isinstance(cache.path, Remote):
        return 0
    in_hand = shards_ahead + 2
    cache.check_room(in_hand + 1)
    return min(AHEAD, cache.path.local.n_bytes // cache.shard_bytes - in_hand)


class HoldAhead(Generic[T]):
    """The items themselves, in their order; what `hold` opens for an item is open from up to n items before until the
    next one is asked for. n = 0: nothing is held. What `hold` raises is raised where its item would have come."""

    def __init__(self, items: Iterator[T], hold: Callable[[T], list[io.FileIO]], n: int) -> None:
        self._items, self._hold, self._n = items, hold, n
        self._threads = ThreadPoolExecutor(max(1, n), thread_name_prefix="fetch")
        self._coming: deque[tuple[T, Future[list[io.FileIO]]]] = deque()
        self._held: list[io.FileIO] = []

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._n:
            return next(self._items)
        _close(self._held)
        while len(self._coming) < self._n:
            item = next(self._items)  # endless
            self._coming.append((item, self._threads.submit(self._hold, item)))
        item, files = self._coming.popleft()
        self._held = files.result()
        return item

    def close(self) -> None:
        """Let go of everything, when what is being fetched has come."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        _close(self._held)
        for _, files in self._coming:
            if not files.cancelled() and files.exception() is None:
                _close(files.result())
        self._coming.clear()


def _close(files: list[io.FileIO]) -> None:
    for file in files:
        file.close()
