"""By layer, by position and over features: where a transcoder is good and where it is not."""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest

from pipeline.web.groups import Group
from pipeline.web.panels import PALETTE, Figure, Panel, Trace, grid, line, positive, safe, wide_range
from pipeline.web.runs import Run, lookup

Numbers = list[float | None]

FEW = 4

CURVES = {
    "only": "Only layer l",
    "up_to": "Layers up to l",
    "from": "Layers from l on",
}
BASES = {"live": "", "teacher_forced": ", teacher-forced"}

SCALE = ["#0072B2", "#3F87A0", "#6E988C", "#99A675", "#BFA556", "#D59A2E", "#D55E00"]
"""More layers than the palette has colours, from first to last: blue to orange."""


def by_layer(groups: Sequence[Group]) -> Figure | None:
    """L0, FVU, dead features and cosine of each layer."""
    panels = [
        _per_layer(groups, "L0", "active features a token", "l0.per_layer", zero=True),
        _per_layer(groups, "FVU", "FVU", "fvu.per_layer", log=True),
        _per_layer(groups, "Dead features", "share of the layer's features", "dead_fraction.per_layer", zero=True),
        _per_layer(groups, "Cosine", "between reconstruction and target", "cosine.per_layer"),
        _per_layer(groups, "Bias", "constant part of the FVU", "bias.per_layer", log=True),
        _per_layer(groups, "Norm of the reconstruction", "mean |y_hat| / mean |y|", "relative_norm.per_layer"),
    ]
    found = [panel for panel in panels if panel is not None]
    return grid(found, columns=2) if found else None


def replacement(groups: Sequence[Group]) -> Figure | None:
    """KL with some of the layers replaced."""
    panels = []
    for basis, said in BASES.items():
        for part, title in CURVES.items():

            def kl(run: Run, basis: str = basis, part: str = part) -> Numbers | None:
                entries = lookup(run.metrics, f"replacement_curves.{basis}.{part}")
                return [lookup(entry, "kl") for entry in entries] if isinstance(entries, list) else None

            panel = curves(groups, title + said, "KL (nats a token)", kl, log=True)
            panels += [] if panel is None else [panel]
    return grid(panels, columns=3) if panels else None


def by_position(groups: Sequence[Group]) -> Figure | None:
    """KL by position in the context."""

    def kl(run: Run) -> Numbers | None:
        return run.numbers("replacement.kl_by_position")

    panel = curves(groups, "KL by position", "KL (nats a token)", kl, log=True, x="position in the context", start=1)
    return None if panel is None else grid([panel], columns=1, row_height=290)


def histograms(groups: Sequence[Group]) -> Figure | None:
    """How often features fire, decoder norms and thresholds, all layers together, each group's seeds together."""
    panels = []
    for key, edges, title, x in (
        ("density_histogram", "log10_edges", "How often features fire", "log10 of the share of tokens"),
        ("decoder_norm_histogram", "log10_edges", "Decoder norms", "log10 of the norm"),
        ("threshold_histogram", "edges", "Thresholds", "threshold"),
    ):
        traces = []
        for group in groups:
            counted = [found for run in group.runs if (found := _counts(run, key, edges)) is not None]
            for bins in dict.fromkeys(tuple(at) for at, _ in counted):  # thresholds have bins of each run's own
                layers = [layer for at, per_layer in counted for layer in per_layer if tuple(at) == bins]
                traces.append(_steps(bins, _summed(layers), group.label, group.index))
        panels += [Panel(title, x, "share of features", _trimmed(traces))] if traces else []
    if len(groups) > FEW:
        for trace in (trace for panel in panels for trace in panel.traces):
            trace["line"] |= {"shape": "linear"}  # the upright parts of many steps hide each other
    return grid(panels, columns=len(panels)) if panels else None


