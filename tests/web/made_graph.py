"""Attribution graphs and feature files from a seed, shaped like those of the built-in world."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline.interp.circuits.graph import Graph, Kind

FRANCE = ["<bos>", "The", " capital", " of", " France", " is"]
LONG = (
    (
        "<bos> Alice lives in the capital of France . She works as a doctor and she speaks French . "
        "Bob lives in Berlin . He gave Alice a book , so the book now belongs to someone who lives in"
    )
    .replace(" ", "| ")
    .split("|")
)


def make_graph(
    texts: Sequence[str] = FRANCE, per_cell: int = 5, n_layers: int = 4, n_logits: int = 5, seed: int = 0
) -> Graph:
    """Features at every position but the first, a few of them strong; every target reads some of what lies below."""
    draw = torch.Generator().manual_seed(seed)
    last, nodes = len(texts) - 1, []
    for layer in range(n_layers):
        for position in range(1, len(texts)):
            n = int(torch.randint(0, 2 * per_cell + 1, (1,), generator=draw))
            numbers = sorted(torch.randperm(2048, generator=draw)[:n].tolist())
            nodes += [(Kind.feature, layer, position, number) for number in numbers]
    nodes += [(Kind.error, l, p, -1) for l in range(n_layers) for p in range(1, len(texts))]
    nodes += [(Kind.token, -1, p, p) for p in range(len(texts))]
    nodes += [(Kind.position, -1, p, -1) for p in range(len(texts))]
    nodes += [(Kind.position_0, l, 0, -1) for l in range(n_layers)]
    nodes += [(Kind.rest, n_layers - 1, last, -1)]
    nodes += [(Kind.bias, l, -1, -1) for l in range(n_layers + 1)]
    labels = ([" Paris", " Berlin", " Brussels", " London", " Rome"] * n_logits)[:n_logits]
    nodes += [(Kind.logit, n_layers, last, number) for number in range(n_logits)]
    kind = [node[0] for node in nodes]
    layer, position, index = (torch.tensor([int(node[k]) for node in nodes]) for k in (1, 2, 3))
    is_feature = torch.tensor([one == Kind.feature for one in kind])
    is_logit = torch.tensor([one == Kind.logit for one in kind])
    n = len(nodes)
    activation = torch.rand(n, generator=draw).square() * 6 * is_feature
    edges = torch.randn(n, n, generator=draw) * torch.rand(n, n, generator=draw).pow(6)
    strength = torch.rand(n, generator=draw).pow(4) * 5 + 0.05
    strength[torch.tensor([one in (Kind.error, Kind.position, Kind.rest, Kind.position_0) for one in kind])] *= 0.15
    edges *= strength
    below = (layer[None, :] < layer[:, None]) | torch.tensor([one == Kind.bias for one in kind])[None, :]
    earlier = position[None, :] <= position[:, None]
    target = is_feature | is_logit
    edges *= (below & earlier & target[:, None] & ~is_logit[None, :]).float()
    edges[edges.abs() < 0.004] = 0
    value = edges.sum(dim=1)
    value[~target] = torch.nan
    probability = torch.zeros(n)
    probability[is_logit] = torch.softmax(torch.linspace(4, -2, n_logits), dim=0) * 0.97 if n_logits else 1.0
    return Graph(
        tokens=torch.arange(len(texts)),
        texts=list(texts),
        kind=kind,
        layer=layer,
        position=position,
        index=index,
        activation=activation,
        value=value,
        probability=probability,
        edges=edges,
        n_layers=n_layers,
        d_features=2048,
        n_active=int(is_feature.sum()),
        meta={"run": "demo", "model": "world", "labels": labels, "settings": {"max_feature_nodes": 4096}},
    )


WORDS = [" France", " Germany", " capital", " Paris", " Berlin", " the", " is", " lives", " of", " doctor", " French"]


def make_feature(layer: int, index: int) -> Mapping[str, Any] | None:
    """What `interp/dashboards/feature_files.py` reads; None for every ninth feature."""
    if index % 9 == 0:
        return None
    draw = torch.Generator().manual_seed(layer * 10_000 + index)
    word = WORDS[index % len(WORDS)]
    examples = []
    for _ in range(6):
        tokens = [WORDS[i] for i in torch.randint(0, len(WORDS), (24,), generator=draw).tolist()]
        at = int(torch.randint(4, 20, (1,), generator=draw))
        acts = [0.0] * 24
        tokens[at], acts[at], acts[at + 1] = word, 4.5, 1.25
        examples.append({"tokens": tokens, "tokens_acts_list": acts, "train_token_ind": at})
    return {
        "examples_quantiles": [
            {"quantile_name": "Top activations", "examples": examples},
            {"quantile_name": "Quantile 4", "examples": examples[:3]},
        ],
        "top_logits": [" Paris", " Lyon", " France"],
        "bottom_logits": [" Berlin", " the"],
        "act_min": 0.01,
        "act_max": 5.0,
        "histogram": torch.randint(0, 500, (50,), generator=draw).tolist(),
        "activation_frequency": 0.0125,
    }
