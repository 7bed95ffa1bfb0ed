"""A finished cache copied to another place: a folder or a store, from a folder or a store.

    copy(source, target)      # places of caches: cache/NAME, s3://bucket/prefix/NAME

1. The chunk files first, several at a time, then Zarr's metadata, the group's own `zarr.json` last: until then no
   reader sees the copy. In a folder they are collected in `.copying/NAME`, which takes its name when it is whole.
   The copy of zarr.json that a cache on a disk has (`root.py`) is made there; in a store there is none.
2. `.copying` (in the folder: `.journal/.copying`) says of which content the copy is. When it is the same, the same
   command sends only what is not there in its size; when it is another one's, or `verify` is asked for, content is
   compared too.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import google_crc32c

from pipeline.data import root
from pipeline.data.address import Place, Remote
from pipeline.data.chunk_files import wrong
from pipeline.data.condition import damage, is_finished, read_attributes
from pipeline.data.layout import COPYING, JOURNAL, Json, file_bytes, gb, spec_of
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.remote import Store
from pipeline.errors import UserError
from pipeline.files import remove_empty, sync, take_lock, write_aside
from pipeline.progress import Progress

THREADS = 8
IN_MEMORY = 1 << 29
"""Most bytes of files on their way, unless one file alone is larger."""


class _End(Protocol):
    """One end of a copy."""

    def get(self, key: str) -> bytes: ...

    def put(self, key: str, data: bytes) -> None: ...

    def sizes(self) -> dict[str, int]: ...

    def delete(self, keys: list[str]) -> None: ...


class _Disk:
    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> bytes:
        return (self._path / key).read_bytes()

    def put(self, key: str, data: bytes) -> None:
        if key == root.NAME:
            root.write(self._path, data)
            return
        file = self._path / key
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, data)

    def sizes(self) -> dict[str, int]:
        files = (Path(place, name) for place, _, names in os.walk(self._path) for name in names)
        return {file.relative_to(self._path).as_posix(): file.stat().st_size for file in files}

    def delete(self, keys: list[str]) -> None:
        if root.NAME in keys:
            root.forget(self._path)
        for key in keys:
            (self._path / key).unlink(missing_ok=True)


class _Item(NamedTuple):
    """A file of a cache."""

    key: str
    n_bytes: int | None
    """None: of metadata, whose size nobody has noted."""
    crc: int

    def wrong(self, data: bytes) -> str | None:
        if self.n_bytes is not None:
            return wrong(data, self.n_bytes, self.crc)
        return None if google_crc32c.value(data) == self.crc else "does not hold what was written (wrong checksum)"


def copy(source: Place, target: Place, verify: bool = False) -> bool:
    """-> whether anything had to be copied. verify: what is there is read and compared, and sent again if it differs.

    Raises UserError for a source that is damaged (nothing of a damaged file is written), for a full disk, and when
    another process copies to the same folder.
    """
    attributes = read_attributes(source)
    assert "parts" not in attributes, "a merged cache has no rows of its own"
    _check_whole(source, attributes)
    if not verify and is_whole(target):
        return False
    with _end(target, attributes) as there:
        return _copy(_Copy(source, attributes), there, verify)


def items(attributes: Json) -> Iterator[_Item]:
    """Every file of a cache but the group's own zarr.json, chunks first."""
    for name, entry in attributes["manifest"]["arrays"].items():
        spec = spec_of(entry)
        for chunk, crc in enumerate(entry["crc32c"]):
            yield _Item(spec.file(Path(), name, chunk).as_posix(), file_bytes(entry, chunk), crc)
    for key, crc in attributes["manifest"]["metadata"].items():
        yield _Item(key, None, crc)


def _check_whole(source: Place, attributes: Json) -> None:
    found = next(damage(source, attributes), None)
    if found is not None:
        array, chunk, what = found
        where = f"{source}: chunk {chunk} of {array} {what}" if array else what
        raise UserError(f"{where}; mend it before it is copied (clt cache verify says how)")


def is_whole(target: Place) -> bool:
    """Finished, and every file in its size."""
    return is_finished(target) and next(damage(target, read_attributes(target)), None) is None


