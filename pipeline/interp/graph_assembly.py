"""From rows to a graph: which columns become nodes, and what is left out put into rest nodes."""

import torch
from torch import Tensor

from pipeline.interp.graph import Graph, Kind
from pipeline.interp.graph_rows import Rows

NODES = [kind for kind in Kind if kind != Kind.logit]


def assembled(rows: Rows, chosen: Tensor, edges: Tensor) -> Graph:
    """chosen [n]: the features that are nodes, sorted; edges [n + k, C]: their rows and those of the outputs.
    -> the graph, on the CPU, without texts and meta"""
    edges, chosen = edges.cpu(), chosen.cpu()
    active, outputs, columns = [t.cpu() for t in rows.active], rows.outputs, rows.columns
    layer, position, index, activation, value = active
    n, k, n_active = len(chosen), len(outputs.ids), len(layer)
    tokens = rows.prompt.tokens[0].cpu()
    cut = torch.ones(n_active, dtype=torch.bool).index_fill(0, chosen, False).nonzero().squeeze(1)
    places, of_cut = (layer[cut] * len(tokens) + position[cut]).unique(return_inverse=True)
    rest = edges.new_zeros(n + k, len(places)).index_add_(1, of_cut, edges[:, cut])
    blocks = {kind: (edges[:, at], columns.layer[at], columns.position[at]) for kind, at in columns.places.items()}
    blocks[Kind.feature] = (edges[:, chosen], layer[chosen], position[chosen])
    blocks[Kind.rest] = (rest, places // len(tokens), places % len(tokens))
    parts = [(kind, *blocks[kind]) for kind in NODES if kind in blocks]
    behind = rows.model.lm.n_base_layers - rows.model.lm.layers.start
    parts.append((Kind.logit, edges.new_zeros(n + k, k), torch.full((k,), behind), torch.full((k,), len(tokens) - 1)))
    kinds = [kind for kind, block, _, _ in parts for _ in range(block.shape[1])]
    n_nodes = len(kinds)
    targets = torch.cat([torch.arange(n), torch.arange(n_nodes - k, n_nodes)])
    whole = edges.new_zeros(n_nodes, n_nodes)
    whole[targets] = torch.cat([block for _, block, _, _ in parts], dim=1)

    def filled(features: Tensor, logits: Tensor, fill: float) -> Tensor:
        return torch.full((n_nodes,), fill, dtype=features.dtype).index_copy_(0, targets, torch.cat([features, logits]))

    numbers = filled(index[chosen], torch.tensor(outputs.ids), -1)
    numbers[kinds.index(Kind.token) : kinds.index(Kind.token) + len(tokens)] = tokens
    return Graph(
        tokens=tokens,
        texts=["" for _ in tokens],
        kind=kinds,
        layer=torch.cat([part[2] for part in parts]),
        position=torch.cat([part[3] for part in parts]),
        index=numbers,
        activation=filled(activation[chosen], edges.new_zeros(k), 0.0),
        value=filled(value[chosen], outputs.values.cpu().to(value), torch.nan),
        probability=filled(edges.new_zeros(n), outputs.probabilities.cpu().to(edges), 0.0),
        edges=whole,
        n_layers=rows.model.lm.n_layers,
        d_features=rows.model.transcoder.d_features,
        n_active=n_active,
        meta={},
    )
