"""Rows into random order by sequential writing only, for disks that take no scattered writes through memory maps.

    <cache>/.journal/spill/<array>/<bucket>.<writer>     records: row number (int64), then the bits of the row
    <cache>/.journal/spill/<writer>.lengths              bytes of each of its files that are safe (JSON)

1. A bucket is a run of shards that fit into memory. Rows are appended to the file of their bucket, a file for each
   process that writes, so that nobody writes into another's.
2. A file's length is recorded once its bytes are on disk, and blocks are noted after that. What lies behind the
   recorded length is cut off when its writer goes on, and never read.
3. At the end each bucket is read, sorted, and written as whole shards; then its files are removed. A bucket whose
   shards are all there is done, whoever did it.

Compressed shards are always written so, since their sizes are not known before; their rows wait here as they are. A row
that was computed twice, after a crash, is there twice with the same bits. The disk holds the rows once, and one
bucket of one array twice while it is sorted.
"""

import errno
import json
import logging
import mmap
import os
import re
import resource
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import COMPRESSED
from pipeline.data.journal import SPILL
from pipeline.data.layout import JOURNAL, STORED, Spec, little
from pipeline.data.options import Codec, Write
from pipeline.data.plan import Plan
from pipeline.data.shards import allocate, write_shard
from pipeline.errors import UserError
from pipeline.files import sync, write_aside
from pipeline.progress import Progress

logger = logging.getLogger(__name__)

BUCKET_BYTES = 256 << 20
"""Of rows, about: what sorting holds in memory."""
MAX_BUCKETS = 128
"""Of an array: so many files are open at a time. Arrays of more than 32 GB have larger buckets for that."""
READ_BYTES = 16 << 20
BUFFER_BYTES = 1 << 18
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "orangefs",
    "panfs", "smb3", "smbfs", "wekafs",
}  # fmt: skip
"""File systems on which maps of several machines do not agree, or are slow; so are all in user space (fuse)."""
REFUSALS = {errno.ENODEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM}

Checksums = dict[str, dict[int, int]]
"""array -> shard -> checksum"""


