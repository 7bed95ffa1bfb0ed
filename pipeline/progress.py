"""How far a long job has come: a bar on a terminal, plain lines elsewhere.

    with Progress(n_tokens, unit="tok", desc="extract") as progress:
        for batch in batches:
            progress.update(len(batch), loss=loss)

Without a terminal (a log file, a job queue) a line is logged at most every 10 seconds, and one at the end:

    extract: 120,000 of 400,000 tok (30 %), 12,300 tok/s, 0:22 left, loss 1.234
    extract: 400,000 tok in 0:33, 12,300 tok/s, loss 1.001
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0

bars = True
"""False: plain lines on a terminal too, on which other processes write as well."""


class Progress:
    """Shows done, total, rate, time left and the latest fields.

    total: units of the whole job, None where nobody knows; initial: units that were done before it was resumed, which
    count as done but not towards the rate. Fields are text, or numbers shown to four digits.
    """

    def __init__(
        self,
        total: int | None,
        unit: str = "it",
        desc: str = "",
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.desc, self.initial = total, unit, desc, initial
        self.done = initial
        self._clock = clock
        self._fields: dict[str, str] = {}
        self._bar: Any = None
        self._stack = contextlib.ExitStack()
        self._start = self._last_line = clock()

    def __enter__(self) -> Self:
        self._start = self._last_line = self._clock()
        if bars and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._stack.enter_context(logging_redirect_tqdm())  # log lines appear above the bar, not inside it
            self._bar = self._stack.enter_context(
                tqdm(total=self.total, unit=self.unit, desc=self.desc, initial=self.initial, unit_scale=True)
            )
        return self

    def update(self, n: int, **fields: str | float) -> None:
        """n more units are done; the fields replace those of the same name."""
        self.done += n
        self._fields |= {name: v if isinstance(v, str) else f"{v:.4g}" for name, v in fields.items()}
        if self._bar is not None:
            if fields:
                self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update(n)
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            logger.info(self._line())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is None:
            is_short = self.total is not None and self.done < self.total
            logger.info(self._line() if error is not None or is_short else self._last())
        self._stack.close()
        self._bar = None

    def _line(self) -> str:
        if self.total is None:
            return self._prefix() + ", ".join([f"{self.done:,} {self.unit}", *self._rate(), *self._shown_fields()])
        parts = [f"{self.done:,} of {self.total:,} {self.unit} ({self._percent()} %)", *self._rate()]
        if self._per_second() > 0:
            parts.append(f"{clock_time((self.total - self.done) / self._per_second())} left")
        return self._prefix() + ", ".join(parts + self._shown_fields())

    def _last(self) -> str:
        parts = [f"{self.done:,} {self.unit} in {clock_time(self._clock() - self._start)}", *self._rate()]
        return self._prefix() + ", ".join(parts + self._shown_fields())

    def _prefix(self) -> str:
        return f"{self.desc}: " if self.desc else ""

    def _percent(self) -> int:
        return 100 * self.done // self.total if self.total else 100

    def _per_second(self) -> float:
        seconds = self._clock() - self._start
        return (self.done - self.initial) / seconds if seconds > 0 else 0.0

    def _rate(self) -> list[str]:
        rate = self._per_second()
        return [f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s"] if rate > 0 else []

    def _shown_fields(self) -> list[str]:
        return [f"{name} {value}" for name, value in self._fields.items()]


def clock_time(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
