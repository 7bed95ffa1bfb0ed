"""Figures as Plotly's JSON: several panels in a grid, one legend for all of them, colours that most eyes tell apart."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Figure = dict[str, Any]
Trace = dict[str, Any]

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#999933"]
"""Okabe and Ito's, without black and yellow, which are hard to see on dark and on white; a violet and
an olive in their place."""

FONT = 'system-ui, -apple-system, "Segoe UI", sans-serif'

DASHES = ["solid", "dash", "dot", "dashdot", "longdash"]
GREY = "#888888"

ROW_HEIGHT, ROW_GAP, TOP, BOTTOM = 250, 96, 54, 60
"""Pixels. The gap holds an axis title and the title of the panel below."""

LEGEND_ROW = 20
"""Pixels of a name in the legend; a figure is at least as high as its legend."""

COLUMN_GAP = 0.075
"""Share of the width between two panels: the tick labels and axis title of the one on the right."""


@dataclass
class Panel:
    title: str
    x: str
    y: str
    traces: list[Trace]
    x_log: bool = False
    y_log: bool = False
    x_extra: dict[str, Any] = field(default_factory=dict)
    y_extra: dict[str, Any] = field(default_factory=dict)


def grid(panels: Sequence[Panel], columns: int, row_height: int = ROW_HEIGHT, left: float = 0.0) -> Figure:
    """The panels in rows. A name is in the legend once; a click on it there works on all panels. left: share of the
    width before the first panel, for long tick labels there."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    listed_names = {trace["legendgroup"] for panel in panels for trace in panel.traces if trace.get("legendgroup")}
    row_height = max(row_height, (LEGEND_ROW * (len(listed_names) + 1) - (rows - 1) * ROW_GAP) // rows)
    height = rows * row_height + (rows - 1) * ROW_GAP
    wide = (1 - left - COLUMN_GAP * (columns - 1)) / columns
    layout: dict[str, Any] = {
        "height": height + TOP + BOTTOM, "margin": {"l": 64, "r": 16, "t": TOP, "b": BOTTOM}, "annotations": [],
        "hovermode": "closest", "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": PALETTE[0]},
        "legend": {"font": {"size": 11}, "tracegroupgap": 0},
    }  # fmt: skip
    traces: list[Trace] = []
    in_legend: set[str] = set()
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        number = "" if index == 0 else str(index + 1)
        x0 = left + column * (wide + COLUMN_GAP)
        top = 1 - row * (row_height + ROW_GAP) / height
        layout[f"xaxis{number}"] = _axis(panel, "x", [x0, x0 + wide], f"y{number}")
        y_domain = [max(0.0, top - row_height / height), top]
        layout[f"yaxis{number}"] = _axis(panel, "y", y_domain, f"x{number}")
        layout["annotations"].append(_title(panel.title, x0, top))
        for trace in panel.traces:
            name = str(trace.get("legendgroup", ""))
            listed = bool(name) and name not in in_legend and trace.get("showlegend", True)
            in_legend |= {name} if listed else set()
            traces.append(trace | {"xaxis": f"x{number}", "yaxis": f"y{number}", "showlegend": listed})
    layout["showlegend"] = len(in_legend) > 1
    return {"data": traces, "layout": layout}


def line(x: Sequence[Any], y: Sequence[Any], name: str, index: int, **more: Any) -> Trace:
    """A curve of group number `index`; the name is plain text."""
    mode = "lines+markers" if len(x) < 30 else "lines"
    style = {"color": colour(index), "dash": dash(index), "width": 2} | more.pop("line", {})
    return {
        "type": "scatter", "mode": mode, "x": list(x), "y": list(y), "name": safe(name), "legendgroup": safe(name),
        "line": style, "marker": {"size": 5}, "hovertemplate": f"{safe(name)}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        **more,
    }  # fmt: skip


def colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def dash(index: int) -> str:
    return DASHES[index // len(PALETTE) % len(DASHES)]


def safe(text: str) -> str:
    """For labels, in which Plotly reads a few HTML tags."""
    return html.escape(text, quote=False)


def wide_range(values: Iterable[float | None], ratio: float = 5) -> bool:
    """Whether a logarithmic axis shows more: all positive, and the largest many times the smallest."""
    found = [value for value in values if value is not None]
    return bool(found) and min(found) > 0 and max(found) / min(found) > ratio


def positive(values: Iterable[float | None]) -> list[float | None]:
    """For a logarithmic axis: what has no logarithm is left out."""
    return [value if value is not None and value > 0 else None for value in values]


def _axis(panel: Panel, direction: str, domain: list[float], anchor: str) -> dict[str, Any]:
    title, log, more = (
        (panel.x, panel.x_log, panel.x_extra) if direction == "x" else (panel.y, panel.y_log, panel.y_extra)
    )
    axis: dict[str, Any] = {
        "title": {"text": title, "font": {"size": 12}, "standoff": 6}, "domain": domain, "anchor": anchor,
        "tickfont": {"size": 11}, "zeroline": False, "ticks": "outside", "ticklen": 3, "tickangle": 0,
        "automargin": True,
    }  # fmt: skip
    return axis | (_log_ticks(panel.traces, direction) if log else {}) | more


def _log_ticks(traces: Sequence[Trace], direction: str) -> dict[str, Any]:
    """Ticks in plain numbers; Plotly's own are 2, 5 and powers of ten in two sizes."""
    values = [value for trace in traces for value in trace[direction] if value is not None and value > 0]
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    steps = [1, 2, 5] if high / low > 4 or direction == "x" else [1, 1.5, 2, 3, 4, 5, 7]
    ticks = [step * 10.0**power for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
             for step in steps]  # fmt: skip
    ticks = [tick for tick in ticks if low / 3 <= tick <= high * 3]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:,.12g}" for tick in ticks]}


def _title(text: str, x: float, y: float) -> dict[str, Any]:
    return {
        "text": f"<b>{text}</b>", "x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": "left",
        "yanchor": "bottom", "showarrow": False, "font": {"size": 13}, "yshift": 6,
    }  # fmt: skip
