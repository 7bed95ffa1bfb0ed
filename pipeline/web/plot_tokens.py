"""Pictures of features over the tokens of a text: a heatmap, and the text itself coloured by each feature."""

import math
from collections.abc import Sequence

from pipeline.web.panels import Figure, Trace, colour, safe

ROW, HEAD, FOOT = 22, 110, 30
"""Pixels: of a feature's row, above the first one for token labels, and below the last."""
CELLS_WITH_NUMBERS = 700
SCALE = [[0.0, "rgba(86,180,233,0.18)"], [0.35, "#56B4E9"], [0.7, "#0072B2"], [1.0, "#08306b"]]
"""From nearly nothing to dark, so that what is not active shows the page."""

LINE_CHARACTERS, NAME_CHARACTERS = 150, 32
"""Of a line of the coloured text, and of the name in front of it."""


def heatmap(
    tokens: Sequence[str], names: Sequence[str], layers: Sequence[int], values: Sequence[Sequence[float]]
) -> Figure:
    """values [features][tokens]; features come ordered by layer."""
    n, n_tokens = len(names), len(tokens)
    z = [[value if value > 0 else None for value in row] for row in values]
    long = max(map(len, tokens), default=1) * n_tokens > 90
    trace: Trace = {
        "type": "heatmap", "z": z, "x": list(range(n_tokens)), "y": list(range(n)), "colorscale": SCALE, "zmin": 0,
        "xgap": 1, "ygap": 1, "hoverongaps": False,
        "customdata": [[f"{safe(name)}<br>{safe(token)}" for token in tokens] for name in names],
        "hovertemplate": "%{customdata}: %{z:.4g}<extra></extra>",
        "colorbar": {"title": {"text": "activation", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }  # fmt: skip
    if n * n_tokens <= CELLS_WITH_NUMBERS and n_tokens <= 30:
        trace |= {"texttemplate": "%{z:.2g}", "textfont": {"size": 10}}
    breaks = [i for i in range(1, n) if layers[i] != layers[i - 1]]
    head = HEAD if long else HEAD // 3
    layout = {
        "height": head + ROW * n + FOOT, "margin": {"l": 10, "r": 10, "t": head, "b": FOOT},
        "xaxis": {
            "side": "top", "tickmode": "array", "tickvals": list(range(n_tokens)), "automargin": True,
            "ticktext": [shown(token) for token in tokens], "tickangle": -60 if long else 0, "showgrid": False,
            "zeroline": False, "range": [-0.5, n_tokens - 0.5], "ticks": "",
        },
        "yaxis": {
            "tickmode": "array", "tickvals": list(range(n)), "ticktext": [shown(name, 44) for name in names],
            "autorange": False, "range": [n - 0.5, -0.5], "automargin": True, "showgrid": False, "zeroline": False,
            "ticks": "", "tickfont": {"size": 11},
        },
        "shapes": [
            {"type": "line", "x0": -0.5, "x1": n_tokens - 0.5, "y0": i - 0.5, "y1": i - 0.5,
             "line": {"color": "#888888", "width": 1}}
            for i in breaks
        ],
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def coloured(
    tokens: Sequence[str], names: Sequence[str], layers: Sequence[int], values: Sequence[Sequence[float]]
) -> Figure:
    """The text once for each feature, each token the stronger coloured the more active the feature is at it; the colour
    is full at the feature's highest activation in the text."""
    words = [token.replace("\n", "\\n").replace("\t", "\\t") for token in tokens]
    shapes, x, y, text, hover = [], [], [], [], []
    line = 0.0
    labels: list[tuple[float, str, str]] = []
    for name, layer, row in zip(names, layers, values, strict=True):
        highest, at = max(row, default=0.0) or 1.0, NAME_CHARACTERS
        labels.append((line + 0.5, shown(name, NAME_CHARACTERS - 2), colour(layer)))
        for word, value in zip(words, row, strict=True):
            if at + len(word) > LINE_CHARACTERS and at > NAME_CHARACTERS:
                at, line = NAME_CHARACTERS, line + 1
            if value > 0:
                alpha = 0.12 + 0.78 * value / highest
                space = len(word) - len(word.lstrip(" ")) if word.strip() else 0
                shapes.append({
                    "type": "rect", "layer": "below", "x0": at + space, "x1": at + len(word), "y0": line + 0.08,
                    "y1": line + 0.92, "line": {"width": 0}, "fillcolor": f"rgba(230,159,0,{alpha:.3f})",
                })  # fmt: skip
            x.append(at)
            y.append(line + 0.5)
            text.append(safe(word).replace(" ", "\u00a0"))
            hover.append(f"{safe(name)}<br>{safe(word)}: {value:.4g}" if value > 0 else "")
            at += len(word)
        line += 1
        shapes.append({"type": "line", "x0": 0, "x1": LINE_CHARACTERS, "y0": line + 0.15, "y1": line + 0.15,
                       "line": {"color": "rgba(136,136,136,0.25)", "width": 1}})  # fmt: skip
        line += 0.3
    mono = {"family": "ui-monospace, 'DejaVu Sans Mono', monospace", "size": 12}
    traces: list[Trace] = [
        {"type": "scatter", "mode": "text", "x": x, "y": y, "text": text, "textposition": "middle right",
         "textfont": mono, "hovertext": hover, "hoverinfo": "text", "showlegend": False},
        {"type": "scatter", "mode": "text", "x": [0] * len(labels), "y": [at for at, _, _ in labels],
         "text": [f"<b>{name}</b>" for _, name, _ in labels], "textposition": "middle right",
         "textfont": {"size": 11, "color": [colour for _, _, colour in labels]}, "hoverinfo": "skip",
         "showlegend": False},
    ]  # fmt: skip
    hidden = {"visible": False, "fixedrange": True}
    layout = {
        "height": math.ceil(22 * line) + 40, "margin": {"l": 10, "r": 10, "t": 20, "b": 20}, "shapes": shapes,
        "xaxis": hidden | {"range": [0, LINE_CHARACTERS]}, "yaxis": hidden | {"range": [line, 0]},
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": traces, "layout": layout}


def shown(text: str, width: int = 18) -> str:
    """For a label: cut, and with what cannot be seen spelled out."""
    text = text.strip(" ").replace("\n", "\\n") or "' '"
    return safe(text if len(text) <= width else text[: width - 1] + "…")
