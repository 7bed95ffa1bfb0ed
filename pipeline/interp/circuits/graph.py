"""An attribution graph: what made a prompt's features and logits, as numbers that add up.

Nodes are sources, targets or both. `edges[target, source]` is the exact linear effect of the source on the target, in
the target's units, in the model whose attention patterns and norm denominators are held (`attribution.py`). For
each target, a feature or a logit, the sources sum to its value:

    edges[t].sum() == value[t]

What the kinds of nodes are:

    feature     an active feature at a position: the target is its pre-activation, the source what it writes
    error       what the transcoder misses of an MLP's output at a position
    token       the embedding of a token
    position    the embedding of a position, where the model has such
    position_0  an MLP's own output at position 0, where features are not traced
    rest        the features of a layer and position that a limit on the number of feature nodes cut
    bias        every bias that belongs to a layer, encoder and decoder biases of the transcoder included
    logit       a target beyond the features: a demeaned logit, a difference of two, or a feature

One file holds a graph (`save`, `load`): safetensors, with what is no tensor as JSON among its metadata.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import write_aside

SCHEMA = 1


class Kind(StrEnum):
    """In the order of the nodes of a graph."""

    feature = "feature"
    error = "error"
    token = "token"
    position = "position"
    position_0 = "position_0"
    rest = "rest"
    bias = "bias"
    logit = "logit"


@dataclass
class Graph:
    """n nodes: all features by (layer, position, index), then the other kinds in the order of `Kind`."""

    tokens: Tensor
    """int64 [T], the ids of the prompt, the token that begins a context included."""
    texts: list[str]
    """Of each token."""
    kind: list[Kind]
    """[n]"""
    layer: Tensor
    """int64 [n], from 0 at the first layer that is read. bias: the layer that it belongs to, n_layers for the final
    norm and the unembedding. token, position: -1. logit: n_layers."""
    position: Tensor
    """int64 [n]. bias: -1. logit: T - 1."""
    index: Tensor
    """int64 [n]: a feature's number, the id of a token (token and logit nodes); -1 else."""
    activation: Tensor
    """[n]: of a feature; 0 else."""
    value: Tensor
    """[n]: of a target. A feature's pre-activation, a logit before its softcap minus the mean of all; NaN else."""
    probability: Tensor
    """[n]: of a logit node, in the model; 0 else. The weights of influence."""
    edges: Tensor
    """[n, n] of float32 or float64: edges[target, source]. Rows of nodes that are no targets are 0."""
    n_layers: int
    d_features: int
    """Features of a layer."""
    n_active: int
    """Active features of the prompt, those that a limit cut included."""
    meta: dict[str, Any]
    """What JSON can hold: run, model, prompt, settings, seconds, and `labels`, the text of each logit node: a token,
    "A - B" for a difference, "layer/index@position" for a feature."""

    def __post_init__(self) -> None:
        n, n_tokens = len(self.kind), len(self.texts)
        assert self.tokens.shape == (n_tokens,)
        assert self.edges.shape == (n, n)
        order = [list(Kind).index(kind) for kind in self.kind]
        assert order == sorted(order), "nodes stand in the order of their kinds"
        for name in ("layer", "position", "index", "activation", "value", "probability"):
            assert getattr(self, name).shape == (n,), name

    @property
    def n_nodes(self) -> int:
        return len(self.kind)

    def of(self, kind: Kind) -> slice:
        """Where the nodes of a kind stand."""
        first = self.kind.index(kind) if kind in self.kind else 0
        return slice(first, first + self.kind.count(kind))

    @property
    def targets(self) -> Tensor:
        """int64 [m]: the nodes that have inputs, features and then logits."""
        return torch.tensor([i for i, kind in enumerate(self.kind) if kind in (Kind.feature, Kind.logit)]).long()

    @property
    def labels(self) -> list[str]:
        """Of each logit node."""
        labels: list[str] = self.meta["labels"]
        return labels

    def imbalance(self) -> Tensor:
        """|sum of its sources - value| / sum of |sources| for each target, in their order: 0 but for rounding. [m]"""
        rows = self.edges[self.targets]
        gap = (rows.sum(dim=1) - self.value[self.targets]).abs()
        return gap / rows.abs().sum(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)


def save(graph: Graph, file: Path) -> Path:
    """Write a graph to one file, which is there whole or not at all."""
    tensors = {name: value.contiguous().cpu() for name, value in _tensors(graph)}
    texts = {field.name: getattr(graph, field.name) for field in fields(graph) if field.name not in tensors}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, to_bytes(tensors, metadata={"graph": json.dumps({"schema": SCHEMA, **texts})}))
    return file


def load(file: Path) -> Graph:
    """Read a graph. UserError for a file that is not there, holds no graph or one of another schema."""
    if not file.is_file():
        raise UserError(f"{file}: there is no such graph; make one with clt graph")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise UserError(f"{file} is no safetensors file ({error}); make the graph again with clt graph") from error
    if "graph" not in metadata:
        raise UserError(f"{file} holds no graph; give a .safetensors file that clt graph wrote")
    texts = json.loads(metadata["graph"])
    if (schema := texts.pop("schema")) != SCHEMA:
        raise UserError(f"{file} has schema {schema}, this version reads {SCHEMA}; make the graph again with clt graph")
    return Graph(**texts | tensors | {"kind": [Kind(kind) for kind in texts["kind"]]})


def _tensors(graph: Graph) -> Iterator[tuple[str, Tensor]]:
    for field in fields(graph):
        value = getattr(graph, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
