from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_scores import prune, reference, scores
from tests.interp.graphs import random_graph


def slow_influence(graph: Graph) -> tuple[Tensor, Tensor]:
    """(N, I) of the formulas: I = w ((1 - N)^-1 - 1), float64."""
    size = graph.edges.double().abs()
    N = torch.stack([row / row.sum() if row.any() else row for row in size])
    one = torch.eye(len(N), dtype=torch.float64)
    return N, graph.probability.double() @ (torch.linalg.inv(one - N) - one)


def slow_scores(graph: Graph) -> tuple[float, float, float]:
    N, influence = slow_influence(graph)
    w = graph.probability.double()
    of = {kind: [i for i, k in enumerate(graph.kind) if k == kind] for kind in Kind}
    tokens, errors = sum(influence[i] for i in of[Kind.token]), sum(influence[i] for i in of[Kind.error])
    total, explained, inner, inner_explained = 0.0, 0.0, 0.0, 0.0
    for i in range(len(w)):
        reached = float(influence[i] + w[i])
        share = 1 - sum(float(N[i, e]) for e in of[Kind.error])
        total, explained = total + reached, explained + share * reached
        if N[i].any():
            inner, inner_explained = inner + reached, inner_explained + share * reached
    return float(tokens / (tokens + errors)), explained / total, inner_explained / inner


def slow_prune(graph: Graph, node_share: float, edge_share: float) -> tuple[set[int], set[tuple[int, int]]]:
    """The steps at the top of graph_scores.py, one node and one edge at a time."""
    _, influence = slow_influence(graph)
    n = graph.n_nodes
    always = {i for i in range(n) if graph.kind[i] in (Kind.token, Kind.logit)}
    nodes = always | most([(float(influence[i]), i) for i in range(n)], node_share)
    A = graph.edges.double().clone()
    for i in set(range(n)) - nodes:
        A[i], A[:, i] = 0, 0
    size = A.abs()
    N = torch.stack([row / row.sum() if row.any() else row for row in size])
    one = torch.eye(n, dtype=torch.float64)
    w = graph.probability.double()
    reached = w @ torch.linalg.inv(one - N)
    pairs = [(float(N[t, s] * reached[t]), (t, s)) for t in range(n) for s in range(n)]
    edges = most(pairs, edge_share)
    while True:
        edges = {(t, s) for t, s in edges if t in nodes and s in nodes}
        fed, feeding = {t for t, _ in edges}, {s for _, s in edges}
        gone = {i for i in nodes - always if i not in feeding or (graph.kind[i] == Kind.feature and i not in fed)}
        if not gone:
            return nodes, edges
        nodes = nodes - gone


def most(pairs: list[tuple[float, Any]], share: float) -> set[Any]:
    """The largest that reach a share of the sum together."""
    total, so_far = sum(value for value, _ in pairs), 0.0
    found: set[Any] = set()
    for value, name in sorted(pairs, key=lambda pair: -pair[0]):
        if so_far >= share * total or value == 0:
            break
        so_far += value
        found.add(name)
    return found


