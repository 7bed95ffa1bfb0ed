import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.arch.table import build
from pipeline.core.activations import FixedThreshold
from pipeline.errors import UserError
from pipeline.interp.circuits import supernodes
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode, node_ids
from pipeline.interp.circuits.graph_scores import Pruned, prune
from pipeline.interp.circuits.supernodes import grouped, kept_or_made, labelled, load, merged, save
from tests.interp.graphs import D_FEATURES, N_LAYERS, random_graph


def everything(graph: Graph) -> Pruned:
    return prune(graph, 1, 1)


def ids(graph: Graph, *nodes: int) -> tuple[str, ...]:
    names = node_ids(graph)
    return tuple(names[i] for i in nodes)


def twins() -> Graph:
    """Features 0 and 1 read and write alike at one position, 2 and 3 at another; 4 is like nothing else."""
    graph = random_graph(seed=3, features=5, extras=False, errors=False)
    edges = torch.zeros_like(graph.edges)
    t0, out0, out1 = graph.of(Kind.token).start, graph.n_nodes - 2, graph.n_nodes - 1
    for i, (a, b, c) in enumerate([(1, 2, 0), (1.1, 2, 0), (-3, 0.5, 1), (-3, 0.4, 1), (0, -1, 5)]):
        edges[i, t0 : t0 + 3] = torch.tensor([a, b, c], dtype=edges.dtype)
    edges[out0, :5] = torch.tensor([2, 2.2, 0, 0, 0.3], dtype=edges.dtype)
    edges[out1, :5] = torch.tensor([0, 0, -1, -1.3, 2.0], dtype=edges.dtype)
    return replace(
        graph,
        layer=torch.cat([torch.tensor([0, 1, 0, 1, 0]), graph.layer[5:]]),
        position=torch.cat([torch.tensor([2, 2, 1, 1, 3]), graph.position[5:]]),
        index=torch.cat([torch.tensor([1, 2, 3, 4, 5]), graph.index[5:]]),
        edges=edges,
        value=torch.where(graph.value.isnan(), torch.nan, edges.sum(dim=1)),
    )


def test_features_with_the_same_inputs_and_outputs_are_grouped() -> None:
    graph = twins()
    assert sorted(map(sorted, supernodes.find(graph, everything(graph)))) == [[0, 1], [2, 3]]


def test_features_far_apart_are_not_grouped_however_alike() -> None:
    graph = twins()
    graph.position[1] = 0
    assert supernodes.find(graph, everything(graph)) == [[2, 3]] or supernodes.find(graph, everything(graph)) == [
        [3, 2]
    ]
    assert len(supernodes.find(graph, everything(graph), near=2)) == 2


def test_the_likeness_of_edges_is_the_mean_of_two_cosines() -> None:
    graph = random_graph(seed=2, features=7)
    pruned = prune(graph, 1, 0.9)
    found = supernodes.of_edges(graph, pruned, torch.arange(7))
    kept = graph.edges * pruned.edges
    for i in range(7):
        for j in range(7):
            rows = kept[i] @ kept[j] / (kept[i].norm() * kept[j].norm()).clamp(min=1e-30)
            sizes = [kept[t].abs().sum() for t in range(graph.n_nodes)]
            out = [
                torch.tensor([float(kept[t, s] / sizes[t]) if sizes[t] else 0.0 for t in range(graph.n_nodes)])
                for s in (i, j)
            ]
            columns = float(out[0] @ out[1]) / max(float(out[0].norm() * out[1].norm()), 1e-30)
            assert float(found[i, j]) == pytest.approx((float(rows) + columns) / 2, abs=1e-6)


def test_decoders_are_compared_where_both_features_write() -> None:
    graph = random_graph(seed=4, features=6)
    d_model = 5
    options = ArchOptions(name="clt", d_features=D_FEATURES)
    transcoder = build(options, Dims(N_LAYERS, d_model), FixedThreshold(torch.zeros(N_LAYERS, D_FEATURES)))
    torch.manual_seed(0)
    for parameter in transcoder.parameters():
        parameter.requires_grad_(False).normal_()
    found = supernodes.of_decoders(graph, transcoder, torch.arange(6))
    W_dec = transcoder.W_dec
    for i in range(6):
        for j in range(6):
            first = max(int(graph.layer[i]), int(graph.layer[j]))
            a, b = (
                W_dec[int(graph.layer[k])][int(graph.index[k]), first - int(graph.layer[k]) :].flatten() for k in (i, j)
            )
            assert float(found[i, j]) == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)


