"""Pictures of many features at once: maps of what they write, and how their activations correlate."""

from collections.abc import Sequence

from pipeline.web.panels import Figure, Panel, Trace, grid, safe
from pipeline.web.plot_tokens import shown
from pipeline.web.plots_layers import layer_colour

DIVERGING = [[0.0, "#0072B2"], [0.5, "#ffffff"], [1.0, "#D55E00"]]
MAP_HEIGHT = 520

Point = Sequence[float]


def embedding(
    maps: Sequence[tuple[str, str, Sequence[Point]]], layers: Sequence[int], names: Sequence[str],
    labelled: Sequence[tuple[Sequence[int], Sequence[str]]],
) -> Figure:  # fmt: skip
    """maps: (name, remark, points [n][2]); labelled: for each map the points that carry a text, and the texts."""
    panels = []
    n_layers = max(layers) + 1
    for (name, remark, points), (which, texts) in zip(maps, labelled, strict=True):
        traces: list[Trace] = []
        for layer in sorted(set(layers)):
            mine = [i for i, other in enumerate(layers) if other == layer]
            traces.append({
                "type": "scattergl", "mode": "markers", "x": [round(float(points[i][0]), 4) for i in mine],
                "y": [round(float(points[i][1]), 4) for i in mine], "name": f"layer {layer}",
                "legendgroup": f"layer {layer}", "text": [safe(names[i]) for i in mine],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"size": 5, "opacity": 0.45, "color": layer_colour(layer, n_layers)},
            })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "text", "x": [float(points[i][0]) for i in which], "hoverinfo": "skip",
            "y": [float(points[i][1]) for i in which], "text": [f"<b>{shown(text, 22)}</b>" for text in texts],
            "textfont": {"size": 10}, "textposition": "top center", "showlegend": False,
        })  # fmt: skip
        bare = {"showticklabels": False, "ticks": "", "showgrid": False}
        panels.append(Panel(f"{name} ({remark})", "", "", traces, x_extra=bare, y_extra=bare))
    figure = grid(panels, columns=len(panels), row_height=MAP_HEIGHT)
    figure["layout"]["legend"] |= {"itemsizing": "constant"}
    return figure


def correlation(
    best: Sequence[Sequence[float | None]], names: Sequence[str], layers: Sequence[int],
    matrix: Sequence[Sequence[float]],
) -> Figure:  # fmt: skip
    """best [layers][layers], matrix [features][features]; features come ordered by layer."""
    sources = [f"layer {layer}" for layer in range(len(best))]
    left: Trace = {
        "type": "heatmap", "z": [list(row) for row in best], "x": sources, "y": sources, "zmin": 0, "zmax": 1,
        "colorscale": [[0, "#ffffff"], [1, "#0072B2"]], "showscale": False, "xgap": 2, "ygap": 2,
        "texttemplate": "%{z:.2f}", "hoverongaps": False,
        "hovertemplate": "%{y} with %{x}: %{z:.3f}<extra></extra>",
    }  # fmt: skip
    n = len(names)
    places = list(range(n))
    right: Trace = {
        "type": "heatmap", "z": [[round(value, 4) for value in row] for row in matrix], "x": places, "y": places,
        "zmin": -1, "zmax": 1, "colorscale": DIVERGING, "xaxis": "x2", "yaxis": "y2",
        "customdata": [[f"{safe(one)}<br>{safe(other)}" for other in names] for one in names],
        "hovertemplate": "%{customdata}: %{z:.3f}<extra></extra>",
        "colorbar": {"title": {"text": "correlation", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }  # fmt: skip
    breaks = [i - 0.5 for i in range(1, n) if layers[i] != layers[i - 1]]
    line = {"type": "line", "line": {"color": "#555555", "width": 1}}
    shapes = [
        *(line | {"xref": "x2", "yref": "y2", "x0": at, "x1": at, "y0": -0.5, "y1": n - 0.5} for at in breaks),
        *(line | {"xref": "x2", "yref": "y2", "y0": at, "y1": at, "x0": -0.5, "x1": n - 0.5} for at in breaks),
    ]
    height = max(420, 13 * n + 130)
    plain = {"showgrid": False, "zeroline": False, "ticks": ""}
    labels = plain | {"tickmode": "array", "tickvals": places, "tickfont": {"size": 9}}
    small = min(1.0, 340 / (height - 90))
    layout = {
        "height": height, "margin": {"l": 70, "r": 20, "t": 60, "b": 30},
        "xaxis": plain | {"domain": [0, 0.26], "anchor": "y", "side": "bottom"},
        "yaxis": plain | {"domain": [1 - small, 1], "anchor": "x", "autorange": "reversed"},
        "xaxis2": labels | {"domain": [0.5, 1], "anchor": "y2", "showticklabels": False, "range": [-0.5, n - 0.5]},
        "yaxis2": labels | {"domain": [0, 1], "anchor": "x2", "ticktext": [shown(name, 34) for name in names],
                            "range": [n - 0.5, -0.5]},
        "shapes": shapes,
        "annotations": [_title("Highest correlation of a layer's features<br>with one of another layer, mean", 0),
                        _title("Features with each other, by layer", 0.5)],
    }  # fmt: skip
    return {"data": [left, right], "layout": layout}


def _title(text: str, x: float) -> dict[str, object]:
    return {
        "text": f"<b>{text}</b>", "x": x, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "left", "align": "left",
        "yanchor": "bottom", "showarrow": False, "font": {"size": 13}, "yshift": 8,
    }  # fmt: skip