class Spill:
    """The buckets of an unfinished cache, written by this process under the name `writer`."""

    def __init__(self, plan: Plan, writer: str) -> None:
        self._plan, self._writer = plan, writer
        self._folder = plan.path / JOURNAL / SPILL
        self._limit = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()
        self._dirty: set[Path] = set()
        self._lengths: dict[str, int] = {}

    def start(self) -> None:
        """Go on after the last record: what this writer wrote later is cut off."""
        self._lengths = self._recorded().get(self._writer, {})
        for file in self._folder.rglob(f"*.{self._writer}"):
            os.truncate(file, self._lengths.get(self._name(file), 0))

    def put(self, name: str, index: NDArray[np.int64], bits: NDArray[Any], order: NDArray[np.int64]) -> None:
        """Append bits[order], the rows `index` of an array, which ascend."""
        spec, finished = self._plan.specs[name], self._plan.finished.get(name, {})
        chunk = index // spec.chunk_rows
        if finished:
            needed = ~np.isin(chunk, list(finished))
            index, order, chunk = index[needed], order[needed], chunk[needed]
        if not len(index):
            return
        bucket = chunk // _shards_of_a_bucket(spec)
        starts = np.flatnonzero(np.diff(bucket, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
            records = np.empty(stop - start, _record(spec))
            records["row"] = index[start:stop]
            records["bits"] = bits[order[start:stop]]
            self._file(name, int(bucket[start])).write(records.view(np.uint8).data)

    def sync(self) -> None:
        """Wait until everything that was put is on disk, and record it."""
        for stream in self._open.values():
            stream.flush()
        if not self._dirty:
            return
        sync([*self._dirty, *{file.parent for file in self._dirty}])
        self._lengths |= {self._name(file): file.stat().st_size for file in self._dirty}
        write_aside(self._folder / f"{self._writer}.lengths", json.dumps(self._lengths).encode())
        self._dirty.clear()

    def close(self) -> None:
        """What was not synced may be lost."""
        while self._open:
            self._open.popitem()[1].close()

    def lost(self) -> list[Path]:
        """Files that do not hold what was recorded, of buckets that have not been sorted yet."""
        needed = {f"{name}/{bucket}" for name, bucket, chunks in self._buckets() if self._unsorted(name, chunks)}
        lengths = {
            self._folder / file: length
            for recorded in self._recorded().values()
            for file, length in recorded.items()
            if file.rsplit(".", 1)[0] in needed
        }
        return [file for file, length in lengths.items() if not file.exists() or file.stat().st_size < length]

    def more_bytes(self) -> int:
        """Disk that is needed beside the shards that are missing; what is spilled already counts for it."""
        numbers = sum(8 * self._plan.specs[name].shape[0] for name in self._arrays())
        largest = max(len(chunks) * self._plan.specs[name].file_bytes for name, _, chunks in self._buckets())
        there = sum(sum(lengths.values()) for lengths in self._recorded().values())
        return numbers + largest - there

    def sort(self) -> Checksums:
        """Rows to their shards, once all of them are recorded. -> checksums of what was written now."""
        self.close()
        recorded, crcs = self._recorded(), Checksums()
        buckets = list(self._buckets())
        n_left = sum(len(self._unsorted(name, chunks)) for name, _, chunks in buckets)
        with Progress(n_left, unit="shards", desc="sort") as progress:
            for name, bucket, chunks in buckets:
                names = {f"{name}/{bucket}.{writer}": lengths for writer, lengths in recorded.items()}
                if left := self._unsorted(name, chunks):
                    files = {self._folder / file: lengths[file] for file, lengths in names.items() if file in lengths}
                    crcs.setdefault(name, {}).update(self._write_shards(name, chunks, left, files))
                    progress.update(len(left))
                for file in names:
                    (self._folder / file).unlink(missing_ok=True)
        return crcs

    def _write_shards(self, name: str, chunks: range, left: list[int], files: dict[Path, int]) -> dict[int, int]:
        """The shards `left` of a bucket, from its files and their lengths."""
        spec = self._plan.specs[name]
        n, first = spec.chunk_rows, chunks.start * spec.chunk_rows
        rows = np.zeros((len(chunks) * n, *spec.shape[1:]), little(spec.dtype))
        seen = np.zeros(len(rows), bool)
        for file, length in files.items():
            for records in _read(file, length, _record(spec)):
                rows[records["row"] - first] = records["bits"]
                seen[records["row"] - first] = True
        crcs = {}
        for chunk in left:
            start = (chunk - chunks.start) * n
            assert seen[start : start + spec.rows_in(chunk)].all(), f"{name}: rows of shard {chunk} were never spilled"
            crcs[chunk] = write_shard(spec, spec.file(self._plan.path, name, chunk), rows[start : start + n])
        sync({spec.file(self._plan.path, name, chunk).parent for chunk in left})
        return crcs

    def _arrays(self) -> list[str]:
        return [name for name in self._plan.specs if name.endswith(STORED)]

    def _buckets(self) -> Iterator[tuple[str, int, range]]:
        """(array, bucket, its shards)"""
        for name in self._arrays():
            spec = self._plan.specs[name]
            step = _shards_of_a_bucket(spec)
            for bucket, start in enumerate(range(0, spec.n_chunks, step)):
                yield name, bucket, range(start, min(start + step, spec.n_chunks))

    def _unsorted(self, name: str, chunks: range) -> list[int]:
        finished = self._plan.finished.get(name, {})
        return [chunk for chunk in chunks if chunk not in finished and not self._plan.is_whole(name, chunk)]

    def _recorded(self) -> dict[str, dict[str, int]]:
        """writer -> file -> its safe length"""
        return {file.stem: json.loads(file.read_bytes()) for file in sorted(self._folder.glob("*.lengths"))}

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder).as_posix()

    def _file(self, name: str, bucket: int) -> BinaryIO:
        file = self._folder / name / f"{bucket}.{self._writer}"
        self._dirty.add(file)
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= self._limit:
                self._open.popitem(last=False)[1].close()
            file.parent.mkdir(parents=True, exist_ok=True)
            self._open[file] = file.open("ab", buffering=BUFFER_BYTES)
        return self._open[file]


def check(wanted: Write, codec: Codec) -> None:
    """Raises UserError for a way of writing that does not go with the codec."""
    if wanted is Write.scatter and codec in COMPRESSED:
        why = f"the size of a {codec} shard is not known before all its rows are there"
        raise UserError(f"cache.write=scatter: {why}; use cache.write=spill, or auto, which takes it")


def choose(wanted: Write, path: Path, codec: Codec = Codec.raw) -> Write:
    """How to write a cache at `path`, a directory that is there. Raises OSError when nothing can be written, and
    UserError as `check` does."""
    check(wanted, codec)
    if codec in COMPRESSED:
        return Write.spill
    if wanted is not Write.auto:
        return wanted
    kind = file_system(path)
    if kind in NETWORK or kind.startswith("fuse."):
        logger.info("cache.write=auto: spill, since %s is on %s", path, kind)
        return Write.spill
    if not _takes_maps(path):
        logger.info("cache.write=auto: spill, since the disk of %s takes no writable memory maps", path)
        return Write.spill
    return Write.scatter


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of file system that holds `path`, as Linux names it; empty where nothing says so."""
    if not mounts.exists():
        return ""
    found: dict[Path, str] = {}
    for line in mounts.read_text().splitlines():
        _, mounted, kind, *_ = line.split(" ")
        folder = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), mounted))
        found[folder] = kind  # the last mount covers those before it
    place = path.resolve()
    return next((found[folder] for folder in (place, *place.parents) if folder in found), "")


def _takes_maps(path: Path) -> bool:
    """Whether a file can get its place on the disk and be written through a shared map."""
    file = path / JOURNAL / f"probe-{os.getpid()}"
    try:
        allocate(file, mmap.PAGESIZE)
        with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
            mapped[0] = 1
            mapped.flush()
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        return False
    finally:
        file.unlink(missing_ok=True)
    return True


def _record(spec: Spec) -> np.dtype[Any]:
    return np.dtype([("row", "<i8"), ("bits", little(spec.dtype), spec.shape[1:])])


def _shards_of_a_bucket(spec: Spec) -> int:
    return max(1, BUCKET_BYTES // spec.chunk_bytes, -(-spec.n_chunks // MAX_BUCKETS))


def _read(file: Path, n_bytes: int, record: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The records of a file, some at a time."""
    with file.open("rb") as stream:
        left = n_bytes // record.itemsize
        while left:
            records = np.fromfile(stream, record, min(left, max(1, READ_BYTES // record.itemsize)))
            if not len(records):
                raise OSError(errno.EIO, f"{file} ends early")
            left -= len(records)
            yield records