@contextmanager
def _end(target: Place, attributes: Json) -> Iterator[_End]:
    """Where to write. Of a folder: one aside, which takes its name in the end."""
    if isinstance(target, Remote):
        yield Store(target, "later")
        return
    if is_finished(target):  # to be compared, or damaged
        lock = take_lock(target / JOURNAL, target)
        try:
            yield _Disk(target)
            shutil.rmtree(target / JOURNAL)
        finally:
            os.close(lock)
        return
    if (target / JOURNAL).exists():
        raise UserError(f"{target} is being extracted; go on with that, or remove it: clt cache rm {target.name}")
    aside = target.parent / COPYING / target.name
    lock = take_lock(aside / JOURNAL, target)
    try:
        there = sum(size for key, size in _Disk(aside).sizes().items() if not key.startswith(JOURNAL))
        needed, free = sum(item.n_bytes or 0 for item in items(attributes)) - there, free_bytes(aside)
        if needed > free:
            sizes = f"{gb(needed)} to write, {gb(free)} free on {disk_of(aside)}"
            raise UserError(f"{target} does not fit: {sizes}; make room first, or copy to another disk")
        yield _Disk(aside)
        shutil.rmtree(aside / JOURNAL)
        sync(Path(place, name) for place, _, names in os.walk(aside) for name in [".", *names])
        aside.rename(target)
        sync([target.parent])
        remove_empty([aside.parent])
    finally:
        os.close(lock)


class _Copy:
    """What is to be copied."""

    def __init__(self, place: Place, attributes: Json) -> None:
        self.place = place
        self.end: _End = Store(place, "later") if isinstance(place, Remote) else _Disk(place)
        self.content = str(attributes["checksum"])
        self.items = list(items(attributes))

    def send(self, item: _Item, target: _End, is_there: bool) -> bool:
        """-> whether it had to be written"""
        if is_there and item.wrong(target.get(item.key)) is None:
            return False
        data = self.end.get(item.key)
        if what := item.wrong(data):
            raise UserError(f"{self.place / item.key} {what}; mend it before it is copied (clt cache verify says how)")
        target.put(item.key, data)
        return True


def _copy(source: _Copy, target: _End, verify: bool) -> bool:
    marker = f"{JOURNAL}/{COPYING}" if isinstance(target, _Disk) else COPYING
    there = target.sizes()
    is_same = _content_of(target, marker, there) == source.content
    compares = verify or not is_same
    todo = [i for i in source.items if compares or i.n_bytes is None or there.get(i.key) != i.n_bytes]
    is_finished = is_same and root.NAME in there
    if not is_finished:
        target.delete([root.NAME])  # it is no cache until it is a whole one again
        target.put(marker, source.content.encode())
    total, left = (sum(item.n_bytes or 0 for item in some) for some in (source.items, todo))
    n_sent = 0
    with Progress(total, unit="B", desc="copy", initial=total - left) as progress:
        for item, was_sent in _in_parallel(todo, lambda item: source.send(item, target, item.key in there)):
            n_sent += was_sent
            progress.update(item.n_bytes or 0)
    if not is_finished:
        target.put(root.NAME, source.end.get(root.NAME))
    known = {item.key for item in source.items} | {root.NAME, root.COPY}
    stale = [key for key in there if key not in known and not key.startswith(JOURNAL)]
    target.delete([marker, *(stale if not is_same else [])])
    return n_sent > 0 or not is_finished


def _in_parallel(todo: list[_Item], send: Callable[[_Item], bool]) -> Iterator[tuple[_Item, bool]]:
    """Metadata after all chunks. Raises what `send` raises, when those that are on their way have ended."""
    largest = max((item.n_bytes or 0 for item in todo), default=0)
    n = max(1, min(THREADS, IN_MEMORY // max(1, largest)))
    with ThreadPoolExecutor(n, thread_name_prefix="copy") as threads:
        for some in ([item for item in todo if item.n_bytes is not None], [i for i in todo if i.n_bytes is None]):
            coming = {threads.submit(send, item): item for item in some}
            try:
                for done in as_completed(coming):
                    yield coming[done], done.result()
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise


def _content_of(target: _End, marker: str, there: dict[str, int]) -> str | None:
    """Of which content the files are that are there: noted by whoever copied them, or said by the whole."""
    if marker in there:
        return target.get(marker).decode()
    if root.NAME in there:
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(target.get(root.NAME))["attributes"]["checksum"])
    return None
