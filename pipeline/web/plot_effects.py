"""Pictures of what features do: a ranking, and token probabilities as features are turned up and down."""

from collections.abc import Sequence

from pipeline.web.panels import Figure, Panel, Trace, grid, line, safe
from pipeline.web.plot_tokens import shown
from pipeline.web.plots_layers import layer_colour

BAR = 20
"""Pixels of a row."""


def ranking(names: Sequence[str], layers: Sequence[int], values: Sequence[float], title: str, n_layers: int) -> Figure:
    """Bars, the first on top."""
    n = len(names)
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.09 * (high - low)  # for the number behind a bar
    traces: list[Trace] = []
    for layer in sorted(set(layers)):
        mine = [i for i in range(n) if layers[i] == layer]
        traces.append({
            "type": "bar", "orientation": "h", "x": [values[i] for i in mine], "y": mine, "name": f"layer {layer}",
            "marker": {"color": layer_colour(layer, n_layers)}, "width": 0.78,
            "text": [f"{values[i]:.3g}" for i in mine],
            "textposition": "outside", "cliponaxis": False, "textfont": {"size": 10},
            "customdata": [safe(names[i]) for i in mine], "hovertemplate": "%{customdata}: %{x:.4g}<extra></extra>",
        })  # fmt: skip
    layout = {
        "height": BAR * n + 90, "margin": {"l": 10, "r": 60, "t": 20, "b": 50}, "barmode": "overlay",
        "xaxis": {"title": {"text": title}, "zeroline": True, "zerolinecolor": "#888888", "automargin": True,
                  "range": [low - room if low < 0 else 0, high + room]},
        "yaxis": {"tickmode": "array", "tickvals": list(range(n)), "ticktext": [shown(name, 60) for name in names],
                  "range": [n - 0.5, -0.5], "automargin": True, "showgrid": False, "zeroline": False,
                  "tickfont": {"size": 11}},
        "legend": {"traceorder": "normal"}, "showlegend": len(traces) > 1,
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def token_probability(
    factors: Sequence[float], tokens: Sequence[str], panels: Sequence[tuple[str, Sequence[Sequence[float]]]]
) -> Figure:
    """panels: (feature, probabilities [tokens][factors]), one beside the other."""
    made = []
    for name, probabilities in panels:
        traces = [
            line(factors, [round(p, 6) for p in row], token, index)
            for index, (token, row) in enumerate(zip(tokens, probabilities, strict=True))
        ]
        mark: Trace = {
            "type": "scatter", "mode": "lines", "x": [1, 1], "y": [0, 1], "hoverinfo": "skip", "showlegend": False,
            "line": {"color": "#888888", "width": 1, "dash": "dot"},
        }  # fmt: skip
        ticks = {"tickmode": "array", "tickvals": list(factors), "ticktext": [f"{f:g}" for f in factors]}
        panel = Panel(shown(name, 60), "activation times", "probability", [mark, *traces], x_extra=ticks)
        panel.y_extra |= {"range": [-0.02, 1.02]}
        made.append(panel)
    return grid(made, columns=2, row_height=260)
