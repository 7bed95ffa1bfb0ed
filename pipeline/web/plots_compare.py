"""Runs against each other: ranked by each headline number, and error against L0. Colour is the architecture, the symbol
the activation."""

from collections.abc import Sequence

from pipeline.web import columns as headline
from pipeline.web.columns import Column, shown, shown_interval
from pipeline.web.groups import Group, described, differing
from pipeline.web.panels import BOTTOM, GREY, TOP, Figure, Panel, Trace, colour, grid, safe, wide_range
from pipeline.web.runs import Run

MEASURED = [headline.KL, headline.FVU, headline.DEAD, headline.TASKS]
SYMBOLS = {
    "topk": "circle", "batchtopk": "square", "batchtopk_across": "diamond", "jumprelu": "triangle-up",
    "relu": "triangle-down", "groupmax": "pentagon",
}  # fmt: skip


def ranking(groups: Sequence[Group]) -> Figure | None:
    """A row for each group, the best on top: seeds, their mean, intervals, and the rule of training hollow."""
    ordered = [group for group in groups if any(group.values(column) for column in MEASURED)]
    columns = [column for column in MEASURED if any(group.values(column) for group in ordered)]
    if len(ordered) < 2:
        return None
    rows = [_shortened(group.label) for group in ordered]
    panels = []
    for index, column in enumerate(columns):
        values = [value for group in ordered for value in group.values(column)]
        log = column.log and wide_range(values, ratio=3)
        y = {"categoryorder": "array", "categoryarray": rows[::-1], "type": "category", "showticklabels": index == 0}
        y |= {"range": [-0.6, len(rows) - 0.4], "ticks": "", "showgrid": True}
        traces = [trace for group, row in zip(ordered, rows, strict=True) for trace in _dots(group, row, column)]
        title = f"{column.title} ({'lower' if column.better < 0 else 'higher'} is better)"
        panels.append(Panel(title, column.unit or column.title, "", traces, x_log=log, y_extra=y))
    label = max(len(row) for row in rows)
    figure = grid(panels, len(panels), row_height=max(120, 24 * len(rows) + 20), left=min(0.24, 0.0065 * label))
    height = figure["layout"]["height"]
    below = {"orientation": "h", "x": 0, "xanchor": "left", "y": -58 / (height - TOP - BOTTOM), "yanchor": "top"}
    figure["layout"] |= {"height": height + 30, "legend": figure["layout"]["legend"] | below}
    figure["layout"]["margin"] |= {"l": 8, "b": BOTTOM + 30}
    return figure


def pareto(groups: Sequence[Group]) -> Figure | None:
    """Each headline number against L0, a point for each run."""
    runs = [run for group in groups for run in group.runs if headline.L0.value(run) is not None]
    keys = differing(runs)
    panels = []
    for column in MEASURED:
        measured = [run for run in runs if column.value(run) is not None]
        if not measured:
            continue
        x_log = wide_range([headline.L0.value(run) for run in measured], ratio=3)
        y_log = column.log and wide_range([column.value(run) for run in measured], ratio=3)
        traces = [_front(measured, column)] if column.log and len(measured) > 2 else []
        pairs = dict.fromkeys((run.arch, run.activation) for run in measured)
        for pair in pairs:
            mine = [run for run in measured if (run.arch, run.activation) == pair]
            traces += [_points(mine, runs, column, keys)]
        shown_as = Panel(
            f"{column.title} against L0", headline.L0.label, column.label, traces, x_log=x_log, y_log=y_log
        )
        panels.append(shown_as)
    return grid(panels, columns=2, row_height=290) if panels else None


def style(run: Run, runs: Sequence[Run]) -> tuple[str, str]:
    """Colour and symbol: the same for an architecture, and for an activation, all over the page."""
    archs = list(dict.fromkeys(run.arch for run in runs))
    return colour(archs.index(run.arch)), SYMBOLS.get(run.activation, "cross")


