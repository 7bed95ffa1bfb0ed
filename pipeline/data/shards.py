"""Shard files while they are written: made at full size, filled through memory maps, synced, sealed with a checksum."""

import os
import resource
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.data.codecs import compress, decompress
from pipeline.data.layout import CRC_BYTES, PIECE_BYTES, Spec, checksum_of, little
from pipeline.data.options import Codec
from pipeline.files import sync


def allocate(file: Path, n_bytes: int) -> None:
    """Make a file of zeros that has its place on the disk."""
    file.unlink(missing_ok=True)  # a reader may hold a map of the damaged one
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        if sys.platform == "darwin":  # has no posix_fallocate
            for start in range(0, n_bytes, PIECE_BYTES):
                stream.write(bytes(min(PIECE_BYTES, n_bytes - start)))
        else:
            os.posix_fallocate(stream.fileno(), 0, n_bytes)


class Maps:
    """Writable memory maps of shard files, as many as the process may have open files for."""

    def __init__(self) -> None:
        self._limit = max(16, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self._open: OrderedDict[Path, np.memmap[Any, np.dtype[Any]]] = OrderedDict()
        self._dirty: set[Path] = set()

    def get(self, file: Path, spec: Spec) -> NDArray[Any]:
        """The rows of a shard, to be written to."""
        self._dirty.add(file)
        if file in self._open:
            self._open.move_to_end(file)
        else:
            if len(self._open) >= self._limit:
                self._open.popitem(last=False)
            self._open[file] = np.memmap(file, little(spec.dtype), "r+", shape=spec.chunk_shape)
        return self._open[file]

    def sync(self) -> None:
        """Wait until everything that was written is on disk."""
        if sys.platform != "linux":  # there, fsync writes what was changed through a map as well
            for file in self._dirty & self._open.keys():
                self._open[file].flush()
        sync(self._dirty)
        self._dirty.clear()

    def close(self) -> None:
        self._open.clear()


def write_shard(spec: Spec, file: Path, rows: NDArray[Any]) -> int:
    """A whole shard, compressed by its codec and sealed, from its rows (of the shape of a chunk). -> its checksum. It
    is there as a whole or not at all."""
    values = np.ascontiguousarray(rows, little(spec.dtype))
    if spec.compressor is not None:
        values = np.frombuffer(compress(Codec(spec.compressor), values), np.uint8)
    values = values.reshape(-1).view(np.uint8)
    crc, data = int(google_crc32c.value(values)), values.data
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".aside")
    with aside.open("wb", buffering=0) as stream:
        written = 0
        while written < len(data):
            written += stream.write(data[written:])
        stream.write(crc.to_bytes(CRC_BYTES, "little"))
        os.fsync(stream.fileno())
    aside.replace(file)
    return crc


def read_shard(spec: Spec, file: Path) -> NDArray[Any]:
    """The rows of a shard that is there as a whole, by map or decompressed; its checksum is not looked at."""
    if spec.compressor is None:
        return np.memmap(file, little(spec.dtype), "r", shape=spec.chunk_shape)
    rows = np.empty(spec.chunk_shape, little(spec.dtype))
    decompress(Codec(spec.compressor), file.read_bytes()[:-CRC_BYTES], rows)
    return rows


def seal(spec: Spec, file: Path) -> int:
    """Give a shard file its checksum, if it has not got it yet; one that was written by `write_shard` has. -> it"""
    if spec.compressor is not None:
        return checksum_of(file, file.stat().st_size - CRC_BYTES)
    crc = checksum_of(file, spec.chunk_bytes)
    suffix = crc.to_bytes(CRC_BYTES, "little")
    with file.open("r+b", buffering=0) as stream:
        stream.seek(spec.chunk_bytes)
        if stream.read(CRC_BYTES) != suffix:
            stream.seek(spec.chunk_bytes)
            stream.write(suffix)
    return crc
