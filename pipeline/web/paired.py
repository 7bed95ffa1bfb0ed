"""Differences between two runs with intervals, drawn over contexts that both were measured on."""

from dataclasses import dataclass

from pipeline.web.columns import Column, Interval
from pipeline.web.runs import Run

DRAWN: dict[str, tuple[str, str]] = {}
"""Key of a column -> the sums for each context that it is a ratio of."""


@dataclass(frozen=True)
class Difference:
    """The run's number minus the baseline's."""

    value: float
    interval: Interval

    @property
    def counts(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval[0] > 0 or self.interval[1] < 0


def difference(run: Run, baseline: Run, column: Column, resamples: int) -> Difference | str:
    """Or why there is none, in a few words."""
    return "not measured"
