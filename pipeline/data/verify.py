"""Every byte of a finished cache against what its manifest says was written."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from pipeline.data import root
from pipeline.data.layout import CRC_BYTES, PIECE_BYTES, Json, command_of, file_bytes, spec_of

Report = Callable[[int], object]
"""Told the bytes that have been dealt with since the last time."""


class Problem(NamedTuple):
    """A file that is not what was written."""

    file: Path
    array: str
    """"" for Zarr's metadata"""
    chunk: int
    what: str
    """Such as `is missing`"""

    @property
    def where(self) -> str:
        return f"chunk {self.chunk} of {self.array}" if self.array else str(self.file)


def n_files(attributes: Json) -> int:
    manifest = attributes["manifest"]
    return 1 + len(manifest["metadata"]) + sum(len(entry["crc32c"]) for entry in manifest["arrays"].values())


def problems(path: Path, attributes: Json, report: Report) -> Iterator[Problem]:
    """Every chunk of every array, Zarr's metadata and the copy of the root's, read and compared. The size of each chunk
    is reported when it is dealt with, whether it is there or not."""
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
    if (what := _copy(path)) is not None:
        yield Problem(path / root.COPY, "", 0, what)


def mend(found: list[Problem], request: Json, cache_dir: Path) -> str:
    """The command that makes these files again, and nothing else."""
    there = [shlex.quote(str(problem.file)) for problem in found if problem.file.exists()]
    command = command_of(request, cache_dir)
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
    return None if google_crc32c.value(data) == expected else "does not hold what was written (wrong checksum)"