def test_merging_averages_over_the_pairs_of_two_groups() -> None:
    likeness = torch.tensor([[1, 0.9, 0.7, 0.54], [0.9, 1, 0.5, 0.54], [0.7, 0.5, 1, 0.0], [0.54, 0.54, 0.0, 1.0]])
    assert merged(likeness, 0.61) == [[0, 1], [2], [3]]  # .6 is the mean of .7 and .5
    assert merged(likeness, 0.37) == [[0, 1, 2], [3]]  # .36 is the mean of .54, .54 and 0
    assert merged(likeness, 0.35) == [[0, 1, 2, 3]]
    likeness[1, 2] = likeness[2, 1] = -torch.inf
    assert merged(likeness, 0.1) == [[0, 1, 3], [2]], "never with an item that one of them may not be with"


def slow_sum(graph: Graph, targets: list[int], parts: list[float], sources: list[int], kept: Tensor) -> float:
    return sum(
        part * sum(float(graph.edges[t, s]) for s in sources if kept[t, s])
        for t, part in zip(targets, parts, strict=True)
    )


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_the_grouped_graph_keeps_the_sums(share: float) -> None:
    graph = random_graph(seed=6, features=12)
    pruned = prune(graph, share, share)
    shown = [i for i in range(12) if pruned.nodes[i]]
    token = graph.of(Kind.token).start
    groups = [
        Supernode("a", ids(graph, shown[0], shown[3])),
        Supernode("b", ids(graph, shown[1], shown[4], shown[5])),
        Supernode("c", ids(graph, token, token + 1)),
    ]
    found = grouped(graph, groups, pruned)
    assert found.names[:3] == ["a", "b", "c"]
    assert sorted(i for group in found.members for i in group) == pruned.nodes.nonzero().flatten().tolist()
    targets = [i for i, group in enumerate(found.members) if graph.kind[group[0]] in (Kind.feature, Kind.logit)]
    for i in targets:
        total = float(graph.activation[found.members[i]].sum())
        parts = [float(graph.activation[t]) / total if total else 1.0 for t in found.members[i]]
        for j in range(len(found.members)):
            expected = slow_sum(graph, found.members[i], parts, found.members[j], pruned.edges)
            assert float(found.edges[i, j]) == pytest.approx(expected, abs=1e-12)
        expected = sum(part * float(graph.value[t]) for part, t in zip(parts, found.members[i], strict=True))
        assert float(found.value[i]) == pytest.approx(expected, abs=1e-12)
        assert float(found.edges[i].sum() + found.left_out[i]) == pytest.approx(expected, abs=1e-12)
    if share == 1:
        assert found.left_out.abs().max() == 0
    others = [i for i in range(len(found.members)) if i not in targets]
    assert found.value[others].isnan().all()
    assert not found.edges[others].any()


def test_a_group_of_logits_is_weighted_by_probability() -> None:
    graph = random_graph(seed=6)
    found = grouped(graph, [Supernode("out", ids(graph, graph.n_nodes - 2, graph.n_nodes - 1))])
    expected = (0.6 * graph.value[-2] + 0.25 * graph.value[-1]) / 0.85
    assert float(found.edges[0].sum()) == pytest.approx(float(expected), abs=1e-12)


def test_labels_are_the_tokens_that_members_name_most_and_each_its_own() -> None:
    graph = random_graph(seed=1, features=6)
    graph.activation[:6] = torch.tensor([1.0, 2, 1, 1, 1, 1])
    graph.index[:6] = torch.arange(6)
    names = {
        0: [" France", " Paris"],
        1: [" Italy", " France"],
        2: [" Rome", " France"],
        3: [],
        4: [" Spain"],
        5: [" Spain"],
    }
    key = {(int(graph.layer[i]), int(graph.index[i])): names[i] for i in range(6)}
    found = labelled(graph, [[0, 1, 2], [4], [5], [3]], lambda *feature: key[feature], n_tokens=2)
    # France 1 + 2 / 2 + 1 / 2, Italy 2, Paris 1 / 2
    assert [supernode.label for supernode in found] == [
        "France, Italy", "Spain", "Spain (2)", f"at t{int(graph.position[3])}"
    ]  # fmt: skip
    assert found[0].nodes == ids(graph, 0, 1, 2)


