"""Who watches a run as it goes on: the loggers that were asked for, and its page."""

import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pipeline
from pipeline.plain import to_plain
from pipeline.stages.options import TrainConfig
from pipeline.train import loggers
from pipeline.train.run_log import Line, Watcher

logger = logging.getLogger(__name__)

PAGE = "report.html"

BUILD = """
import os, sys
from pathlib import Path
os.nice(19)
from pipeline.web import report
report.build([Path(sys.argv[1])], Path(sys.argv[2]))
"""

SECONDS_BETWEEN = 60.0
"""Pages are built that far apart at least, the first one that long after the start: a shorter run has none."""

SHARE = 0.01
"""Of the time, what pages may take at most: seconds of a processor that one took, over those until the next."""

END_SECONDS = 60.0
"""How long the end of a run waits for its last page."""


@contextmanager
def watchers(cfg: TrainConfig, directory: Path, speaks: bool = True) -> Iterator[list[Watcher]]:
    """Those of a run, which are told its end. speaks: whether this is the rank that they watch."""
    if not speaks:
        yield []
        return
    assert cfg.name is not None
    page = Page(directory) if cfg.log.report else None
    try:
        with loggers.live(cfg.log, directory, cfg.name, to_plain(cfg)) as shown:
            yield [*shown, *([page] if page else [])]
            if page:
                page.end()
    finally:
        if page:
            page.stop()


class Page:
    """runs/NAME/report.html, built anew while the run goes on: by another process, of low priority, so that no fault
    and no library of the page reaches the training. Runs in one process (`train.share_pass`) have their pages built one
    after the other, and share the time for them."""

    open: ClassVar[list["Page"]] = []

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._clock = directory, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._last, self._wait, self._works = clock(), SECONDS_BETWEEN, True
        self._spent = 0.0

    def begin(self, lines: Sequence[tuple[Line, Line]]) -> None:
        """The run begins, or goes on."""
        self._last = self._clock()
        Page.open.append(self)

    def add(self, metrics: Line, times: Line) -> None:
        """A line was written: a new page, when it is time for one and none is in the making."""
        if self._process is not None and self._process.poll() is not None:
            self._look()
        building = any(page._process is not None for page in Page.open)
        if self._works and not building and self._clock() - self._last >= self._wait:
            self._start()

    def end(self) -> None:
        """The last page, where the run was long enough to have one."""
        if self._process is not None:
            self._finish()
        if self._works and (self._spent or self._clock() - self._last >= self._wait):
            self._start()
            self._finish()

    def stop(self) -> None:
        """No more pages; one in the making is given up."""
        Page.open[:] = [page for page in Page.open if page is not self]
        self._abandon()

    def _abandon(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._last = self._clock()
        home = str(Path(pipeline.__file__).parent.parent)
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # of the process, which outlives this call
        self._before = _cpu_seconds()
        self._process = subprocess.Popen(
            [sys.executable, "-c", BUILD, str(self._directory), str(self._directory / PAGE)],
            stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, env=env,
            start_new_session=True,  # Ctrl-C is the training's
        )  # fmt: skip

    def _finish(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._abandon()
            self._give_up(f"it takes more than {END_SECONDS:g} seconds")
        else:
            self._look()

    def _look(self) -> None:
        """What became of a page."""
        assert self._process is not None
        status, self._process = self._process.returncode, None
        spent = _cpu_seconds() - self._before
        self._spent, self._wait = self._spent + spent, max(SECONDS_BETWEEN, len(Page.open) * spent / SHARE)
        with self._said as said:
            said.seek(0)
            words = said.read().decode(errors="replace").strip().splitlines()
        if status:
            self._give_up(words[-1].removeprefix("pipeline.errors.UserError: ") if words else f"status {status}")

    def _give_up(self, why: str) -> None:
        self._works = False
        logger.warning("%s is not built, and the run goes on: %s", self._directory / PAGE, why)


def _cpu_seconds() -> float:
    """Of all processes that were begun here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