def _dots(group: Group, row: str, column: Column) -> list[Trace]:
    points = [(column.value(run), run) for run in group.runs if column.value(run) is not None]
    values = [value for value, _ in points if value is not None]
    if not values:
        return []
    alone = not column.compares(group.first)
    tone = GREY if alone else colour(0)
    note = "<br>not comparable with the others" if alone else ""
    seen = [f"<b>{safe(run.name)}</b><br>{_said(run, column)}{note}<extra></extra>" for _, run in points]
    bars = [column.interval(run) for _, run in points]
    dots: Trace = {
        "type": "scatter", "mode": "markers", "x": values, "y": [row] * len(values), "hovertemplate": seen,
        "legendgroup": "fixed thresholds, each seed", "name": "fixed thresholds, each seed", "cliponaxis": False,
        "marker": {"color": tone, "size": 9, "opacity": 0.75, "symbol": "x-thin-open" if alone else "circle"},
    }  # fmt: skip
    if any(bars):
        dots["error_x"] = _bars(values, bars, tone)
    traces = [dots]
    own = [value for run in group.runs if (value := column.value_exact(run)) is not None]
    if own:
        name = "rule of training"
        traces.append({
            "type": "scatter", "mode": "markers", "x": own, "y": [row] * len(own), "legendgroup": name, "name": name,
            "hovertemplate": f"{safe(group.label)}, {name}: %{{x:.4g}}<extra></extra>", "cliponaxis": False,
            "marker": {"color": GREY if alone else colour(1), "size": 11, "symbol": "diamond-open"},
        })  # fmt: skip
    return traces


def _points(mine: Sequence[Run], runs: Sequence[Run], column: Column, keys: Sequence[str]) -> Trace:
    """The runs of one architecture and activation."""
    tone, symbol = style(mine[0], runs)
    name = safe(f"{mine[0].arch} / {mine[0].activation}")
    values = [column.value(run) or 0.0 for run in mine]
    trace: Trace = {
        "type": "scatter", "mode": "markers", "x": [headline.L0.value(run) for run in mine], "y": values,
        "name": name, "legendgroup": name, "marker": {"color": tone, "symbol": symbol, "size": 10, "opacity": 0.85},
        "hovertemplate": [_about(run, column, keys) for run in mine],
    }  # fmt: skip
    bars = [column.interval(run) for run in mine]
    if any(bars):
        trace["error_y"] = _bars(values, bars, tone)
    return trace


def _bars(values: Sequence[float], bounds: Sequence[tuple[float, float] | None], tone: str) -> dict[str, object]:
    pairs = list(zip(values, bounds, strict=True))
    return {
        "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": tone,
        "array": [None if at is None else max(0.0, at[1] - value) for value, at in pairs],
        "arrayminus": [None if at is None else max(0.0, value - at[0]) for value, at in pairs],
    }  # fmt: skip


def _front(runs: Sequence[Run], column: Column) -> Trace:
    """Runs that no other is better than at an L0 as low."""
    points = [(headline.L0.value(run) or 0.0, column.value(run) or 0.0) for run in runs if column.compares(run)]
    front: list[tuple[float, float]] = []
    for l0, value in sorted(points):
        if not front or value < front[-1][1]:
            front.append((l0, value))
    name = "best at this L0 or less"
    return {
        "type": "scatter", "mode": "lines", "x": [l0 for l0, _ in front], "y": [value for _, value in front],
        "line": {"color": GREY, "dash": "dot", "shape": "hv", "width": 1.5}, "name": name, "legendgroup": name,
        "hoverinfo": "skip",
    }  # fmt: skip


def _about(run: Run, column: Column, keys: Sequence[str]) -> str:
    differs = described(run, keys)
    lines = [f"<b>{safe(run.name)}</b>", f"L0 {shown(headline.L0.value(run))}", _said(run, column)]
    lines += [safe(differs[start : start + 70]) for start in range(0, min(len(differs), 350), 70)]
    lines += [] if column.compares(run) else ["not comparable with the others"]
    return "<br>".join(lines) + "<extra></extra>"


def _said(run: Run, column: Column) -> str:
    value = column.value(run)
    return f"{column.title} {shown(value)} {shown_interval(column.interval(run), value)}".strip()


def _shortened(label: str) -> str:
    return safe(label if len(label) <= 48 else label[:45] + "...")
