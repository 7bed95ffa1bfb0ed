"""How much each node and edge of an attribution graph matters to its targets, and how much of that is explained.

    N[t, s] = |A[t, s]| / sum over s of |A[t, s]|       A: the graph's edges; rows without edges stay 0
    I = w N + w N^2 + w N^3 + ...                       w: probability of each logit node, 0 elsewhere
    replacement  = I[tokens] / (I[tokens] + I[errors])
    completeness = sum_i (1 - sum over errors e of N[i, e]) (I_i + w_i) / sum_i (I_i + w_i)

The sum of powers ends: a feature is fed by features of lower layers, so no path has more than n_layers + 1 edges.
`influence` uses that order itself: logits first, then the features layer by layer from the top, each row spread over
its sources once everything that it feeds has been counted. One product with each row, and no iteration.

Completeness counts every node, tokens and errors too, whose rows are 0: they have no inputs from errors and count as
explained, so that a graph of pure error scores 0.5. Without leaves the same mean runs over nodes with inputs alone.

Pruning, in this order (circuit-tracer's, https://github.com/safety-research/circuit-tracer):
1. Nodes by influence, largest first, until their share of all influence reaches `nodes`; tokens and logits always stay.
2. Edges among these, N of what is left, scored N[t, s] (I_t + w_t) with I of what is left, until `edges` is reached.
3. Nodes without an edge to what they feed go, and features without an edge from a source, until none is left.

circuit-tracer knows features, errors, tokens and logits alone: its scores are those of `reference(graph)`. The formulas
are the same on the whole graph, where positions, position-0 outputs, left-out features and biases take their share of
each row; those are neither tokens nor errors.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interp.circuits.graph import Graph, Kind

REFERENCE = (Kind.feature, Kind.error, Kind.token, Kind.logit)
"""The kinds of nodes that circuit-tracer has."""


class Scores(NamedTuple):
    """Each from 0 to 1, 1 the best; None where no influence reaches what it divides by."""

    replacement: float | None
    completeness: float | None
    completeness_without_leaves: float | None
    """Of the nodes that have inputs."""


class Pruned(NamedTuple):
    """What of a graph is worth showing."""

    nodes: Tensor
    """bool [n]: those that are kept."""
    edges: Tensor
    """bool [n, n]: those that are kept, as [target, source]."""
    influence: Tensor
    """float64 [n]: of each node in the whole graph."""
    cumulative: Tensor
    """float64 [n]: the share of all influence that a node and those before it have, in falling order of influence: a
    small one is important. 1 where there is no influence."""
    nodes_share: float
    edges_share: float

    def pairs(self) -> Tensor:
        """int64 [m, 2]: (target, source) of the kept edges."""
        return self.edges.nonzero()


def weights(graph: Graph) -> Tensor:
    """w: the probability of each logit node; where none has one, each the same share of 1. float64 [n]"""
    w = torch.zeros(graph.n_nodes, dtype=torch.float64)
    targets = graph.of(Kind.logit)
    w[targets] = graph.probability[targets].double()
    if not w.any():
        w[targets] = 1 / max(targets.stop - targets.start, 1)
    return w


def influence(graph: Graph) -> Tensor:
    """I of each node. float64 [n]"""
    return spread(graph, graph.edges, weights(graph))


def spread(graph: Graph, edges: Tensor, w: Tensor) -> Tensor:
    """w N + w N^2 + ... for edges [n, n] among the graph's nodes and w [n]. -> float64 [n]"""
    found, features = torch.zeros_like(w), graph.of(Kind.feature)
    for rows in _from_the_top(graph):
        of_rows = shares(edges[rows])
        later = graph.layer[features] >= graph.layer[rows].max() if len(rows) else slice(0)
        assert not of_rows[:, features][:, later].any(), "an effect on a feature of no higher layer"
        found += (found + w)[rows] @ of_rows
    return found


def shares(rows: Tensor) -> Tensor:
    """Each row's |entries| divided by their sum, rows of zeros left so. [m, n] -> float64 [m, n]"""
    size = rows.double().abs()
    return size / size.sum(dim=1, keepdim=True).clamp(min=1e-10)


def scores(graph: Graph) -> Scores:
    """The three of them, of all nodes of the graph."""
    w, errors = weights(graph), graph.of(Kind.error)
    found = spread(graph, graph.edges, w)
    tokens, missed = found[graph.of(Kind.token)].sum(), found[errors].sum()
    reached = found + w
    explained = torch.ones_like(w)
    has_inputs = torch.zeros_like(w, dtype=torch.bool)
    for rows in _from_the_top(graph):
        of_rows = shares(graph.edges[rows])
        explained[rows] = 1 - of_rows[:, errors].sum(dim=1)
        has_inputs[rows] = of_rows.any(dim=1)
    inner = reached * has_inputs
    return Scores(
        _ratio(tokens, tokens + missed),
        _ratio((explained * reached).sum(), reached.sum()),
        _ratio((explained * inner).sum(), inner.sum()),
    )


