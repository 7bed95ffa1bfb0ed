"""The strongest paths through a graph: from a token through features to what is explained.

A path is as strong as w N[t, s] N[s, r] ...: the weight of the output, and of each node on the way the share that its
source has of all |edges| into it. The strongest path into each node follows from those into the nodes that it feeds,
from the top layer down; no path is listed twice, and a token's own edge to an output is no path through features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind


class Path(NamedTuple):
    nodes: list[int]
    """From the token to the output."""
    strength: float


def strongest(graph: Graph, n: int = 3) -> list[Path]:
    """The strongest path from each token that has one, the n strongest of these."""
    features, outputs, tokens = (graph.of(kind) for kind in (Kind.feature, Kind.logit, Kind.token))
    best, following = graph_scores.weights(graph), torch.full((graph.n_nodes,), -1)
    rows = torch.arange(graph.n_nodes)[outputs]

    def reach(columns: Tensor, rows: Tensor) -> None:
        if len(rows) and len(columns):
            share = graph_scores.shares(graph.edges[rows])[:, columns]
            found = (best[rows, None] * share).max(dim=0)
            best[columns], following[columns] = found.values, rows[found.indices]

    ids = torch.arange(graph.n_nodes)[features]
    for layer in graph.layer[ids].unique().flip(0).tolist():
        here = ids[graph.layer[ids] == layer]
        reach(here, rows)
        rows = torch.cat([rows, here])
    ends = torch.arange(graph.n_nodes)[tokens]
    reach(ends, ids)
    found = []
    for end in ends[best[ends].argsort(descending=True)][:n].tolist():
        if float(best[end]) > 0:
            nodes = [end]
            while following[nodes[-1]] >= 0:
                nodes.append(int(following[nodes[-1]]))
            found.append(Path(nodes, float(best[end])))
    return found