@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_influence_is_the_whole_sum_of_powers(seed: int, extras: bool) -> None:
    graph = random_graph(seed, extras=extras)
    N, expected = slow_influence(graph)
    torch.testing.assert_close(graph_scores.influence(graph), expected, rtol=0, atol=1e-12)
    power, total = N, torch.zeros_like(N)
    for _ in range(graph.n_layers + 1):
        total, power = total + power, power @ N
    assert not power.any(), "no path has more than n_layers + 1 edges"
    torch.testing.assert_close(graph.probability @ total, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_formulas_on_all_nodes_and_on_the_references(seed: int) -> None:
    graph = random_graph(seed)
    assert tuple(scores(graph)) == pytest.approx(slow_scores(graph), abs=1e-12)
    small = reference(graph)
    assert {*small.kind} == {Kind.feature, Kind.error, Kind.token, Kind.logit}
    assert tuple(scores(small)) == pytest.approx(slow_scores(small), abs=1e-12)
    assert scores(small).replacement != pytest.approx(scores(graph).replacement, abs=1e-3)
    report = graph_scores.report(graph)
    assert report["circuit_tracer"]["completeness"] == scores(small).completeness
    assert report["all_nodes"]["replacement"] == scores(graph).replacement


def test_a_graph_of_pure_error_is_half_complete_and_not_at_all_without_leaves() -> None:
    graph = random_graph(features=0, extras=False, n_tokens=3, probability=(1.0,))
    graph.edges[:, graph.of(Kind.token)] = 0
    assert tuple(scores(graph)) == pytest.approx((0, 0.5, 0), abs=1e-12)


def test_a_graph_of_tokens_alone_is_explained_entirely() -> None:
    graph = random_graph(features=0, extras=False, errors=False)
    assert tuple(scores(graph)) == pytest.approx((1, 1, 1))
    pruned = prune(graph)
    assert pruned.nodes.all()
    assert not pruned.edges[:-2].any()
    assert pruned.edges[-2:].any()


def test_where_nothing_reaches_the_logits_there_are_no_scores_and_no_edges() -> None:
    graph = random_graph(features=2)
    graph.edges.zero_()
    assert scores(graph) == (None, 1.0, None)
    pruned = prune(graph)
    kept = {kind for kind, keep in zip(graph.kind, pruned.nodes.tolist(), strict=True) if keep}
    assert kept == {Kind.token, Kind.logit}
    assert not pruned.edges.any()


def test_targets_without_a_probability_weigh_the_same() -> None:
    graph = random_graph(probability=(0.0, 0.0))
    assert graph_scores.weights(graph)[-2:].tolist() == [0.5, 0.5]
    halves = random_graph(probability=(0.5, 0.5))
    torch.testing.assert_close(graph_scores.influence(graph), graph_scores.influence(halves))


@pytest.mark.parametrize("shares", [(0.8, 0.98), (0.5, 0.7), (0.95, 0.4), (1.0, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_pruning_keeps_what_the_steps_keep_one_by_one(seed: int, shares: tuple[float, float]) -> None:
    graph = random_graph(seed, features=14)
    nodes, edges = slow_prune(graph, *shares)
    pruned = prune(graph, *shares)
    assert set(pruned.nodes.nonzero().flatten().tolist()) == nodes
    assert {(t, s) for t, s in pruned.pairs().tolist()} == edges


def test_what_is_fed_by_a_removed_feature_alone_goes_with_it() -> None:
    """t0 and t1 -> f0 -> f1 -> logit: the two weak edges into f0 are cut, so f0 goes, so f1 goes."""
    graph = random_graph(features=0, extras=False, errors=False, n_tokens=2, probability=(1.0,))
    edges = torch.zeros(5, 5, dtype=torch.float64)
    edges[0, 2], edges[0, 3], edges[1, 0], edges[4, 1], edges[4, 2] = 1, 1, 1, 0.06, 0.94
    chain = replace(
        graph,
        kind=[Kind.feature, Kind.feature, *graph.kind],
        layer=torch.tensor([0, 1, -1, -1, 3]),
        position=torch.tensor([1, 1, 0, 1, 1]),
        index=torch.tensor([3, 4, 20, 21, 30]),
        activation=torch.tensor([1.0, 1, 0, 0, 0]),
        value=edges.sum(dim=1),
        probability=torch.tensor([0, 0, 0, 0, 1.0]),
        edges=edges,
    )
    # Edge scores: .94, .06, .06, .03, .03, of 1.12 in all.
    assert prune(chain, nodes=1, edges=0.97).nodes.all()
    pruned = prune(chain, nodes=1, edges=0.94)
    assert pruned.nodes.tolist() == [False, False, True, True, True]
    assert pruned.pairs().tolist() == [[4, 2]]


def test_the_cumulative_share_is_small_for_the_most_influential_node() -> None:
    graph = random_graph(seed=2)
    influence = graph_scores.influence(graph)
    cumulative = prune(graph).cumulative
    order = influence.argsort(descending=True, stable=True)
    torch.testing.assert_close(cumulative[order], influence[order].cumsum(0) / influence.sum())
    assert cumulative[order[0]] == cumulative.min()
    assert (cumulative[graph.of(Kind.logit)] == 1).all()


def test_float32_edges_are_scored_as_their_doubles() -> None:
    single = random_graph(seed=3, dtype=torch.float32)
    double = random_graph(seed=3)
    assert tuple(scores(single)) == pytest.approx(tuple(scores(double)), abs=1e-6)


def test_a_subgraph_keeps_the_labels_of_its_logits() -> None:
    graph = random_graph(probability=(0.5, 0.3, 0.1))
    kept = torch.ones(graph.n_nodes, dtype=torch.bool)
    kept[-2] = False
    assert graph_scores.subgraph(graph, kept).labels == [" out0", " out2"]


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"share of 1\.2 of its edges; give one from 0 to 1"):
        prune(random_graph(), edges=1.2)