def test_without_contexts_a_group_is_named_by_its_place_and_by_what_it_promotes() -> None:
    graph = random_graph(features=3)
    graph.layer[:2], graph.index[:2], graph.position[:2] = torch.tensor([0, 1]), torch.tensor([1, 2]), 2
    graph.activation[:2] = torch.tensor([2.0, 1.0])
    transcoder = build(ArchOptions(name="clt", d_features=3), Dims(2, 4), FixedThreshold(torch.zeros(2, 3)))
    transcoder.requires_grad_(False)
    first, second = transcoder.tables(0)
    first[1], second[1] = torch.tensor([0, 5, 0, 0]), torch.tensor([3, -4, 0, 1.5])
    (last,) = transcoder.tables(1)
    last[2] = torch.tensor([0.0, 0, 5, 0])
    top = supernodes.promoted_by(graph, transcoder, lambda row: row, lambda i: f" <{i}>", n_tokens=2)
    assert top([0]) == [" <0>", " <3>"], "the sum over its layers: 3, 1, 0, 1.5"
    assert top([0, 1]) == [" <0>", " <2>"], "6, 2, 5, 3"
    (found,) = labelled(graph, [[0, 1]], lambda *_: [], top)
    assert found.label == "at t2 (<0>, <2>)"


def test_features_late_and_last_are_named_by_what_they_promote_too() -> None:
    graph = random_graph(features=4)
    graph.layer[:4], graph.position[:4] = torch.tensor([1, 2, 0, 2]), torch.tensor([3, 3, 3, 2])

    def names(*groups: list[int]) -> list[str]:
        return [one.label for one in labelled(graph, groups, lambda *_: [" is"], lambda group: [" Paris", " Rome"])]

    assert names([0, 1]) == ["is (Paris, Rome)"]
    assert names([2]) == ["is"], "an early layer"
    assert names([1, 3]) == ["is"], "not all at the last position"
    assert names([1]) == ["is (Paris, Rome)"]


def test_edited_groups_are_kept_and_others_are_made_anew(tmp_path: Path) -> None:
    graph = random_graph(features=6)
    file = supernodes.file_of(tmp_path / "graphs", "paris")
    first, second = [Supernode("a", ids(graph, 0, 1))], [Supernode("b", ids(graph, 2, 3))]
    assert kept_or_made(file, graph, lambda: first) == first
    assert kept_or_made(file, graph, lambda: second) == second, "nobody has touched the file"
    assert load(file) == (second, False)
    text = json.loads(file.read_text())
    text["supernodes"][0]["label"] = "Say a capital"
    text["supernodes"].append({"label": "tokens", "nodes": list(ids(graph, graph.of(Kind.token).start))})
    file.write_text(json.dumps(text))
    kept = kept_or_made(file, graph, lambda: first)
    assert [supernode.label for supernode in kept] == ["Say a capital", "tokens"]
    assert kept[0].nodes == second[0].nodes
    assert json.loads(file.read_text()) == text


def test_a_file_written_by_hand_counts_as_edited(tmp_path: Path) -> None:
    graph = random_graph()
    file = tmp_path / "a.supernodes.json"
    file.write_text(json.dumps({"supernodes": [{"label": "mine", "nodes": list(ids(graph, 2))}]}))
    assert kept_or_made(file, graph, list) == [Supernode("mine", ids(graph, 2))]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((("9_9_9",),), "the graph has no node 9_9_9"),
        (((0, 1), (1, 2)), "is in the supernodes 'g0' and 'g1'"),
        (((0, -1),), r"several kinds \(feature, logit\)"),
    ],
)
def test_groups_that_cannot_be_are_refused(nodes: tuple[tuple[int | str, ...], ...], message: str) -> None:
    graph = random_graph()
    names = node_ids(graph)
    groups = [
        Supernode(f"g{n}", tuple(i if isinstance(i, str) else names[i] for i in group)) for n, group in enumerate(nodes)
    ]
    with pytest.raises(UserError, match=message):
        grouped(graph, groups)


@pytest.mark.parametrize(
    "text",
    ["[]", "nonsense", '{"supernodes": [{"label": "a"}]}', '{"supernodes": [{"label": "a", "nodes": []}]}',
     '{"supernodes": [{"label": 3, "nodes": ["0_1_2"]}]}'],
)  # fmt: skip
def test_a_file_that_does_not_read_as_groups_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.supernodes.json"
    file.write_text(text)
    with pytest.raises(UserError, match="mend it or remove it"):
        load(file)


def test_two_groups_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.supernodes.json"
    save(file, [Supernode("a", ("0_1_2",)), Supernode("a", ("0_1_3",))])
    with pytest.raises(UserError, match="two supernodes are called 'a'"):
        load(file)


def test_a_graph_with_fewer_than_two_features_has_no_groups() -> None:
    graph = random_graph(features=1)
    assert supernodes.find(graph, everything(graph)) == []
