"""Several processes that fill one cache: which part is whose, and the locks that keep them apart.

    lock            whole extraction: held alone. Parts at work share it, and the one that finishes the cache takes it
                    alone; it fails while anybody is at work.
    lock-I-of-N     held by part I of N while it is at work
    setup           held by a part for the moment in which it makes files or finds them made

All are held with flock, so that a process that dies lets go of them.
"""

import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.files import holder, holds, take_lock

logger = logging.getLogger(__name__)

FINISHING = "finishing"


class Part(NamedTuple):
    """One of `of` parts of the blocks of a cache, counted from 0."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def label(self) -> str:
        """For names of files."""
        return f"{self.number}-of-{self.of}"


def part_of(text: str | None, environment: Mapping[str, str]) -> Part | None:
    """The part that this process makes: the option, or the rank under torchrun. None: all of it.

    Raises UserError for an option that names no part, and for one that contradicts torchrun."""
    part = None if text is None else _parse(text)
    rank = _rank(environment)
    if part is not None and rank is not None and part != rank:
        fix = "leave extract.part out, or start the parts one by one without torchrun"
        raise UserError(f"extract.part={part}, but torchrun made this process {rank}; {fix}")
    return part or rank


@contextmanager
def one_voice(environment: Mapping[str, str]) -> Iterator[None]:
    """Under torchrun the first process speaks; the others say only what is wrong."""
    ours, rank = logging.getLogger("pipeline"), _rank(environment)
    level = ours.level
    if rank is not None and rank.number:
        ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(level)


def speak() -> None:
    """The process that finishes a cache says so, whichever it is."""
    logging.getLogger("pipeline").setLevel(logging.INFO)


def _parse(text: str) -> Part:
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip(), re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"extract.part={text} is no part; write I/N with I from 0 to N-1, such as 0/16 to 15/16")
    return Part(int(match[1]), int(match[2]))


def _rank(environment: Mapping[str, str]) -> Part | None:
    if "RANK" not in environment or int(environment.get("WORLD_SIZE", 1)) < 2:
        return None
    return Part(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


class Locks:
    """The locks of a whole extraction (part None) or of a part, in `directory`, from the start to `close`.

    Raises UserError when another process is at work that this one would disturb; says who. A part waits while another
    one sets up or finishes the cache.
    """

    def __init__(self, directory: Path, path: Path, part: Part | None) -> None:
        self._directory, self._part = directory, part
        self._held: list[int] = []
        self._setup: int | None = None
        try:
            if part is None:
                self._main = self._hold(self._alone(path))
            else:
                self._enter(path, part)
        except BaseException:
            self.close()
            raise

    def set_up(self) -> None:
        """The files are there: let the next part come."""
        if self._setup is not None:
            self._held.remove(self._setup)
            os.close(self._setup)
            self._setup = None

    def step_back(self) -> None:
        """A part's work is noted: it no longer keeps another from finishing the cache."""
        if self._part is not None:
            fcntl.flock(self._main, fcntl.LOCK_UN)

    def claim(self) -> bool:
        """After `step_back`: whether this process finishes the cache. Of those that ask when nobody is at work any
        more, one is told so: the last to step back finds the lock free, or somebody who has claimed it."""
        if self._part is None:
            return True
        # Said before it is true: a part that starts at this moment waits then, and is not refused.
        os.ftruncate(self._main, 0)
        os.pwrite(self._main, f"{os.getpid()}, part {self._part}, {FINISHING}".encode(), 0)
        try:
            fcntl.flock(self._main, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return holds(self._main, self._directory / "lock")

    def others(self) -> list[str]:
        """The parts that are at work in other processes."""
        found = []
        for file in sorted(self._directory.glob("lock-*-of-*")):
            number, count = file.name.removeprefix("lock-").split("-of-")
            if Part(int(number), int(count)) != self._part and holder(self._directory, file.name) is not None:
                found.append(f"{number}/{count}")
        return found

    def close(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def _hold(self, lock: int) -> int:
        self._held.append(lock)
        return lock

    def _alone(self, path: Path) -> int:
        try:
            return take_lock(self._directory, path)
        except UserError:
            if others := self.others():
                names = f"part {others[0]}" if len(others) == 1 else f"parts {', '.join(others)}"
                raise UserError(f"{names} of {path} are being made by other processes; wait for them to end") from None
            raise

    def _enter(self, path: Path, part: Part) -> None:
        while True:
            self._setup = self._hold(take_lock(self._directory, path, "setup", wait="another part makes the files"))
            self._main = self._hold(self._shared(path))
            if holds(self._setup, self._directory / "setup"):
                break
            self.close()  # whoever finished the cache meanwhile has removed the directory
        own = f"lock-{part.label}"
        self._hold(take_lock(self._directory, f"part {part} of {path}", own))
        different = [other for other in self.others() if not other.endswith(f"/{part.of}")]
        if different:
            fix = f"wait for it to end, or use extract.part=I/{different[0].split('/')[1]}"
            raise UserError(f"part {different[0]} of {path} is being made, which does not go with {part}; {fix}")

    def _shared(self, path: Path) -> int:
        try:
            return take_lock(self._directory, path, shared=True)
        except UserError:
            with contextlib.suppress(FileNotFoundError):
                finished = (path / "zarr.json").exists()  # somebody removes what is left of the journal
                if not finished and FINISHING not in (self._directory / "lock").read_text():
                    raise
            return take_lock(self._directory, path, shared=True, wait="another part finishes the cache")
