"""Through which attention heads an edge of an attribution graph goes.

Each path from a source to a target has a first attention head in which it moves or is copied, or none. With attention
patterns and norm denominators held at the prompt's, the edge is the sum of

    heads[l, h]   all paths whose first head is head h of layer l, whatever they cross afterwards
    direct        paths along the residual stream alone (and skip paths), which stay at their position

    heads[l, h] = B(only h of layer l, all of later layers) - B(only later layers)
    direct      = B(no head at all)

where B(S) is the effect with the patterns of all heads but those in S at 0. The terms sum to B(all heads), the edge:
summed over h, those of layer l are B(layers >= l) - B(layers > l).

A head's share is of first crossings: where a feature's information is copied twice, the first head has it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interp.circuits import frozen, graph_scores, paths
from pipeline.interp.circuits.attribution import check_linear
from pipeline.interp.circuits.frozen import Gates
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import node_ids
from pipeline.interp.circuits.graph_scores import Pruned
from pipeline.interp.circuits.paths import Effects, Target
from pipeline.interp.edits import decoder_rows
from pipeline.interp.replacement import ReplacementModel

SOURCES = (Kind.feature, Kind.error, Kind.token, Kind.position_0)


class Crossings(NamedTuple):
    """The parts of the edges into one target from k sources."""

    heads: Tensor
    """float64 [n_base_layers, H, k]: by the base model's layers, from 0; 0 in layers behind the target."""
    direct: Tensor
    """float64 [k]"""

    def total(self) -> Tensor:
        """The edges themselves. [k]"""
        return self.heads.sum(dim=(0, 1)) + self.direct


def of_edges(model: ReplacementModel, graph: Graph, target: int, sources: Sequence[int]) -> Crossings:
    """The parts of the graph's edges from `sources` (features, errors, tokens, position-0 outputs) to `target` (a
    feature, or a logit that is a token). `graph` is one of this model. UserError for other nodes."""
    check_linear(model.transcoder)
    read = _target(model, graph, target)
    written = _written(model, graph, sources)
    gates = frozen.record(model.lm, graph.tokens[None])
    names = list(gates.patterns)
    if read.layer < model.lm.n_layers:
        names = names[: model.lm.layers[read.layer] + 1]
    n_heads = {name: pattern.shape[1] for name, pattern in gates.patterns.items()}
    heads = torch.zeros(len(gates.patterns), max(n_heads.values()), len(sources), dtype=torch.float64)
    direct = torch.zeros(len(sources), dtype=torch.float64)
    for layer, name in enumerate(names):
        n = n_heads[name] + 1
        found = paths.effects(model.lm, model.transcoder, _from(gates, layer), n, graph.tokens[None], read)
        parts = [_dot(found, graph, source, vector) for source, vector in zip(sources, written, strict=True)]
        along = torch.stack(parts, dim=1) if parts else direct.expand(n, 0)
        heads[layer, : n - 1] = along[:-1] - along[-1]
        direct = along[-1]
    return Crossings(heads, direct)


def strongest(crossings: Crossings, source: int, n: int = 5) -> list[tuple[str, float]]:
    """The largest parts of one edge, by size: (`head 3.1` or `direct`, part). source: its place among the sources"""
    parts = {
        f"head {layer}.{head}": float(crossings.heads[layer, head, source])
        for layer in range(crossings.heads.shape[0])
        for head in range(crossings.heads.shape[1])
    }
    parts["direct"] = float(crossings.direct[source])
    ordered = sorted(parts.items(), key=lambda part: -abs(part[1]))
    return [part for part in ordered if part[1] != 0][:n]


def moving(graph: Graph, pruned: Pruned, n: int) -> list[tuple[int, int]]:
    """The n strongest kept edges between two positions, (target, source), whose parts `of_edges` can tell: by the
    target's influence times the source's share of it."""
    reached = pruned.influence + graph_scores.weights(graph)
    found = []
    for target, source in pruned.pairs().tolist():
        told = graph.kind[source] in SOURCES and (graph.kind[target] == Kind.feature or _is_token(graph, target))
        if told and graph.position[source] != graph.position[target]:
            share = graph.edges[target, source].abs() / graph.edges[target].abs().sum()
            found.append((float(reached[target] * share), target, source))
    return [(target, source) for _, target, source in sorted(found, reverse=True)[:n]]


