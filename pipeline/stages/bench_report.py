"""What benchmarks have in common: quartiles of rounds, and how a report is handed over."""

import logging
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.files import write_report

logger = logging.getLogger(__name__)


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Of at least two."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "q1": low, "q3": high}


def ratios(above: Iterable[float], below: Iterable[float]) -> dict[str, float]:
    """Quartiles of the rounds' own ratios."""
    return quartiles([a / b for a, b in zip(above, below, strict=True)])


def scaled(values: Mapping[str, float], factor: float) -> dict[str, float]:
    """In another unit."""
    return {name: factor * value for name, value in values.items()}


def less_one(values: Mapping[str, float]) -> dict[str, float]:
    """Of ratios, what is beyond equal."""
    return {name: value - 1 for name, value in values.items()}


def hand_over(report: dict[str, Any], to: str | None, name: str, next_step: str) -> Path:
    """Write bench/NAME.json, or the file that is asked for, and say so. next_step: what to do with it, in which {to} is
    the file."""
    file = Path(to or f"bench/{name}.json")
    write_report(file, report)
    logger.info("%s\nnext: %s", file, next_step.format(to=file))
    return file
