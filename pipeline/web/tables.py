"""The tables of the page, as plain rows for its template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.web.columns import COLUMNS, Column, interval_at, shown, shown_interval
from pipeline.web.groups import MISSING, Group, described, setting, short_names
from pipeline.web.names import listed
from pipeline.web.paired import Difference, Pairs
from pipeline.web.runs import Run, lookup

COUNTS = {"world.purity.pure"}
"""Whole numbers among the other ones."""


@dataclass(frozen=True)
class Cell:
    """A number under the thresholds, with the one under the rule of training below it. value None: not measured."""

    value: float | None
    shown: str
    interval: str = ""
    exact: str = ""
    exact_interval: str = ""
    best: bool = False
    alone: bool = False
    """Not comparable with the others."""

    more: bool = False
    """Behind "all columns"."""

    kind: str = ""
    """Of a difference: better, worse, or neither."""


@dataclass(frozen=True)
class Row:
    name: str
    cells: list[Cell]
    note: str = ""
    state: str = ""
    n: int = 0


def of_runs(runs: Sequence[Run], keys: Sequence[str]) -> list[Row]:
    """A row for each run, those without an evaluation with what they wait for."""
    best = {column.key: _best([(run, column.value(run)) for run in runs], column) for column in COLUMNS}
    rows = []
    for run in runs:
        cells = [_cell(run, column, best[column.key]) for column in COLUMNS]
        note = described(run, keys) if run.name.rsplit("/", 1)[-1].isdigit() else ""
        rows.append(Row(run.name, cells, note if run.metrics is not None else run.state))
    return rows


def of_seeds(groups: Sequence[Group]) -> list[Row]:
    """Mean and standard deviation over seeds; [] where every recipe has one."""
    if all(len(group.runs) == 1 for group in groups):
        return []
    best = {column.key: _best([(at.first, at.mean(column)) for at in groups], column) for column in COLUMNS}
    rows = []
    for group in groups:
        cells = []
        for column in COLUMNS:
            mean, spread = group.mean(column), group.spread(column)
            said = "" if spread is None else f"± {shown(spread, mean)}"
            own = [value for run in group.runs if (value := column.value_exact(run)) is not None]
            exact = shown(sum(own) / len(own)) if own else ""
            cells.append(
                Cell(
                    mean, shown(mean), said, exact, "", _is(mean, best[column.key], group.first, column),
                    mean is not None and not column.compares(group.first), not column.shown,
                )
            )  # fmt: skip
        rows.append(Row(group.label, cells, n=len(group.runs)))
    return rows


def pairs(runs: Sequence[Run], baseline: Run, drawn: Pairs) -> tuple[list[Column], list[Row], list[str]]:
    """Each run minus the baseline, in the columns that some run has a difference in; and why others have none."""
    shown_columns = [column for column in COLUMNS if column.shown]
    found = {run.name: drawn.differences(run, baseline, shown_columns) for run in runs if run is not baseline}
    columns = [
        at for at in shown_columns if any(at.key in each for each in found.values() if not isinstance(each, str))
    ]
    without: dict[str, list[str]] = {}
    rows = []
    for name, each in found.items():
        if isinstance(each, str):
            without.setdefault(each, []).append(name)
        else:
            rows.append(Row(name, [_difference(each.get(column.key), column) for column in columns]))
    return columns, rows, [f"{listed(names)}: {why}" for why, names in without.items()]


def settings(groups: Sequence[Group], keys: Sequence[str]) -> dict[str, Any]:
    """The keys that differ, a row for each group; what all share."""
    runs = [run for group in groups for run in group.runs]
    rows = []
    for group in groups:
        cells = []
        for key in keys:
            values = dict.fromkeys(_text(setting(run, key)) for run in group.runs)
            cells.append(", ".join(values))
        rows.append(Row(group.label, cells))  # type: ignore[arg-type]
    shared = [(key, _text(value)) for key, value in runs[0].settings.items() if key not in keys and key != "name"]
    return {"differing": list(keys), "brief": short_names(keys), "rows": rows, "shared": shared}


def of_other_text(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A table for each other data set that some run was measured on, of the columns in which one has a number."""
    tables = []
    for dataset in sorted({name for run in runs for name in run.others}):
        measured = [replace(run, metrics=run.others[dataset]) for run in runs if dataset in run.others]
        columns = [at for at in COLUMNS if at.shown and any(at.value(run) is not None for run in measured)]
        best = {column.key: _best([(run, column.value(run)) for run in measured], column) for column in columns}
        rows = [Row(run.name, [_cell(run, column, best[column.key]) for column in columns]) for run in measured]
        texts = {f"{lookup(run.metrics, 'n_tokens') or 0:,} tokens, {lookup(run.metrics, 'split')}" for run in measured}
        tables.append({"title": f"{dataset}: {listed(sorted(texts), 2)}", "columns": columns, "rows": rows})
    return tables


