"""A pruned graph as JSON, which Neuronpedia's schema allows and circuit-tracer's front end draws.

    SLUG.json             {"metadata", "qParams", "nodes", "links"}
    graph-metadata.json   {"graphs": the metadata of every graph in the folder}

What a node is called (l layer, p position, T tokens, L layers, F features of a layer):

    kind        node_id         feature_type                feature         layer   ctx_idx
    feature     l_index_p       cross layer transcoder      cantor(l, index)  l     p
    error       l_F_p           mlp reconstruction error    -1              l       p
    token       E_id_p          embedding                   p               E       p
    position    0_(F+1)_p       position embedding          -2              E       p
    position_0  l_(F+2)_0       mlp output at position 0    -3              l       0
    rest        l_(F+3)_p       features left out           -4              l       p
    bias        l_(F+4)_0       bias                        -5              l       0
    logit       (L+1)_id_(T-1)  logit                       id              L+1     T-1

circuit-tracer itself calls an error 0_l_p, which is also its name for feature l of layer 0. Here no two nodes share an
id, and all but tokens' are still three whole numbers, which is what its `decode_url_features` reads: numbers from F on
name no feature. A logit node that is no single token has the first ids that no token of the graph has.

A link's weight is the edge itself, signed, in the target's units. A node's `influence` is the share of all influence
that it and the nodes before it have: small is important, and the front end's slider cuts there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.files import take_lock, write_aside
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_scores import Pruned

SCAN = "./data/features"
"""Where circuit-tracer's local server finds a feature's examples: features/CANTOR.json beside the graphs."""

METADATA = "graph-metadata.json"

TYPES = {
    Kind.feature: "cross layer transcoder",
    Kind.error: "mlp reconstruction error",
    Kind.token: "embedding",
    Kind.position: "position embedding",
    Kind.position_0: "mlp output at position 0",
    Kind.rest: "features left out",
    Kind.bias: "bias",
    Kind.logit: "logit",
}

AFTER_FEATURES = (Kind.error, Kind.position, Kind.position_0, Kind.rest, Kind.bias)
"""Kinds whose nodes have numbers from F on in the place of a feature's, in this order."""

CLERPS = {
    Kind.position: "Position {position}",
    Kind.position_0: "MLP at position 0, layer {layer}",
    Kind.rest: "Features left out, layer {layer}",
    Kind.bias: "Biases, layer {layer}",
}
"""What such a node is labelled; the front end labels errors and tokens itself."""


class Supernode(NamedTuple):
    """A group of nodes with a label, as the front end knows it."""

    label: str
    nodes: tuple[str, ...]
    """node_id of each member."""


def cantor(layer: int, index: int) -> int:
    """One whole number for a layer and a feature of it: the name of its file of examples."""
    return (layer + index) * (layer + index + 1) // 2 + index


def node_ids(graph: Graph) -> list[str]:
    """The node_id of each node. [n]"""
    tokens = _token_numbers(graph)
    return [_node_id(graph, i, tokens) for i in range(graph.n_nodes)]


