"""Differences between two runs with intervals, drawn over the contexts that both were measured on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.web.columns import Column, Interval
from pipeline.web.runs import Run, lookup

if TYPE_CHECKING:
    from pipeline.interp.contexts import Contexts

FILE = "contexts.npz"


@dataclass(frozen=True)
class Difference:
    """The run's number minus the baseline's."""

    value: float
    interval: Interval

    @property
    def counts(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval[0] > 0 or self.interval[1] < 0


@dataclass
class Pairs:
    """Differences of runs under fixed thresholds; each pair of runs is drawn once."""

    resamples: int
    drawn: dict[tuple[str, str], dict[str, Any] | str] = field(default_factory=dict)

    def differences(self, run: Run, baseline: Run, columns: Sequence[Column]) -> dict[str, Difference] | str:
        """Key of a column -> run minus baseline, of those that both can be compared in; or why there are none."""
        found = self._between(run, baseline)
        if isinstance(found, str):
            return found
        able = {
            column.key: difference
            for column in columns
            if column.compares(run) and column.compares(baseline)
            if (difference := _difference(found, column.path)) is not None
        }
        return able or "the two have no number that can be compared"

    def _between(self, run: Run, baseline: Run) -> dict[str, Any] | str:
        key = (run.name, baseline.name)
        if key not in self.drawn:
            self.drawn[key] = _draw(run, baseline, self.resamples)
        return self.drawn[key]


def _draw(run: Run, baseline: Run, resamples: int) -> dict[str, Any] | str:
    if not resamples:
        return "no intervals were asked for (report.resamples=0)"
    for side in (baseline, run):
        if not _file(side).is_file():
            return f"{side.name} has no {FILE}; run clt eval"
    # Not above: it needs torch, which takes longer to import than the page of one run to make.
    from pipeline.interp import contexts

    first, second = (_compared(contexts.read(_file(side))) for side in (baseline, run))
    if sorted(first.context_hash.tolist()) != sorted(second.context_hash.tolist()):
        return f"measured on other contexts than {baseline.name}"
    try:
        return contexts.paired(first, second, resamples=resamples)
    except UserError as error:
        return str(error)


def _file(run: Run) -> Path:
    return run.directory / "eval" / FILE


def _compared(read: "Contexts") -> "Contexts":
    """Without what the page does not compare and what takes most of the time: rule of training, single positions."""
    sums = {
        rule: {name: values[:, :1] if name.endswith("_position") else values for name, values in own.items()}
        for rule, own in read.sums.items()
        if rule != "exact"
    }
    return read._replace(sums=sums)


def _difference(found: dict[str, Any], path: str) -> Difference | None:
    value, bounds = lookup(found["difference"], path), lookup(found["ci95"], path)
    if not isinstance(value, int | float) or not isinstance(bounds, list) or None in bounds:
        return None
    return Difference(float(value), (bounds[0], bounds[1]))