def report(model: ReplacementModel, graph: Graph, pairs: Sequence[tuple[int, int]], n: int = 5) -> list[dict[str, Any]]:
    """Edges (target, source) with their n largest parts each, as JSON holds them: nodes by their node_id."""
    ids, rows = node_ids(graph), {}
    for target in dict.fromkeys(target for target, _ in pairs):
        sources = [source for to, source in pairs if to == target]
        found = of_edges(model, graph, target, sources)
        for i, source in enumerate(sources):
            parts = [{"path": path, "part": part} for path, part in strongest(found, i, n)]
            edge = {"source": ids[source], "target": ids[target], "weight": float(graph.edges[target, source])}
            rows[target, source] = {**edge, "parts": parts}
    return [rows[pair] for pair in pairs]


def _is_token(graph: Graph, i: int) -> bool:
    """Whether a logit node is a single token."""
    return graph.kind[i] == Kind.logit and int(graph.index[i]) >= 0 and graph.meta["settings"]["feature"] is None


def _from(gates: Gates, layer: int) -> Gates:
    """H + 1 sets of gates: head h alone of this layer, then none of it; all of later layers, none of earlier ones."""
    found = {}
    for at, (name, pattern) in enumerate(gates.patterns.items()):
        n_heads = pattern.shape[1]
        if at == layer:
            alone = torch.eye(n_heads + 1, n_heads, dtype=pattern.dtype, device=pattern.device)
            found[name] = pattern * alone[:, :, None, None]
        else:
            found[name] = pattern if at > layer else torch.zeros_like(pattern)
    return Gates(found, gates.norms)


def _target(model: ReplacementModel, graph: Graph, i: int) -> Target:
    layer, position, index = int(graph.layer[i]), int(graph.position[i]), int(graph.index[i])
    if graph.kind[i] == Kind.feature:
        return Target(layer, position, model.transcoder.encoder_row(layer, index))
    if _is_token(graph, i):
        unembed = model.lm.weights.get_output_embeddings().weight.detach()
        return Target(model.lm.n_layers, position, unembed[index] - unembed.mean(dim=0))
    raise UserError(f"node {i} is no feature and no single token among the outputs; choose such a target")


def _written(model: ReplacementModel, graph: Graph, sources: Sequence[int]) -> list[Tensor]:
    """What each source writes: [L, D] to the MLP outputs of its position; a token none."""
    transcoder, found = model.transcoder, []
    original = model.original(graph.tokens[None])
    missed = None
    for i in sources:
        kind, layer, position = graph.kind[i], int(graph.layer[i]), int(graph.position[i])
        if kind not in SOURCES:
            raise UserError(f"node {i} is a {kind}; choose features, errors, tokens or position-0 outputs as sources")
        rows = torch.zeros(tuple(transcoder.dims), dtype=torch.float64)
        if kind == Kind.feature:
            unit = decoder_rows(transcoder, layer, graph.index[i][None])[0]
            rows = float(graph.activation[i]) * unit.double().cpu()
        elif kind == Kind.error:
            missed = missed or model.at_original(original).y_hat
            rows[layer] = (original.mlp_out[layer][0, position].double() - missed[layer][0, position].double()).cpu()
        elif kind == Kind.position_0:
            rows[layer] = original.mlp_out[layer][0, 0].double().cpu()
        found.append(rows)
    return found


def _dot(found: Effects, graph: Graph, source: int, written: Tensor) -> Tensor:
    """The effect of one source under each set of gates. [n]"""
    position = int(graph.position[source])
    if graph.kind[source] == Kind.token:
        return (found.embedding[:, position].double() * found.value[position].double()).sum(dim=1).cpu()
    return torch.einsum("nmd,md->n", found.mlp_out[:, :, position].double().cpu(), written)