def in_detail(run: Run) -> Figure | None:
    """Of one run, by layer: how often features fire, decoder norms, thresholds."""
    panels = []
    for key, edges, title, x in (
        ("density_histogram", "log10_edges", "How often features fire", "log10 of the share of tokens"),
        ("decoder_norm_histogram", "log10_edges", "Decoder norms", "log10 of the norm"),
        ("threshold_histogram", "edges", "Thresholds", "threshold"),
    ):
        found = _counts(run, key, edges)
        if found is None:
            continue
        at, layers = found
        traces = [_steps(at, counts, f"layer {l}", l) for l, counts in enumerate(layers)]
        for l, trace in enumerate(traces):
            trace["line"] |= {"color": layer_colour(l, len(layers)), "dash": "solid"}
        panels.append(Panel(title, x, "share of the layer's features", _trimmed(traces)))
    return grid(panels, columns=len(panels)) if panels else None


def layer_colour(l: int, n_layers: int) -> str:
    if n_layers <= len(PALETTE):
        return PALETTE[l]
    return SCALE[round(l * (len(SCALE) - 1) / max(1, n_layers - 1))]


def _per_layer(
    groups: Sequence[Group], title: str, y: str, path: str, log: bool = False, zero: bool = False
) -> Panel | None:  # fmt: skip
    def numbers(run: Run) -> Numbers | None:
        return run.numbers(path)

    panel = curves(groups, title, y, numbers, log)
    if panel is not None and zero:
        panel.y_extra["rangemode"] = "tozero"
    return panel


def curves(
    groups: Sequence[Group], title: str, y: str, numbers: Callable[[Run], Numbers | None], log: bool = False,
    x: str = "layer", start: int = 0,
) -> Panel | None:  # fmt: skip
    """A curve for each group, the mean over its seeds; None where no run has one. A single number for all layers is a
    feature space that all share, and no curve."""
    means = {}
    for group in groups:
        found = [values for run in group.runs if (values := numbers(run)) is not None and len(values) > 1]
        if found:
            means[group.label] = (group, [_mean(at) for at in zip_longest(*found)])
    if not means:
        return None
    as_log = log and wide_range([value for _, values in means.values() for value in values], ratio=3)
    traces = [
        line(range(start, start + len(values)), positive(values) if as_log else values, label, group.index)
        for label, (group, values) in means.items()
    ]
    longest = max(len(values) for _, values in means.values())
    ticks = {"dtick": 1, "tick0": 0} if longest <= 16 else {}
    return Panel(title, x, y, traces, y_log=as_log, x_extra=ticks)


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _counts(run: Run, key: str, edges: str) -> tuple[list[float], list[list[float]]] | None:
    """Middles of the bins and [layer][bin] counts. Features that never fired are a bin of their own on the left."""
    found, counts = lookup(run.metrics, f"{key}.{edges}"), lookup(run.metrics, f"{key}.per_layer")
    if not isinstance(found, list) or not isinstance(counts, list) or len(found) < 2:
        return None
    return [(low + high) / 2 for low, high in pairwise(found)], [layer for layer in counts if layer is not None]


def _summed(layers: Sequence[Sequence[float]]) -> list[float]:
    return [sum(counts) for counts in zip(*layers, strict=True)]


def _steps(at: Sequence[float], counts: Sequence[float], name: str, index: int) -> Trace:
    total = sum(counts)
    trace = line(at, [count / total if total else 0.0 for count in counts], name, index)
    hover = f"{safe(name)}<br>%{{x:.3g}}: %{{y:.1%}}<extra></extra>"
    return trace | {"mode": "lines", "line": trace["line"] | {"shape": "hvh", "width": 1.6}, "hovertemplate": hover}


def _trimmed(traces: list[Trace]) -> list[Trace]:
    """Without the bins at both ends that are empty in all of them."""
    if len({tuple(trace["x"]) for trace in traces}) > 1:
        return traces
    filled = [index for index in range(len(traces[0]["x"])) if any(trace["y"][index] for trace in traces)]
    first, last = (max(0, filled[0] - 1), filled[-1] + 2) if filled else (0, 0)
    return [trace | {"x": trace["x"][first:last], "y": trace["y"][first:last]} for trace in traces]