def document(
    graph: Graph,
    pruned: Pruned,
    slug: str,
    scan: str = SCAN,
    labels: Mapping[tuple[int, int], str] | None = None,
    supernodes: Sequence[Supernode] = (),
    info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON of a pruned graph. labels: of features that have one, by (layer, index). supernodes: groups of its
    nodes, of which pruned members are left out. info: what else the metadata should say of the graph.

    For circuit-tracer's nodes alone give `graph_scores.reference(graph)`, pruned by itself."""
    ids, tokens = node_ids(graph), _token_numbers(graph)
    pairs = pruned.pairs()
    weights = graph.edges[pairs[:, 0], pairs[:, 1]].tolist()
    links = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for (target, source), weight in zip(pairs.tolist(), weights, strict=True)
    ]
    kept = pruned.nodes.nonzero().flatten().tolist()
    nodes = [_node(graph, i, ids[i], tokens, float(pruned.cumulative[i]), labels or {}) for i in kept]
    shown = {ids[i] for i in kept}
    groups = [[group.label, *(node for node in group.nodes if node in shown)] for group in supernodes]
    groups = [group for group in groups if len(group) > 1]
    pinned = [node for group in groups for node in group[1:]]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": graph.texts,
            "prompt": graph.meta["prompt"],
            "node_threshold": pruned.nodes_share,
            "schema_version": 1,
            "info": {"generator": {"name": "clt", "version": __version__}, **(info or {})},
            "pruning_settings": {"node_threshold": pruned.nodes_share, "edge_threshold": pruned.edges_share},
        },
        # The front end draws groups of pinned nodes only.
        "qParams": {"pinnedIds": pinned, "supernodes": groups, "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }


def write(directory: Path, found: dict[str, Any]) -> Path:
    """Write a `document` to directory/SLUG.json and note it in graph-metadata.json, in place of one of the same slug.
    -> the file. UserError where graph-metadata.json is something else."""
    slug = found["metadata"]["slug"]
    directory.mkdir(parents=True, exist_ok=True)
    listed = known(directory)
    file = directory / f"{slug}.json"
    write_aside(file, json.dumps(found, indent=1, allow_nan=False).encode())
    lock = take_lock(directory, METADATA, name=f".{METADATA}.lock", wait=f"{directory / METADATA} is being written")
    with open(lock, "wb"):  # closing it releases the lock
        listed = [graph for graph in known(directory) if graph["slug"] != slug] + [found["metadata"]]
        write_aside(directory / METADATA, json.dumps({"graphs": listed}, indent=1, allow_nan=False).encode())
    return file


def known(directory: Path) -> list[dict[str, Any]]:
    """The metadata of the graphs in a folder. UserError for a file of that name that says something else."""
    file = directory / METADATA
    if not file.exists():
        return []
    try:
        graphs = json.loads(file.read_text())["graphs"]
        [graph["slug"] for graph in graphs]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file} does not hold {{"graphs": [...]}}; move it away and run again') from error
    found: list[dict[str, Any]] = graphs
    return found


def _token_numbers(graph: Graph) -> dict[int, int]:
    """The number of each logit node: its token, or one that no token of the graph has."""
    logits = range(*graph.of(Kind.logit).indices(graph.n_nodes))
    free = 1 + max([0, *graph.tokens.tolist(), *graph.index[graph.of(Kind.logit)].tolist()])
    found: dict[int, int] = {}
    for i in logits:
        number = int(graph.index[i])
        if number < 0 or number in found.values():
            number, free = free, free + 1
        found[i] = number
    return found


def _node_id(graph: Graph, i: int, tokens: Mapping[int, int]) -> str:
    kind, layer, position = graph.kind[i], int(graph.layer[i]), int(graph.position[i])
    if kind == Kind.token:
        return f"E_{int(graph.index[i])}_{position}"
    if kind == Kind.logit:
        return f"{graph.n_layers + 1}_{tokens[i]}_{position}"
    index = int(graph.index[i]) if kind == Kind.feature else graph.d_features + AFTER_FEATURES.index(kind)
    return f"{max(layer, 0)}_{index}_{max(position, 0)}"


def _node(
    graph: Graph,
    i: int,
    node_id: str,
    tokens: Mapping[int, int],
    cumulative: float,
    labels: Mapping[tuple[int, int], str],
) -> dict[str, Any]:
    kind, layer, position = graph.kind[i], int(graph.layer[i]), int(graph.position[i])
    first, second, third = node_id.split("_")
    own: dict[str, Any] = {}
    if kind == Kind.feature:
        index = int(graph.index[i])
        own = {
            "feature": cantor(layer, index),
            "clerp": labels.get((layer, index), ""),
            "activation": float(graph.activation[i]),
        }
    elif kind == Kind.token:
        own = {"feature": position, "jsNodeId": f"E_{second}-{position}"}
    elif kind == Kind.logit:
        rank = i - graph.of(Kind.logit).start
        probability = float(graph.probability[i])
        own = {
            "feature": tokens[i],
            "jsNodeId": f"L_{second}-{position}",
            "token_prob": probability,
            "is_target_logit": rank == 0,
            "influence": None,
            "clerp": f'Output "{graph.labels[rank]}" (p={probability:.3f})',
        }
    else:
        clerp = CLERPS.get(kind, "").format(layer=layer, position=position)
        own = {"feature": -1 - AFTER_FEATURES.index(kind), "clerp": clerp, "jsNodeId": f"{first}_{second}-{third}"}
    return {
        "node_id": node_id,
        "feature": None,
        "layer": "E" if kind in (Kind.token, Kind.position) else first,
        "ctx_idx": max(position, 0),
        "feature_type": TYPES[kind],
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{first}_{second}-0",
        "clerp": "",
        "influence": cumulative,
        "activation": None,
    } | own
