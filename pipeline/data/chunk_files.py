"""Where a cache's files come from: a folder, or an object store by way of copies on this machine's disk.

A file is named by its key, its path in the cache: `resid_mid/c/3/0/0`.
"""

import io
import logging
import shlex
from pathlib import Path
from typing import Protocol

import google_crc32c

from pipeline.data import local_copies
from pipeline.data.address import Place, Remote
from pipeline.data.commands import command_of
from pipeline.data.layout import CRC_BYTES, Json, file_bytes, gb, spec_of
from pipeline.data.remote import Store
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


class Files(Protocol):
    """Of one cache."""

    def size(self, key: str) -> int | None:
        """Bytes; None where there is no such file."""

    def open(self, key: str) -> io.FileIO:
        """The file is not removed by us while it is open. Raises FileNotFoundError."""

    def again(self, key: str) -> str:
        """The command that makes a file again whose content is wrong."""

    def check_room(self, n_bytes: int) -> None:
        """Raises UserError when so many bytes cannot be in hand at once."""


class Folder:
    """Files of a cache on a disk."""

    def __init__(self, path: Path, request: Json) -> None:
        self._path, self._request = path, request

    def size(self, key: str) -> int | None:
        try:
            return (self._path / key).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, key: str) -> io.FileIO:
        return io.FileIO(self._path / key)

    def again(self, key: str) -> str:
        return f"rm {shlex.quote(str(self._path / key))} && {command_of(self._request, self._path.parent)}"

    def check_room(self, n_bytes: int) -> None:
        """They are there."""


class Fetched:
    """Chunk files of a cache in a store. One that is not on this machine is fetched as a whole and checked against the
    manifest before it takes its name."""

    def __init__(self, place: Remote, attributes: Json) -> None:
        self._place, self._request = place, attributes["request"]
        self._store = Store(place, "later")
        self._sizes = Store(place).sizes()
        self._folder = local_copies.folder_of(place, self._store.server, attributes["checksum"])
        self._expected = {
            spec_of(entry).file(Path(), name, chunk).as_posix(): (file_bytes(entry, chunk), crc)
            for name, entry in attributes["manifest"]["arrays"].items()
            for chunk, crc in enumerate(entry["crc32c"])
        }

    def size(self, key: str) -> int | None:
        return self._sizes.get(key)

    def open(self, key: str) -> io.FileIO:
        """Raises UserError for an object that is not what was written."""
        n_bytes, _ = self._expected[key]
        return local_copies.opened(self._place.local, self._folder / key, n_bytes, lambda: self._fetch(key))

    def again(self, key: str) -> str:
        """What differs is the copy on this machine: what is fetched has been checked."""
        return f"rm {shlex.quote(str(self._folder / key))} (it is fetched again)"

    def check_room(self, n_bytes: int) -> None:
        bound = self._place.local.n_bytes
        if n_bytes > bound:
            sizes = f"{gb(n_bytes)} of {self._place} are in hand at once, cache.local_gb keeps {gb(bound)}"
            fix = f"use cache.local_gb={-(-n_bytes // 10**7) / 100:g} or more, or a smaller cache.shards_ahead"
            raise UserError(f"{sizes}; {fix}")

    def _fetch(self, key: str) -> bytes:
        n_bytes, crc = self._expected[key]
        data = self._store.get(key)
        if what := wrong(data, n_bytes, crc):
            raise UserError(f"{self._place / key} {what}; make it again: {repair(self._place, self._request)}")
        return data


def files_of(place: Place, attributes: Json) -> Files:
    return Fetched(place, attributes) if isinstance(place, Remote) else Folder(place, attributes["request"])


def wrong(data: bytes, n_bytes: int, crc: int) -> str | None:
    """What is wrong with the content of a chunk file; None for nothing."""
    if len(data) != n_bytes:
        kind = "truncated" if len(data) < n_bytes else "too long"
        return f"is {kind} ({len(data):,} bytes, not {n_bytes:,})"
    if google_crc32c.value(data[:-CRC_BYTES]) != crc:
        return "does not hold what was written (wrong checksum)"
    if int.from_bytes(data[-CRC_BYTES:], "little") != crc:
        return "ends with a checksum that is not its own"
    return None


def repair(place: Remote, request: Json) -> str:
    """The commands by which a cache in a store becomes whole again."""
    parent = shlex.quote(str(place.parent))
    anew = f"clt cache rm {place.name} --cache-dir {parent} --force && {command_of(request, place.parent)}"
    return f"clt cache copy COPY {parent} --verify (COPY: a whole one elsewhere), or without a copy: {anew}"
