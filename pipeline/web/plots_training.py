"""Curves over training, from metrics.jsonl and timings.jsonl."""

from collections.abc import Iterable, Sequence

from pipeline.web.groups import Group
from pipeline.web.panels import Figure, Panel, Trace, grid, line, positive, safe, wide_range

MAIN = {
    "loss": ("Loss", "sum of the loss terms"),
    "l0": ("L0 of the batch", "features a token"),
    "fvu": ("FVU of the batch", "FVU"),
    "held_out/fvu": ("FVU, held out", "FVU"),
    "dead_fraction": ("Dead in the training window", "share of features"),
    "held_out/dead_fraction": ("Dead on the held-out rows", "share of features"),
}
"""Key of metrics.jsonl -> title and axis."""

NOT_PLOTTED = {"step", "tokens", "held_out/n_tokens", "held_out/explained_variance"}

LOGARITHMIC = ("loss", "fvu", "held_out/fvu")
POINTS = 600
"""Of a curve on the page; longer ones are thinned."""


def main(groups: Sequence[Group]) -> Figure | None:
    """Loss, L0, FVU and dead features, of the batches and on held-out rows."""
    found = _keys(groups)
    return _figure(groups, [key for key in MAIN if key in found], columns=2)


def rest(groups: Sequence[Group]) -> Figure | None:
    """Terms of the loss, learning rate, and whatever else was logged."""
    return _figure(groups, [key for key in _keys(groups) if key not in MAIN], columns=3)


def speed(groups: Sequence[Group]) -> Figure | None:
    """Tokens a second over training."""
    traces = [
        line(*_thinned([(at["step"], at.get("tokens_per_s")) for at in run.timings]), group.label, group.index)
        for group in groups
        for run in group.runs
        if run.timings
    ]
    shown = [Panel("Training speed", "step", "tokens a second", traces, y_extra={"rangemode": "tozero"})]
    return grid(shown, columns=1, row_height=230) if traces else None


def _figure(groups: Sequence[Group], keys: Sequence[str], columns: int) -> Figure | None:
    panels = [_panel(groups, key) for key in keys]
    return grid(panels, columns) if panels else None


def _panel(groups: Sequence[Group], key: str) -> Panel:
    values = [at.get(key) for group in groups for run in group.runs for at in run.lines]
    log = key.startswith(LOGARITHMIC) and wide_range(values, ratio=4)
    traces = [trace for group in groups for trace in _curves(group, key, log)]
    title, axis = MAIN.get(key, (key, key))
    extra = {} if log else {"rangemode": "tozero"}
    return Panel(title, "tokens", axis, traces, y_log=log, x_extra={"rangemode": "tozero"}, y_extra=extra)


def _curves(group: Group, key: str, log: bool) -> Iterable[Trace]:
    """One for each seed, alike."""
    for run in group.runs:
        points = [(at["tokens"], at[key]) for at in run.lines if at.get(key) is not None and "tokens" in at]
        if points:
            x, y = _thinned(points)
            thin = {"width": 2 if len(group.runs) == 1 else 1.3}
            hover = f"{safe(run.name)}<br>%{{x:,}} tokens: %{{y:.4g}}<extra></extra>"
            yield line(x, positive(y) if log else y, group.label, group.index, line=thin, hovertemplate=hover)


def _keys(groups: Sequence[Group]) -> list[str]:
    """Those with a number, in the order in which they were logged."""
    lines = [at for group in groups for run in group.runs for at in run.lines]
    numbers = [key for at in lines for key, value in at.items() if isinstance(value, int | float)]
    return [key for key in dict.fromkeys(numbers) if key not in NOT_PLOTTED]


def _thinned(points: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float | None]]:
    """At most about POINTS of them, the last one among them."""
    every = max(1, len(points) // POINTS)
    kept = points[(len(points) - 1) % every :: every]
    return [x for x, _ in kept], [y for _, y in kept]
