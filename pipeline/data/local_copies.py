"""Files of remote caches on this machine's disk: fetched as a whole, kept within a bound, the least recently used ones
first to go. Several processes share the folder.

    <local>/.lock               held for the moment in which room is made; its content: bytes that are taken
    <local>/<store>/<cache>/    files of a cache, named as in the cache; `.aside` at the end: being fetched
    <local>/.making/            caches that are extracted before they are sent (stages/extract_remote.py); not counted

A file that is in use is open with a shared lock (flock), so that no process removes it; one that is being fetched has
its full size from the beginning, so that it is counted, and is locked by whoever fetches it. The time of a file's last
change is the time of its last use.
"""

import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.data.address import Local, Remote
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
MAKING = ".making"
ASIDE = ".aside"
SLACK = 0.02
"""Share of the bound that is freed at once, so that the folder is not read for every file."""
WAIT_SECONDS = 60.0
"""How long to wait for room that other processes have in hand."""


class _Kept(NamedTuple):
    used: float
    n_bytes: int
    file: Path


def store_folder(place: Remote, server: str) -> str:
    """Name of the folder of a cache directory in a store: two that have the same address at two servers do not mix."""
    parent = str(place.parent)
    digest = hashlib.sha256(f"{parent} {server}".encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', parent)[:80]}-{digest}"


def folder_of(place: Remote, server: str, checksum: int) -> Path:
    """Where the files of a cache are kept: by store, name and content."""
    return place.local.root / store_folder(place, server) / f"{place.name}-{checksum:08x}"


def opened(local: Local, file: Path, n_bytes: int, fetch: Callable[[], bytes]) -> io.FileIO:
    """A file of n_bytes under the folder, open for reading and safe from removal until it is closed; fetched when it is
    not there. Raises UserError when no room can be made."""
    while True:
        stream = _in_use(file) or _fetched(local, file, n_bytes, fetch)
        if stream is None:
            continue
        if (size := os.fstat(stream.fileno()).st_size) == n_bytes:
            return stream
        stream.close()
        logger.warning("%s has %d bytes, not %d; it is fetched again", file, size, n_bytes)
        with _locked(local):
            file.unlink(missing_ok=True)


def kept_bytes(local: Local) -> int:
    """Size of the files in the folder, those that are being fetched included."""
    return sum(kept.n_bytes for kept in _all(local))


def adopt(local: Local, made: Path, folder: Path) -> bool:
    """Take a whole cache that was made beside the folder (in MAKING) into it, as if its files had been fetched. When it
    is larger than the bound, or all room is in use, it is removed. -> whether it was taken"""
    n_bytes = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    with _locked(local) as lock:
        if n_bytes <= local.n_bytes and not folder.exists():
            taken = _evict(local, lock, n_bytes)
            if taken + n_bytes <= local.n_bytes:
                folder.parent.mkdir(parents=True, exist_ok=True)
                made.rename(folder)
                _note(lock, taken + n_bytes)
                return True
    shutil.rmtree(made)
    return False


def _in_use(file: Path) -> io.FileIO | None:
    """None where there is no such file."""
    try:
        stream = io.FileIO(file)
    except FileNotFoundError:
        return None
    fcntl.flock(stream, fcntl.LOCK_SH)
    if os.fstat(stream.fileno()).st_nlink == 0:  # it was removed in between
        stream.close()
        return None
    with suppress(OSError):  # another user's file
        os.utime(file)
    return stream


def _fetched(local: Local, file: Path, n_bytes: int, fetch: Callable[[], bytes]) -> io.FileIO | None:
    """None when another process has fetched it meanwhile."""
    aside = file.with_name(file.name + ASIDE)
    stream = _reserved(local, file, aside, n_bytes)
    if stream is None:
        return None
    try:
        data = fetch()
        assert len(data) == n_bytes
        stream.seek(0)
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]
        with _locked(local):  # nobody makes room between the two
            aside.rename(file)
            fcntl.flock(stream, fcntl.LOCK_SH)
        stream.seek(0)
    except BaseException:
        with _locked(local) as lock:
            aside.unlink(missing_ok=True)
            _note(lock, max(0, (_noted(lock) or 0) - n_bytes))
        stream.close()
        raise
    return stream


def _reserved(local: Local, file: Path, aside: Path, n_bytes: int) -> io.FileIO | None:
    """A file of the full size that is ours to fill; None when the file has come meanwhile."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with _locked(local) as lock:
            if file.exists():
                return None
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = io.FileIO(os.open(aside, os.O_RDWR | os.O_CREAT, 0o666), "r+")
            is_ours = _is_ours(stream)  # else another process or thread fetches it
            if is_ours:
                stream.truncate(0)
                taken = _noted(lock)
                if taken is None or taken + n_bytes > local.n_bytes:
                    taken = _evict(local, lock, n_bytes)
                if taken + n_bytes <= local.n_bytes:
                    stream.truncate(n_bytes)
                    _note(lock, taken + n_bytes)
                    return stream
                aside.unlink()
            stream.close()
        if is_ours and time.monotonic() > deadline:
            bound = f"{local.n_bytes / 1e9:.3g} GB"
            raise UserError(f"{local.root}: all of {bound} is in use; raise cache.local_gb, or end another process")
        time.sleep(0.02)


def _is_ours(stream: io.FileIO) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(stream.fileno()).st_nlink > 0


@contextmanager
def _locked(local: Local) -> Iterator[int]:
    """-> an open file that holds the number of bytes that are taken"""
    local.root.mkdir(parents=True, exist_ok=True)
    lock = os.open(local.root / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _noted(lock: int) -> int | None:
    text = os.pread(lock, 32, 0).decode()
    return int(text) if text.strip().isdigit() else None


def _note(lock: int, n_bytes: int) -> None:
    os.pwrite(lock, f"{n_bytes:<32}".encode(), 0)


def _evict(local: Local, lock: int, wanted: int) -> int:
    """Make room for so many more bytes, as far as it can be had. -> bytes that are taken then"""
    kept = sorted(_all(local))
    taken = sum(file.n_bytes for file in kept)
    if taken + wanted > local.n_bytes:
        goal = local.n_bytes - wanted - int(SLACK * local.n_bytes)
        for file in kept:
            if taken <= goal:
                break
            if _removed(file.file):
                taken -= file.n_bytes
    _note(lock, taken)
    return taken


def _removed(file: Path) -> bool:
    """Whether nobody has it in hand, so that it could be removed."""
    try:
        stream = io.FileIO(file)
    except FileNotFoundError:
        return True
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        file.unlink(missing_ok=True)
    for folder in file.parents[:6]:  # those that are empty now
        try:
            folder.rmdir()
        except OSError:
            break
    return True


def _all(local: Local) -> Iterator[_Kept]:
    for place, folders, names in os.walk(local.root):
        if Path(place) == local.root:
            folders[:] = [name for name in folders if name != MAKING]
            names = []
        for name in names:
            file = Path(place, name)
            with suppress(FileNotFoundError):
                about = file.stat()
                yield _Kept(about.st_mtime, about.st_size, file)
