"""Files and directories that are on disk as a whole, or not at all: after a crash, and after a loss of power."""

import csv
import errno
import fcntl
import io
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LOCK = "lock"
"""File in a directory that the one at work on it has locked."""

MAX_RACES = 1000
"""How often in a row a directory may be gone before it is locked. Each time another process has ended its work there,
unless the system makes no directory of that name at all."""


def write_aside(file: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, even after a loss of power."""
    aside = aside_of(file)
    aside.write_bytes(data)
    sync([aside])
    aside.replace(file)
    sync([file.parent])


def aside_of(file: Path) -> Path:
    """Where `write_aside` puts a file before it takes its name."""
    return file.with_name(file.name + ".aside")


class atomic_directory:
    """Context: a directory to fill, which takes its name only when everything in it is on disk."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.aside = target.with_name(f".{target.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir(parents=True)
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            sync([*self.aside.rglob("*"), self.aside])
            if self.target.exists():
                shutil.rmtree(self.target)
            self.aside.rename(self.target)
            sync([self.target.parent])
            return
        shutil.rmtree(self.aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{self.target} could not be written ({error}); free some space and run again") from error


def save_tensors(tensors: "dict[str, Tensor]", file: Path) -> None:
    """A safetensors file with the mode that any new file has there; the library's own can be read by its owner alone.

    Tensors are contiguous and on the CPU. OSError or SafetensorError when the disk cannot hold it.
    """
    from safetensors.torch import save_file

    file.touch()  # the umask decides, or the folder's default ACL; asking for the umask means to change it
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file)
    file.chmod(mode)


def write_report(file: Path, report: Any) -> None:
    """What people read as well, as JSON; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, (json.dumps(report, indent=2) + "\n").encode())


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A header line and a line for each row; None is empty, numbers read back as they were."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sync(paths: Iterable[Path]) -> None:
    """Wait until files (or the names in directories) are on disk: many at a time, which one disk flush can serve."""
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(_sync, paths))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def remove_empty(directories: list[Path]) -> None:
    """Remove those of the directories (innermost first) that are empty; other processes may be at the same."""
    for directory in directories:
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise


def empty_held(directory: Path) -> None:
    """Remove all that is in a directory but the lock in it, which the caller holds (`take_lock`)."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def remove_held(directory: Path) -> None:
    """Remove a directory whose lock the caller holds. The lock goes last: from then on another process may take a new
    one there, and the directory is its own."""
    empty_held(directory)
    (directory / LOCK).unlink()
    remove_empty([directory])


def take_lock(directory: Path, what: object, name: str = LOCK, shared: bool = False, wait: str = "") -> int:
    """Makes the directory and locks a file in it. -> an open file that holds the lock: closing it (or dying) releases
    it. shared: with others who share it.

    Raises UserError when another process is at work on `what`; with `wait`, says that and waits for its end.
    """
    file = directory / name
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    races = 0
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileNotFoundError, FileExistsError):
            # Another process has just finished there and removed the directory, or none of that name can be made.
            races += 1
            if races == MAX_RACES:
                raise
            continue
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 64, 0).decode() or "?"
            if not wait:
                os.close(fd)
                raise UserError(f"another process ({owner}) is making {what}; wait for it to end") from error
            logger.info("waiting for process %s: %s", owner, wait)
            fcntl.flock(fd, kind)
        if holds(fd, file):
            if not shared:
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
            return fd
        os.close(fd)  # a lock on a file that has been removed meanwhile protects nothing


def holds(fd: int, file: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    except FileNotFoundError:
        return False


def holder(directory: Path, name: str = LOCK) -> str | None:
    """The process that holds the lock of `take_lock` there, alone or with others, "?" where it has not said so yet;
    None when nobody does."""
    file = directory / name
    try:  # NFS locks alone only what may be written
        fd = os.open(file, os.O_RDWR if os.access(file, os.W_OK) else os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a shared one could be had beside the parts of an extraction
    except BlockingIOError:
        return os.pread(fd, 32, 0).decode() or "?"
    else:
        return None
    finally:
        os.close(fd)
