"""From rows to a graph: which columns become nodes, and what is left out put into rest nodes."""

import torch
from torch import Tensor

from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_rows import Rows

NODES = [kind for kind in Kind if kind != Kind.logit]
ROWS = 256
"""Rows that are put in at a time: their columns are copied on the way."""


def assembled(rows: Rows, targets: Tensor, edges: Tensor) -> Graph:
    """targets [n + k]: the features that are nodes, and -1 for the outputs; edges [n + k, C]: their rows.
    -> the graph, on the CPU, without texts and meta"""
    outputs, columns, tokens = rows.outputs, rows.columns, rows.prompt.tokens[0].cpu()
    layer, position, index, activation, value = (t.cpu() for t in rows.active)
    n_active, k = len(layer), len(outputs.ids)
    order = torch.where(targets < 0, n_active, targets).argsort(stable=True)
    chosen = targets[order][: len(order) - k]
    cut = torch.ones(n_active, dtype=torch.bool).index_fill(0, chosen, False).nonzero().squeeze(1)
    places, of_cut = (layer[cut] * len(tokens) + position[cut]).unique(return_inverse=True)
    behind = rows.model.lm.n_base_layers - rows.model.lm.layers.start
    nodes = {kind: (columns.layer[at], columns.position[at]) for kind, at in columns.places.items()}
    nodes[Kind.feature] = (layer[chosen], position[chosen])
    nodes[Kind.rest] = (places // len(tokens), places % len(tokens))
    nodes[Kind.logit] = (torch.full((k,), behind), torch.full((k,), len(tokens) - 1))
    parts = [(kind, *nodes[kind]) for kind in Kind if kind in nodes]
    kinds = [kind for kind, layers, _ in parts for _ in range(len(layers))]
    n, n_nodes = len(chosen), len(kinds)
    where = torch.cat([torch.arange(n), torch.arange(n_nodes - k, n_nodes)])
    whole = torch.zeros(n_nodes, n_nodes, dtype=edges.dtype)
    for some, to in zip(order.split(ROWS), where.split(ROWS), strict=True):
        part = edges[some.to(edges.device)].cpu()
        blocks = {kind: part[:, at] for kind, at in columns.places.items()}
        blocks[Kind.feature] = part[:, chosen]
        blocks[Kind.rest] = part.new_zeros(len(part), len(places)).index_add_(1, of_cut, part[:, cut])
        whole[to, : n_nodes - k] = torch.cat([blocks[kind] for kind in NODES if kind in blocks], dim=1)

    def filled(features: Tensor, logits: Tensor, fill: float) -> Tensor:
        joined = torch.cat([features, logits.cpu().to(features)])
        return torch.full((n_nodes,), fill, dtype=features.dtype).index_copy_(0, where, joined)

    numbers = filled(index[chosen], torch.tensor(outputs.ids), -1)
    numbers[kinds.index(Kind.token) : kinds.index(Kind.token) + len(tokens)] = tokens
    return Graph(
        tokens=tokens,
        texts=["" for _ in tokens],
        kind=kinds,
        layer=torch.cat([layers for _, layers, _ in parts]),
        position=torch.cat([positions for _, _, positions in parts]),
        index=numbers,
        activation=filled(activation[chosen], torch.zeros(k), 0.0),
        value=filled(value[chosen], outputs.values, torch.nan),
        probability=filled(torch.zeros_like(value[chosen]), outputs.probabilities, 0.0),
        edges=whole,
        n_layers=rows.model.lm.n_layers,
        d_features=rows.model.transcoder.d_features,
        n_active=n_active,
        meta={},
    )
