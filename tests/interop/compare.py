"""Our graph of a case against what `trace_reference.py` wrote of circuit-tracer's."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data import models
from pipeline.data.options import ModelOptions
from pipeline.interp.circuits import attribution, graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.replacement import ReplacementModel
from pipeline.train import artifact


class Reference(NamedTuple):
    """circuit-tracer's, in its order of nodes: features, errors of each layer and position, tokens, logits."""

    features: Tensor
    """int64 [n, 3]: layer, position, index"""
    activations: Tensor
    edges: Tensor
    """[N, N]"""
    logits: list[int]
    probabilities: Tensor
    replacement: float
    completeness: float
    kept_nodes: Tensor
    kept_edges: Tensor
    n_tokens: int
    n_layers: int


def read(place: Path) -> Reference:
    with np.load(place / "reference.npz") as file:
        found: dict[str, Any] = {name: file[name] for name in file.files}
    n_tokens = len(json.loads((place / "prompt.json").read_text())["tokens"])
    features = torch.from_numpy(found["features"])[torch.from_numpy(found["selected"])]
    n_errors = len(found["adjacency"]) - len(features) - n_tokens - len(found["logit_tokens"])
    return Reference(
        features,
        torch.from_numpy(found["activations"])[torch.from_numpy(found["selected"])],
        torch.from_numpy(found["adjacency"]),
        found["logit_tokens"].tolist(),
        torch.from_numpy(found["logit_probabilities"]),
        *map(float, found["scores"]),
        torch.from_numpy(found["kept_nodes"]),
        torch.from_numpy(found["kept_edges"]),
        n_tokens,
        n_errors // n_tokens,
    )


def opened(place: Path) -> tuple[ReplacementModel, Tensor]:
    """The case's replacement model, and its prompt [1, T]."""
    prompt = json.loads((place / "prompt.json").read_text())
    lm = models.load(ModelOptions(name="tiny", path=prompt["model"], device="cpu"))
    trained = artifact.read(place / "run")
    return ReplacementModel(lm, trained.transcoder, trained.site), torch.tensor([prompt["tokens"]])


def ours(place: Path, options: GraphOptions | None = None) -> Graph:
    """All that circuit-tracer has a node for, and no more."""
    return graph_scores.reference(attribution.trace(*opened(place), options or GraphOptions()))


def places(graph: Graph, reference: Reference) -> Tensor:
    """Where each of our nodes stands among circuit-tracer's. int64 [n]"""
    n, T = len(reference.features), reference.n_tokens
    features = {tuple(row): i for i, row in enumerate(reference.features.tolist())}
    logits = {token: i for i, token in enumerate(reference.logits)}
    found = []
    for kind, layer, position, index in zip(
        graph.kind, graph.layer.tolist(), graph.position.tolist(), graph.index.tolist(), strict=True
    ):
        match kind:
            case Kind.feature:
                found.append(features[layer, position, index])
            case Kind.error:
                found.append(n + layer * T + position)
            case Kind.token:
                found.append(n + reference.n_layers * T + position)
            case _:
                found.append(n + (reference.n_layers + 1) * T + logits[index])
    return torch.tensor(found)