def cost(runs: Sequence[Run]) -> dict[str, Any]:
    """Parameters, tokens, time, memory."""
    heads = [
        "parameters",
        "features a layer",
        "tokens",
        "seconds",
        "tokens a second",
        "memory, MB",
        "eval, seconds",
    ]
    rows = []
    for run in runs:
        values = [
            run.parameters,
            lookup(run.final, "arch.d_features") or run.settings.get("arch.d_features"),
            run.tokens(),
            run.seconds(),
            run.tokens_per_second(),
            run.memory_mb(),
            run.number("seconds"),
        ]
        cells = [Cell(value, _whole(value)) for value in values]
        rows.append(Row(run.name, cells, state=run.state))
    kept = [at for at in range(len(heads)) if any(row.cells[at].value is not None for row in rows)]
    for row in rows:
        row.cells[:] = [row.cells[at] for at in kept]
    return {"heads": [heads[at] for at in kept], "rows": rows}


def numbers(title: str, heads: Sequence[str], runs: Sequence[Run], paths: Sequence[str]) -> dict[str, Any] | None:
    """A table of other numbers of eval/metrics.json, with their intervals; None where no run has any."""
    rows = []
    for run in runs:
        cells = []
        for path in paths:
            value, interval = run.number(path), interval_at(run, f"ci95.{path}")
            said = _whole(value) if path in COUNTS else shown(value)
            cells.append(Cell(value, said, shown_interval(interval, value)))
        if any(cell.value is not None for cell in cells):
            rows.append(Row(run.name, cells))
    return {"title": title, "heads": list(heads), "rows": rows} if rows else None


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _cell(run: Run, column: Column, best: float | None) -> Cell:
    value, exact = column.value(run), column.value_exact(run)
    return Cell(
        value,
        _whole(value) if column.count else shown(value),
        shown_interval(column.interval(run), value),
        _whole(exact) if column.count else shown(exact),
        shown_interval(column.interval_exact(run), exact),
        _is(value, best, run, column),
        value is not None and not column.compares(run),
        not column.shown,
    )


def _difference(found: Difference | None, column: Column) -> Cell:
    """Marked where the interval leaves out zero and one way is better."""
    if found is None:
        return Cell(None, "")
    kind = "better" if found.value * column.better > 0 else "worse"
    return Cell(
        found.value,
        ("+" if found.value > 0 else "") + shown(found.value),
        shown_interval(found.interval, found.value),
        kind=kind if found.counts and column.better else "",
    )


def _best(values: Sequence[tuple[Run, float | None]], column: Column) -> float | None:
    """Of at least two that can be compared; None where neither way is better."""
    able = [value for run, value in values if value is not None and column.compares(run)]
    if len(able) < 2 or column.better == 0:
        return None
    return max(able) if column.better > 0 else min(able)


def _is(value: float | None, best: float | None, run: Run, column: Column) -> bool:
    return value is not None and value == best and column.compares(run)


def _text(value: Any) -> str:
    """As in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return "" if value is MISSING else str(value)
