"""What an unfinished extraction has done: `<cache>/.journal/`.

    lock, lock-I-of-N, setup
                     held (flock) by those at work, with their process ids (`data/parts.py`)
    state.json       what is being made: request, identity of weights and tokens, shapes of the arrays. Written before
                     anything else.
    blocks-N         blocks of contexts whose rows are on disk, the smallest of them N: their numbers (int64), then
                     their sums (float64), then a crc32c. Written aside and renamed, so it is whole or not there. Parts
                     note blocks of their own, so their files have names of their own.
    spill/           rows that wait for the end of the extraction, where that is how they are written (`data/spill.py`)

Rows are scattered over all shards, so no shard is complete before nearly the last context; what is complete is a block
of contexts. Blocks are numbered by what is extracted, not by who extracts it, and their sums are added up in the order
of the numbers: stopping, resuming and the number of processes change no bit of the result.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.data.layout import CRC_BYTES, JOURNAL, Json
from pipeline.data.parts import Locks, Part
from pipeline.errors import UserError
from pipeline.files import write_aside

logger = logging.getLogger(__name__)

SPILL = "spill"


class _Place(NamedTuple):
    file: Path
    row: int
    n_rows: int


class Journal:
    """Opens the journal of the cache at `path`, making the directories, and holds its locks until `close`: those of a
    part, or of everything (None).

    Raises UserError when another extraction of the same cache, or of the same part, is at work.
    """

    def __init__(self, path: Path, part: Part | None = None) -> None:
        self.directory = path / JOURNAL
        self.locks = Locks(self.directory, path, part)
        self._places: dict[int, _Place] = {}
        self._shape: tuple[int, ...] = ()

    def state(self) -> Json | None:
        """What is being made; None when nothing has been started."""
        return read_state(self.directory.parent)

    def start(self, state: Json) -> None:
        """Forget what was done before, and note what is to be made now."""
        for file in self.directory.glob("blocks-*"):
            file.unlink()
        shutil.rmtree(self.directory / SPILL, ignore_errors=True)
        write_aside(self.directory / "state.json", json.dumps(state, indent=1).encode())

    def load(self, sums_shape: tuple[int, ...]) -> set[int]:
        """The blocks that are done. Sums have this shape. A damaged file is named and dropped: its blocks are not."""
        self._shape = sums_shape
        self._places = {}
        for file in sorted(self.directory.glob("blocks-*")):
            if file.suffix == ".aside":
                continue  # torn, or just being written by another part
            if (numbers := self._read_numbers(file)) is None:
                logger.warning("%s is damaged: its blocks are extracted again", file)
                file.unlink(missing_ok=True)  # another part may have found it too
            else:
                self._note(file, numbers)
        return set(self._places)

    def append(self, numbers: list[int], sums: NDArray[np.float64]) -> None:
        """Blocks whose rows are on disk. sums [n, *shape]"""
        assert sums.shape == (len(numbers), *self._shape)
        payload = np.array(numbers, "<i8").tobytes() + np.ascontiguousarray(sums, "<f8").tobytes()
        file = self.directory / f"blocks-{min(numbers)}"
        write_aside(file, payload + _crc(payload))
        self._note(file, numbers)

    def total(self, numbers: Iterable[int]) -> NDArray[np.float64]:
        """The sums of these blocks, added in the order given."""
        total = np.zeros(self._shape)
        open_files: dict[Path, NDArray[np.float64]] = {}
        for number in numbers:
            file, row, n = self._places[number]
            if file not in open_files:
                open_files[file] = np.memmap(file, "<f8", "r", offset=8 * n, shape=(n, *self._shape))
            total += open_files[file][row]
        return total

    def remove(self) -> None:
        """The cache is finished: forget everything. The lock is held until `close`."""
        shutil.rmtree(self.directory, ignore_errors=True)  # another process may just be trying for the lock

    def close(self) -> None:
        self.locks.close()

    def _note(self, file: Path, numbers: list[int]) -> None:
        self._places |= {number: _Place(file, row, len(numbers)) for row, number in enumerate(numbers)}

    def _read_numbers(self, file: Path) -> list[int] | None:
        try:
            data = file.read_bytes()
        except FileNotFoundError:  # another part has just finished the cache
            return []
        payload = data[:-CRC_BYTES]
        n, rest = divmod(len(payload), 8 * (1 + int(np.prod(self._shape))))
        if rest or not n or data[-CRC_BYTES:] != _crc(payload):
            return None
        return [int(number) for number in np.frombuffer(payload, "<i8", n)]


def read_state(path: Path) -> Json | None:
    """What the unfinished cache at `path` is to be; None when there is none."""
    file = path / JOURNAL / "state.json"
    try:
        state: Json = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged; remove {path} and run the same command again") from error
    return state


def tidy(path: Path) -> None:
    """Remove the journal of a finished cache, left by a process that ended just after finishing it."""
    if (path / JOURNAL).exists():
        with contextlib.suppress(UserError, OSError):  # still at work, or not ours to write: no harm in leaving it
            journal = Journal(path)
            journal.remove()
            journal.close()


def _crc(payload: bytes) -> bytes:
    return int(google_crc32c.value(payload)).to_bytes(CRC_BYTES, "little")
