"""What is said on the terminal, and by which rank."""

import logging
import sys
from typing import TextIO

from pipeline import progress, ranks
from pipeline.config.table import STAGES


def log_to_stderr(prefix: str = "") -> None:
    """Our messages from INFO, plain, each after the prefix; other packages' from WARNING. Safe to call again."""
    _log_with(_Stderr(prefix))


def log_as_rank(stage: str, prefix: str = "") -> None:
    """Speak on the terminal; of several ranks the first, where they do not all speak (`ranks.py`)."""
    rank = ranks.number()
    progress.bars = progress.bars and not rank
    if rank and not STAGES[stage].all_speak:
        _log_with(ranks.RankLog(rank))
    else:
        log_to_stderr(f"rank {rank}: " if rank else prefix)


def _log_with(handler: logging.Handler) -> None:
    root = logging.getLogger()
    for ours in [ours for ours in root.handlers if ours.name == "clt"]:
        root.removeHandler(ours)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    # transformers loads torchao where it is installed, which speaks of kernels for other machines, and torch of it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment; names the level from WARNING up."""

    def __init__(self, prefix: str) -> None:
        super().__init__(sys.stderr)
        self.name, self._prefix = "clt", prefix

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = level + super().format(record)
        return "\n".join(self._prefix + line for line in text.split("\n"))
