"""Every byte of a finished cache against what its manifest says was written."""

import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from pipeline.data import root
from pipeline.data.address import Place, Remote
from pipeline.data.chunk_files import repair, wrong
from pipeline.data.commands import command_of
from pipeline.data.layout import CRC_BYTES, PIECE_BYTES, Json, file_bytes, spec_of
from pipeline.data.remote import Store

Report = Callable[[int], object]
"""Told the bytes that have been dealt with since the last time."""


class Problem(NamedTuple):
    """A file that is not what was written."""

    file: Place
    array: str
    """"" for Zarr's metadata"""
    chunk: int
    what: str
    """Such as `is missing`"""

    @property
    def where(self) -> str:
        return f"chunk {self.chunk} of {self.array}" if self.array else str(self.file)


def n_files(path: Place, attributes: Json) -> int:
    manifest = attributes["manifest"]
    copies = int(_has_copy(path, attributes))
    return copies + len(manifest["metadata"]) + sum(len(entry["crc32c"]) for entry in manifest["arrays"].values())


def problems(path: Place, attributes: Json, report: Report) -> Iterator[Problem]:
    """Every chunk of every array, Zarr's metadata and the copy of the root's, read and compared. The size of each chunk
    is reported when it is dealt with, whether it is there or not. Of a cache in a store every object is read from
    there, several at a time, whatever copies there are on this machine."""
    if isinstance(path, Remote):
        yield from _in_store(path, attributes, report)
        return
    for name, entry in attributes["manifest"]["arrays"].items():
        spec = spec_of(entry)
        for chunk in range(spec.n_chunks):
            file = spec.file(path, name, chunk)
            what = _chunk(file, file_bytes(entry, chunk), entry["crc32c"][chunk], report)
            if what is not None:
                yield Problem(file, name, chunk, what)
    for name, expected in attributes["manifest"]["metadata"].items():
        what = _metadata(path / name, expected)
        if what is not None:
            yield Problem(path / name, "", 0, what)
    if _has_copy(path, attributes) and (what := _copy(path)) is not None:
        yield Problem(path / root.COPY, "", 0, what)


def _in_store(path: Remote, attributes: Json, report: Report) -> Iterator[Problem]:
    store = Store(path, "later")
    arrays = attributes["manifest"]["arrays"]
    chunks = [(name, chunk, n) for name, entry in arrays.items() for chunk, n in enumerate(_sizes(entry))]

    def look(where: tuple[str, int, int]) -> Problem | None:
        name, chunk, n_bytes = where
        key = spec_of(arrays[name]).file(Path(), name, chunk).as_posix()
        what = _object(store, key, lambda data: wrong(data, n_bytes, arrays[name]["crc32c"][chunk]))
        return Problem(path / key, name, chunk, what) if what is not None else None

    with ThreadPoolExecutor(max(1, min(8, (1 << 29) // max(n for *_, n in chunks)))) as threads:
        try:
            for (*_, n_bytes), problem in zip(chunks, threads.map(look, chunks), strict=True):
                report(n_bytes)
                if problem is not None:
                    yield problem
        finally:
            threads.shutdown(cancel_futures=True)
    for key, expected in attributes["manifest"]["metadata"].items():
        if (what := _object(store, key, partial(_wrong_metadata, expected=expected))) is not None:
            yield Problem(path / key, "", 0, what)


def _object(store: Store, key: str, compare: Callable[[bytes], str | None]) -> str | None:
    try:
        return compare(store.get(key))
    except FileNotFoundError:
        return "is missing"


def _sizes(entry: Json) -> list[int]:
    return [file_bytes(entry, chunk) for chunk in range(spec_of(entry).n_chunks)]


def mend(found: list[Problem], request: Json, path: Place) -> str:
    """What makes these files of the cache at `path` again, and nothing else."""
    if isinstance(path, Remote):
        return repair(path, request)
    there = [shlex.quote(str(problem.file)) for problem in found if Path(str(problem.file)).exists()]
    command = command_of(request, path.parent)
    return f"rm {' '.join(there)} && {command}" if there else command


def _chunk(file: Path, whole: int, expected: int, report: Report) -> str | None:
    """What is wrong with a chunk file, None for nothing: its size, its content, or the checksum at its end, which Zarr
    reads and we do not."""
    done = 0
    try:
        size = file.stat().st_size
        if size != whole:
            kind = "truncated" if size < whole else "too long"
            return f"is {kind} ({size:,} bytes, not {whole:,})"
        crc = 0
        with file.open("rb", buffering=0) as stream:
            while done < whole - CRC_BYTES:
                piece = stream.read(min(PIECE_BYTES, whole - CRC_BYTES - done))
                if not piece:
                    return "became shorter while it was read"
                crc = google_crc32c.extend(crc, piece)
                done += len(piece)
                report(len(piece))
            stored = int.from_bytes(stream.read(CRC_BYTES), "little")
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    finally:
        report(whole - done)
    if crc != expected:
        return "does not hold what was written (wrong checksum)"
    return None if stored == expected else "ends with a checksum that is not its own"


def _has_copy(path: Place, attributes: Json) -> bool:
    """Of zarr.json: in stores there is none, and a merged cache is soon merged again."""
    return not isinstance(path, Remote) and "parts" not in attributes


def _copy(path: Path) -> str | None:
    """Of the copy of zarr.json."""
    if not (path / root.COPY).exists():
        return "is missing"
    same = root.copied(path) == (path / root.NAME).read_bytes()
    return None if same else f"does not hold what {root.NAME} holds"


def _metadata(file: Path, expected: int) -> str | None:
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return _wrong_metadata(data, expected)


def _wrong_metadata(data: bytes, expected: int) -> str | None:
    return None if google_crc32c.value(data) == expected else "does not hold what was written (wrong checksum)"
