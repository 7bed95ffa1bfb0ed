"""The CSV beside the page: a line for each run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline import files
from pipeline.web.columns import COLUMNS, Interval
from pipeline.web.groups import MISSING, setting
from pipeline.web.runs import Run, lookup


def csv_text(runs: Sequence[Run], keys: Sequence[str]) -> str:
    """Every headline number with its bounds, under the thresholds and under the rule of training; cost; the numbers on
    other data sets, as DATASET:KEY; what differs.

    Empty: not measured. Numbers are written so that they read back as they were.
    """
    datasets = sorted({name for run in runs for name in run.others})
    rows = [_row(run, keys, datasets) for run in runs]
    return files.csv_text(list(rows[0]), rows)


def _row(run: Run, keys: Sequence[str], datasets: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": run.name, "directory": str(run.directory), "state": run.state, "arch": run.arch,
        "activation": run.activation, "seed": run.seed, "replacement_basis": lookup(run.metrics, "replacement.basis"),
        "split": lookup(run.metrics, "split"), "n_tokens": lookup(run.metrics, "n_tokens"),
    }  # fmt: skip
    for column in COLUMNS:
        row |= _bounded(column.key, column.value(run), column.interval(run))
        row |= _bounded(f"{column.key}_exact", column.value_exact(run), column.interval_exact(run))
    row |= {
        "parameters": run.parameters, "tokens": run.tokens(), "seconds": run.seconds(),
        "tokens_per_second": run.tokens_per_second(), "memory_mb": run.memory_mb(),
    }  # fmt: skip
    for dataset in datasets:
        other = replace(run, metrics=run.others.get(dataset))
        for column in (column for column in COLUMNS if column.shown):
            row |= _bounded(f"{dataset}:{column.key}", column.value(other), column.interval(other))
    return row | {f"setting:{key}": None if setting(run, key) is MISSING else _plain(setting(run, key)) for key in keys}


def _bounded(key: str, value: float | None, bounds: Interval | None) -> dict[str, float | None]:
    low, high = bounds or (None, None)
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)
