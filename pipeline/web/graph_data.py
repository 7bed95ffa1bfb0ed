"""What the page of an attribution graph holds: nodes and edges in numbers, and what is known of the features.

The page prunes further by itself, as `circuits/graph_scores.py` does. So it is given more than it shows at first:
the nodes that hold `MOST_SHARE` of all influence and every edge among them, fewer only where that would be too much for
a browser. What a target reads beyond that is kept as its sum, so that each account on the page closes.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.interp.circuits import graph_scores, top_paths
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode, node_ids
from pipeline.interp.circuits.graph_scores import Pruned
from pipeline.interp.dashboards import feature_labels

MOST_SHARE = 0.95
MOST_NODES = 1500
MOST_EDGES = 250_000
"""8 bytes each on the page, a third more as text: 2.7 MB."""

MOST_FEATURES = 600
"""So many features, the most influential, come with their contexts: about 2 kB each."""
CONTEXTS = (5, 2)
"""Contexts of the first group, the top ones, and of each other group."""
BEFORE, AFTER = 18, 8
"""Tokens of a context on the page, around the highest one."""
BINS = 50
PATHS = 5

FeatureData = Callable[[int, int], Mapping[str, Any] | None]
"""(layer, index) -> the feature's JSON as `interp/dashboards/feature_files.py` reads it, None where there is none."""


