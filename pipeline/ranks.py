"""Several processes of one run: which of them speaks, and where the others write.

torchrun says in the environment which of how many processes this is (RANK, WORLD_SIZE, LOCAL_RANK). Rank 0 speaks on
the terminal, as a process alone does. What the others say is kept until the run's directory is known, and lies in
runs/NAME/ranks/rank_R.log then; only failures of theirs reach the terminal.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

FOLDER = "ranks"

PATIENCE_S = 10.0
"""How long a failed rank waits for rank 0 to fail of the same, and for the launcher to end the others then, before it
says so itself: as far as ranks may be apart while they start."""

IN_STEP_S = 2.0
"""The same once a run has begun, and its ranks do everything together."""


def world() -> int:
    """Ranks that were started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this is; 0 without a launcher."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def on_this_machine() -> int:
    """Ranks that share this machine's memory; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


class RankLog(logging.Handler):
    """Of a rank other than the first: everything to its file, failures to the terminal as well, with its number."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.name, self._rank = "clt", rank
        self._kept: list[str] = []
        self._file: Path | None = None
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(self.format(record) + "\n")
        if self._file is not None:
            self._write(self._file)
        if record.levelno >= logging.ERROR:
            text = f"{record.levelname.lower()}: {logging.Formatter().format(record)}"
            sys.stderr.write("".join(f"rank {self._rank}: {line}\n" for line in text.split("\n")))
            sys.stderr.flush()

    @property
    def has_begun(self) -> bool:
        return self._file is not None

    def write_into(self, directory: Path) -> None:
        """Write what was said so far and all that comes into the directory of the run."""
        self._file = directory / FOLDER / f"rank_{self._rank}.log"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._write(self._file)

    def _write(self, file: Path) -> None:
        # Opened for each line, so that nothing is lost when the process is killed, and no file outlives its directory.
        with file.open("a") as log:
            log.writelines(self._kept)
        self._kept.clear()


def _logs() -> list[RankLog]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, RankLog)]


def log_into(directory: Path) -> None:
    """From here on the other ranks' messages lie in the run's directory. The directory is there."""
    for handler in _logs():
        handler.write_into(directory)


def await_launcher() -> None:
    """Give a rank that has failed of its own the time to say so, and the launcher the time to end this one."""
    begun = number() == 0 or any(handler.has_begun for handler in _logs())
    if world() > 1:
        time.sleep(IN_STEP_S if begun else PATIENCE_S)


def tell_launcher(cause: str) -> None:
    """Give torchrun the cause, for its summary (the file that torch.distributed.elastic reads)."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": cause, "extraInfo": {"py_callstack": cause, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": told}))
