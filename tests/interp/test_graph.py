import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interp.circuits import graph as graphs
from pipeline.interp.circuits.graph import Graph, Kind


def made() -> Graph:
    """Two features, an error, two tokens, a bias and a logit."""
    kind = [Kind.feature, Kind.feature, Kind.error, Kind.token, Kind.token, Kind.bias, Kind.logit]
    edges = torch.zeros(7, 7)
    edges[0, 3:6] = torch.tensor([1.0, -0.25, 0.5])
    edges[1, [0, 4]] = torch.tensor([2.0, 0.5])
    edges[6, :6] = torch.tensor([0.5, 0.25, -1.0, 0.0, 2.0, 0.125])
    value = edges.sum(dim=1)
    value[2:6] = torch.nan
    return Graph(
        tokens=torch.tensor([0, 9]),
        texts=["<bos>", " Paris"],
        kind=kind,
        layer=torch.tensor([0, 1, 1, -1, -1, 0, 2]),
        position=torch.tensor([1, 1, 1, 0, 1, -1, 1]),
        index=torch.tensor([4, 2, -1, 0, 9, -1, 7]),
        activation=torch.tensor([1.25, 2.5, 0, 0, 0, 0, 0]),
        value=value,
        probability=torch.tensor([0, 0, 0, 0, 0, 0, 0.75]),
        edges=edges,
        n_layers=2,
        d_features=5,
        n_active=3,
        meta={"labels": [" Paris"], "settings": {"max_logits": 10}},
    )


def test_a_graph_survives_its_file(tmp_path: Path) -> None:
    graph = made()
    file = graphs.save(graph, tmp_path / "graphs" / "a.safetensors")
    found = graphs.load(file)
    for field in fields(graph):
        one, other = getattr(graph, field.name), getattr(found, field.name)
        same = torch.equal(one.nan_to_num(-7), other.nan_to_num(-7)) if isinstance(one, Tensor) else one == other
        assert same, field.name
    assert [path.name for path in file.parent.iterdir()] == ["a.safetensors"]
    assert isinstance(found.kind[0], Kind)


def test_targets_are_features_and_logits_and_kinds_have_their_places() -> None:
    graph = made()
    assert graph.targets.tolist() == [0, 1, 6]
    assert graph.of(Kind.token) == slice(3, 5)
    assert graph.of(Kind.position) == slice(0, 0)
    assert graph.labels == [" Paris"]


def test_imbalance_is_what_the_sources_miss_of_the_value() -> None:
    graph = made()
    assert graph.imbalance().tolist() == [0, 0, 0]
    graph.value[1] += 0.5
    assert graph.imbalance().tolist() == pytest.approx([0, 0.2, 0])


def test_nodes_out_of_order_are_refused() -> None:
    graph = made()
    with pytest.raises(AssertionError, match="order"):
        Graph(**{field.name: getattr(graph, field.name) for field in fields(graph)} | {"kind": graph.kind[::-1]})


@pytest.mark.parametrize("what", ["missing", "text", "other", "schema"])
def test_what_is_no_graph_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    file = tmp_path / "a.safetensors"
    if what == "text":
        file.write_text("hello")
    elif what == "other":
        save_file({"x": torch.zeros(2)}, file)
    elif what == "schema":
        save_file({"x": torch.zeros(2)}, file, metadata={"graph": json.dumps({"schema": 99})})
    with pytest.raises(UserError, match="; "):
        graphs.load(file)
