"""Numbers of a transcoder's weights alone, in the model's units."""

from typing import Any

import torch
from torch import Tensor

NORM_EDGES = torch.arange(-6.0, 4.0 + 1e-9, 0.125, dtype=torch.float64)
"""log10, eighths of a decade: the same for every run, so that runs can be laid over each other."""

THRESHOLD_BINS = 50


def decoder_norm_histogram(norms: Tensor) -> dict[str, Any]:
    """Features by log10 |W_dec,i|, the L2 norm of all that a feature writes. norms [S, F] -> {"log10_edges",
    "per_layer": counts[S][bin], "zero": how many of each layer write nothing, which are in no bin}.

    Norms beyond the edges are counted in the first and the last bin.
    """
    norms = norms.detach().double().cpu()
    low, high = float(NORM_EDGES[0]), float(NORM_EDGES[-1])
    logs = [layer[layer > 0].log10().clamp(low, high) for layer in norms]
    return {
        "log10_edges": NORM_EDGES.tolist(),
        "per_layer": [_counts(layer, NORM_EDGES) for layer in logs],
        "zero": (norms == 0).sum(dim=1).tolist(),
    }


def threshold_histogram(threshold: Tensor) -> dict[str, Any] | None:
    """Features by threshold, from 0 to the largest in bins of equal width. threshold [S, F] -> {"edges", "per_layer":
    counts[S][bin]}; None where all are 0, as of ReLU, which has none."""
    threshold = threshold.detach().double().cpu()
    highest = float(threshold.max())
    if highest <= 0:
        return None
    edges = torch.linspace(0, highest, THRESHOLD_BINS + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "per_layer": [_counts(layer.clamp(0, highest), edges) for layer in threshold]}


def _counts(values: Tensor, edges: Tensor) -> list[int]:
    """Bins are [low, high), the last one [low, high]."""
    counts: list[int] = torch.histogram(values, bins=edges).hist.long().tolist()
    return counts