class Strings:
    """Each text once, by its number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def payload(
    graph: Graph,
    pruned: Pruned,
    supernodes: Iterable[Supernode],
    features: FeatureData | None,
    labels: Mapping[tuple[int, int], str],
) -> dict[str, Any]:
    """What the page's script reads, as JSON can hold it.

    pruned: gives the shares at which the sliders of pruning stand at first. labels: of features by (layer, index);
    others are named by their top contexts.
    """
    influence = pruned.influence
    ids, most = chosen(graph, influence, max(pruned.nodes_share, MOST_SHARE))
    strings = Strings()
    found = _features(graph, ids, influence, features, strings, labels)
    names = {f"{l}/{i}": text for (l, i), text in labels.items()} | {key: one["label"] for key, one in found.items()}
    groups = [[label, *nodes] for label, nodes in supernodes]
    return {
        "key": _key(graph, groups),
        "tokens": graph.texts,
        "n_layers": graph.n_layers,
        "n_active": graph.n_active,
        "nodes": _nodes(graph, ids, influence, names),
        "edges": _edges(graph.edges[ids][:, ids]),
        "influence_total": float(influence.sort(descending=True).values.cumsum(dim=0)[-1]),
        "thresholds": {"node": min(pruned.nodes_share, most), "edge": pruned.edges_share, "most": most},
        "supernodes": groups,
        "paths": _paths(graph, ids),
        "features": found,
        "strings": list(strings.numbers),
        "n_left_out": graph.n_nodes - len(ids),
    }


def chosen(graph: Graph, influence: Tensor, share: float) -> tuple[Tensor, float]:
    """Nodes for the page, int64 [m], and the share of influence up to which they are all there."""
    order = influence.sort(descending=True).values
    reached = order.cumsum(dim=0) / influence.sum().clamp(min=torch.finfo(influence.dtype).tiny)
    always = torch.tensor([kind in (Kind.token, Kind.logit, Kind.bias) for kind in graph.kind])
    while True:
        at = min(int(torch.searchsorted(reached, torch.tensor(share, dtype=reached.dtype))), len(order) - 1)
        ids = (always | ((influence >= order[at]) & (influence > 0))).nonzero().flatten()
        n_edges = int((graph.edges[ids][:, ids] != 0).sum())
        if (len(ids) <= MOST_NODES and n_edges <= MOST_EDGES) or share <= 0.1:
            return ids, round(share, 3)
        share -= 0.05


def _nodes(graph: Graph, ids: Tensor, influence: Tensor, names: Mapping[str, str]) -> dict[str, list[Any]]:
    """Columns, one entry a node."""
    kinds, all_ids = list(Kind), node_ids(graph)
    rows = graph.edges[ids].double()
    outside = rows.clone()
    outside[:, ids] = 0
    first_logit = graph.of(Kind.logit).start
    listed = ids.tolist()
    return {
        "id": [all_ids[i] for i in listed],
        "kind": [kinds.index(graph.kind[i]) for i in listed],
        "layer": graph.layer[ids].tolist(),
        "position": graph.position[ids].tolist(),
        "index": graph.index[ids].tolist(),
        "activation": _short(graph.activation[ids]),
        "value": _short(graph.value[ids], 8),
        "probability": _short(graph.probability[ids], 6),
        "weight": graph_scores.weights(graph)[ids].tolist(),
        "influence": influence[ids].tolist(),
        "label": [_label(graph, i, first_logit, names) for i in listed],
        "outside_count": (outside != 0).sum(dim=1).tolist(),
        "outside_sum": _short(outside.sum(dim=1)),
        "outside_size": outside.abs().sum(dim=1).tolist(),
    }


def _paths(graph: Graph, ids: Tensor) -> list[dict[str, Any]]:
    """The strongest path from each of some tokens, by the places of its nodes on the page, where all of it is there."""
    place = {i: at for at, i in enumerate(ids.tolist())}
    found = [path for path in top_paths.strongest(graph, PATHS) if set(path.nodes) <= place.keys()]
    return [{"nodes": [place[i] for i in path.nodes], "strength": path.strength} for path in found]


def _label(graph: Graph, i: int, first_logit: int, names: Mapping[str, str]) -> str:
    match graph.kind[i]:
        case Kind.feature:
            return names.get(f"{int(graph.layer[i])}/{int(graph.index[i])}", "")
        case Kind.logit:
            return graph.labels[i - first_logit]
        case Kind.token:
            return graph.texts[int(graph.position[i])]
        case _:
            return ""


def _edges(edges: Tensor) -> dict[str, Any]:
    """Rows of what is not 0, target by target: how many, their sources (uint16) and weights (float32)."""
    there = edges != 0
    sources = there.nonzero()[:, 1].to(torch.int32).numpy().astype("<u2")
    weights = edges[there].float().numpy().astype("<f4")
    return {
        "counts": there.sum(dim=1).tolist(),
        "source": base64.b64encode(sources.tobytes()).decode(),
        "weight": base64.b64encode(weights.tobytes()).decode(),
    }


def _features(
    graph: Graph,
    ids: Tensor,
    influence: Tensor,
    read: FeatureData | None,
    strings: Strings,
    labels: Mapping[tuple[int, int], str],
) -> dict[str, dict[str, Any]]:
    """By "layer/index", of the features of these nodes that have data, the most influential first."""
    if read is None:
        return {}
    features = graph.of(Kind.feature)
    inner = ids[(ids >= features.start) & (ids < features.stop)]
    found: dict[str, dict[str, Any]] = {}
    tried = set()
    for i in inner[influence[inner].argsort(descending=True)].tolist():
        layer, index = int(graph.layer[i]), int(graph.index[i])
        if (layer, index) in tried:
            continue
        tried.add((layer, index))
        given = read(layer, index)
        if given is not None:
            found[f"{layer}/{index}"] = _feature(given, strings)
            name = labels.get((layer, index), "")
            mine = name and name != given.get("label")
            found[f"{layer}/{index}"]["label"] = name if mine else _named(given, 2 * layer >= graph.n_layers)
        if len(found) == MOST_FEATURES:
            break
    return found


def _feature(given: Mapping[str, Any], strings: Strings) -> dict[str, Any]:
    groups = given.get("examples_quantiles") or []
    return {
        "frequency": given.get("activation_frequency"),
        "range": [_number(given.get("act_min") or 0.0), _number(given.get("act_max") or 0.0)],
        "histogram": [int(count) for count in _binned(given.get("histogram") or [])],
        "norms": [_number(norm) for norm in given.get("decoder_norms") or []],
        "top": [strings(str(word)) for word in (given.get("top_logits") or [])[:8]],
        "bottom": [strings(str(word)) for word in (given.get("bottom_logits") or [])[:8]],
        "contexts": [
            (str(group["quantile_name"]), [_example(one, strings) for one in group["examples"][: CONTEXTS[at > 0]]])
            for at, group in enumerate(groups)
        ],
    }


def _example(example: Mapping[str, Any], strings: Strings) -> tuple[list[int], list[float]]:
    tokens, acts = example["tokens"], example["tokens_acts_list"]
    peak = max(range(len(acts)), key=acts.__getitem__, default=0)
    window = slice(max(0, peak - BEFORE), peak + AFTER + 1)
    return [strings(str(token)) for token in tokens[window]], [_number(act) for act in acts[window]]


def _named(given: Mapping[str, Any], with_output: bool) -> str:
    """Its label, or the token or two at which its top contexts peak; of later layers, what it raises most as well."""
    name = str(given.get("label") or ", ".join(feature_labels.top_tokens_of(given, 2)))
    output = str(next(iter(given.get("top_logits") or []), "")).strip()
    return f"{name} → {output}" if with_output and name and output else name


def _binned(counts: Sequence[float]) -> Sequence[float]:
    """At most BINS of them, neighbours added up."""
    width = math.ceil(len(counts) / BINS) if counts else 1
    return [sum(counts[at : at + width]) for at in range(0, len(counts), width)]


def _number(value: float) -> float:
    return float(f"{float(value):.4g}")


def _short(values: Tensor, digits: int = 5) -> list[float | None]:
    """To so many digits; None for NaN, which JSON does not have."""
    return [None if math.isnan(value) else float(f"{value:.{digits}g}") for value in values.tolist()]


def _key(graph: Graph, groups: Sequence[Sequence[str]]) -> str:
    """What browsers keep groups under: another one where the prompt, the run or the groups that are given differ."""
    said = json.dumps([str(graph.meta.get("run", "")), graph.texts, graph.n_nodes, groups])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
