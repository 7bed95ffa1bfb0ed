from dataclasses import replace

import pytest
import torch

from pipeline.errors import UserError
from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.recurring import as_plain, recurring
from tests.interp.graphs import random_graph


def of_run(graph: Graph, run: str = "runs/demo") -> Graph:
    return replace(graph, meta={**graph.meta, "run": run})


def graphs() -> list[Graph]:
    return [of_run(random_graph(seed, features=25 + seed)) for seed in range(4)]


def test_features_are_counted_once_a_graph_and_averaged_over_the_graphs_that_have_them() -> None:
    found = recurring(graphs(), least=1, nodes=0.9)
    seen: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for graph in graphs():
        pruned, influence = graph_scores.prune(graph, 0.9), graph_scores.influence(graph)
        for layer in range(3):
            for index in range(11):
                nodes = [
                    i
                    for i in range(*graph.of(Kind.feature).indices(graph.n_nodes))
                    if pruned.nodes[i] and (int(graph.layer[i]), int(graph.index[i])) == (layer, index)
                ]
                if nodes:
                    part = sum(float(influence[i]) for i in nodes) / float(influence.sum())
                    seen.setdefault((layer, index), []).append((max(float(graph.activation[i]) for i in nodes), part))
    assert max(map(len, seen.values())) > 1
    assert {(row.layer, row.feature) for row in found.features} == set(seen)
    for row in found.features:
        own = seen[row.layer, row.feature]
        assert (row.graphs, row.share) == (len(own), len(own) / 4)
        assert row.activation == pytest.approx(sum(a for a, _ in own) / len(own))
        assert row.influence == pytest.approx(sum(i for _, i in own) / len(own))
    assert [row.graphs for row in found.features] == sorted((row.graphs for row in found.features), reverse=True)


def test_edges_are_summed_within_a_graph_and_averaged_over_graphs() -> None:
    found = recurring(graphs(), least=1)
    seen: dict[tuple[tuple[int, int], tuple[int, int] | None], list[float]] = {}
    for graph in graphs():
        pruned, sums = graph_scores.prune(graph), {}
        for target, source in pruned.pairs().tolist():
            if graph.kind[source] != Kind.feature or target == graph.n_nodes - 1:
                continue
            ends = [(int(graph.layer[i]), int(graph.index[i])) for i in (source, target)]
            pair = (ends[0], None if graph.kind[target] == Kind.logit else ends[1])
            sums[pair] = sums.get(pair, 0.0) + float(graph.edges[target, source])
        for pair, weight in sums.items():
            seen.setdefault(pair, []).append(weight)
    assert {(row.source, row.target) for row in found.edges} == set(seen)
    assert any(row.target is None and row.graphs > 1 for row in found.edges)
    for row in found.edges:
        own = seen[row.source, row.target]
        assert (row.graphs, row.share) == (len(own), len(own) / 4)
        assert row.weight == pytest.approx(sum(own) / len(own))
        assert row.positive == sum(weight > 0 for weight in own) / len(own)


def test_what_is_in_fewer_graphs_than_asked_for_is_left_out() -> None:
    found = recurring(graphs(), least=3)
    every = recurring(graphs(), least=1)
    assert found.features == [row for row in every.features if row.graphs >= 3]
    assert found.edges == [row for row in every.edges if row.graphs >= 3]
    assert len(every.edges) > len(found.edges) > 0


def test_one_graph_twice_recurs_entirely() -> None:
    graph = graphs()[0]
    found = recurring([graph, graph])
    assert {row.share for row in [*found.features, *found.edges]} == {1.0}
    plain = as_plain(found)
    assert plain["n_graphs"] == 2
    first = found.features[0]
    assert plain["features"][0] == {
        "feature": f"{first.layer}/{first.feature}", "graphs": 2, "share": 1.0,
        "activation": first.activation, "influence": first.influence,
    }  # fmt: skip
    assert {"output"} < {edge["target"] for edge in plain["edges"]}


def test_graphs_of_several_runs_are_refused() -> None:
    one, two = random_graph(0), random_graph(1)
    with pytest.raises(UserError, match="of the runs a and b, whose features differ; give those of one run"):
        recurring([of_run(one, "a"), of_run(two, "b")])


def test_no_graph_and_graphs_without_features_have_nothing_that_recurs() -> None:
    assert recurring([]) == (0, [], [])
    empty = of_run(random_graph(features=0))
    torch.testing.assert_close(empty.edges, random_graph(features=0).edges)
    assert recurring([empty, empty]) == (2, [], [])