def report(graph: Graph) -> dict[str, Any]:
    """The scores of the whole graph, and on circuit-tracer's nodes alone, as JSON holds them."""
    return {"all_nodes": scores(graph)._asdict(), "circuit_tracer": scores(reference(graph))._asdict()}


def reference(graph: Graph) -> Graph:
    """The graph without the nodes that circuit-tracer does not have. Its rows do not sum to `value` any more."""
    kept = torch.tensor([kind in REFERENCE for kind in graph.kind])
    return graph if kept.all() else subgraph(graph, kept)


def subgraph(graph: Graph, kept: Tensor) -> Graph:
    """The graph of some of its nodes. kept bool [n]"""
    ids = kept.nonzero().flatten()
    tensors = {
        name: getattr(graph, name)[ids] for name in ("layer", "position", "index", "activation", "value", "probability")
    }
    inner = ids[ids < graph.of(Kind.logit).start] if Kind.logit in graph.kind else ids
    meta = graph.meta
    if Kind.logit in graph.kind:
        first = graph.of(Kind.logit).start
        labels = [graph.labels[int(i) - first] for i in ids[len(inner) :]]
        meta = {**graph.meta, "labels": labels}
    edges = graph.edges[ids][:, ids]
    return replace(graph, kind=[graph.kind[i] for i in ids.tolist()], edges=edges, meta=meta, **tensors)


def prune(graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> Pruned:
    """What of the graph to keep, as the top of this file says. UserError for shares outside [0, 1]."""
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise UserError(f"a graph cannot keep a share of {share} of its {name}; give one from 0 to 1")
    w = weights(graph)
    found = spread(graph, graph.edges, w)
    kept = _largest(found, nodes)
    always = torch.tensor([kind in (Kind.token, Kind.logit) for kind in graph.kind])
    ids = (kept | always).nonzero().flatten()
    small = subgraph(graph, kept | always)
    reached = spread(small, small.edges, w[ids]) + w[ids]
    edge_scores = shares(small.edges) * reached[:, None]
    inner_edges = _largest(edge_scores.flatten(), edges).view_as(edge_scores)
    inner_nodes = _connected(small, inner_edges)
    node_mask = torch.zeros(graph.n_nodes, dtype=torch.bool)
    node_mask[ids[inner_nodes]] = True
    edge_mask = torch.zeros(graph.n_nodes, graph.n_nodes, dtype=torch.bool)
    targets, sources = (inner_edges & inner_nodes[:, None] & inner_nodes).nonzero(as_tuple=True)
    edge_mask[ids[targets], ids[sources]] = True
    return Pruned(node_mask, edge_mask, found, _cumulative(found), nodes, edges)


def _connected(graph: Graph, edges: Tensor) -> Tensor:
    """What is left when nodes without edges are taken away, again and again. edges bool [n, n] -> bool [n]"""
    feeds = torch.tensor([kind not in (Kind.token, Kind.logit) for kind in graph.kind])
    is_fed = torch.tensor([kind == Kind.feature for kind in graph.kind])
    kept = torch.ones(graph.n_nodes, dtype=torch.bool)
    while True:
        live = edges & kept[:, None] & kept
        left = kept & (live.any(dim=0) | ~feeds) & (live.any(dim=1) | ~is_fed)
        if torch.equal(left, kept):
            return kept
        kept = left


def _largest(values: Tensor, share: float) -> Tensor:
    """The largest values that together reach a share of the sum, equal ones with them; never a 0. [m] -> bool [m]"""
    ordered = values.sort(descending=True).values
    total = ordered.cumsum(dim=0)
    if len(values) == 0 or total[-1] <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    at = int(torch.searchsorted(total / total[-1], torch.tensor(share, dtype=total.dtype)))
    return (values >= ordered[min(at, len(ordered) - 1)]) & (values > 0)


def _cumulative(values: Tensor) -> Tensor:
    ordered, ids = values.sort(descending=True, stable=True)
    total = ordered.cumsum(dim=0)
    found = torch.ones_like(values)
    if len(values) and total[-1] > 0:
        found[ids] = total / total[-1]
    return found


def _from_the_top(graph: Graph) -> Iterator[Tensor]:
    """Targets in an order in which whatever they feed comes before them: logits, then features from the last layer
    down. -> ids, int64 [m]"""
    logits = graph.of(Kind.logit)
    yield torch.arange(logits.start, logits.stop)
    features = graph.of(Kind.feature)
    layers = graph.layer[features]
    for layer in sorted(set(layers.tolist()), reverse=True):
        yield (layers == layer).nonzero().flatten()


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None
