import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.interp.circuits import graph_json, graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode, document, node_ids
from pipeline.interp.circuits.graph_scores import prune, reference
from tests.interp.graphs import D_FEATURES, N_LAYERS, random_graph

SCHEMA = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "qParams": {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str},
    "nodes": {
        "node_id": str, "feature": (int, type(None)), "layer": (str, int), "ctx_idx": int, "feature_type": str,
        "jsNodeId": str, "clerp": str, "influence": (float, type(None)), "activation": (float, type(None)),
    },
    "links": {"source": str, "target": str, "weight": float},
}  # fmt: skip
"""What Neuronpedia's graph-schema.json requires, and the types of what it allows beside that."""


def check_schema(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, keys in SCHEMA.items():
        for each in found[name] if isinstance(found[name], list) else [found[name]]:
            for key, kind in keys.items():  # type: ignore[attr-defined]
                assert isinstance(each[key], kind), (name, key, each)
                assert not isinstance(each[key], bool), (name, key)
    assert all(isinstance(token, str) for token in found["metadata"]["prompt_tokens"])


def everything(graph: Graph) -> dict[str, Any]:
    return document(graph, prune(graph, 1, 1), "all")


@pytest.mark.parametrize("seed", range(3))
def test_the_json_of_every_kind_of_node_follows_the_schema(seed: int) -> None:
    graph = random_graph(seed)
    found = everything(graph)
    check_schema(found)
    assert {node["feature_type"] for node in found["nodes"]} == set(graph_json.TYPES.values())
    check_schema(document(graph, prune(graph), "small"))
    check_schema(document(reference(graph), prune(reference(graph)), "small"))


def test_no_two_nodes_share_an_id_and_links_join_nodes_that_are_there() -> None:
    graph = random_graph(seed=5, features=99)  # all there are, so every id that an error's could clash with
    ids = node_ids(graph)
    assert len(set(ids)) == graph.n_nodes
    found = everything(graph)
    shown = {node["node_id"] for node in found["nodes"]}
    assert len(shown) == len(found["nodes"])
    assert {end for link in found["links"] for end in (link["source"], link["target"])} <= shown


def test_ids_are_three_numbers_joined_by_underscores_as_links_to_the_page_are_read() -> None:
    graph = random_graph()
    for kind, node_id in zip(graph.kind, node_ids(graph), strict=True):
        numbers = node_id.removeprefix("E_").split("_")
        assert len(numbers) == (2 if kind == Kind.token else 3)
        assert all(number.isdecimal() for number in numbers), node_id


def test_the_nodes_that_circuit_tracer_has_are_written_as_it_writes_them() -> None:
    graph = random_graph()
    found = {node["node_id"]: node for node in everything(graph)["nodes"]}
    layer, position, index = int(graph.layer[2]), int(graph.position[2]), int(graph.index[2])
    feature = found[f"{layer}_{index}_{position}"]
    x = layer + index
    assert feature | {"influence": 0, "activation": 0} == {
        "node_id": f"{layer}_{index}_{position}", "feature": x * (x + 1) // 2 + index, "layer": str(layer),
        "ctx_idx": position, "feature_type": "cross layer transcoder", "token_prob": 0.0, "is_target_logit": False,
        "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": f"{layer}_{index}-0", "clerp": "", "influence": 0,
        "activation": 0,
    }  # fmt: skip
    assert feature["activation"] == pytest.approx(float(graph.activation[2]))
    token = found["E_21_1"]
    assert (token["feature"], token["layer"], token["ctx_idx"], token["jsNodeId"]) == (1, "E", 1, "E_21-1")
    first, second = (found[f"{N_LAYERS + 1}_{30 + i}_3"] for i in range(2))
    assert (first["feature"], first["layer"], first["jsNodeId"]) == (30, str(N_LAYERS + 1), "L_30-3")
    assert (first["token_prob"], first["is_target_logit"], second["is_target_logit"]) == (0.6, True, False)
    assert first["clerp"] == 'Output " out0" (p=0.600)'
    error = found[f"1_{D_FEATURES}_2"]
    assert (error["feature"], error["feature_type"]) == (-1, "mlp reconstruction error")


def test_links_are_the_signed_edges_that_pruning_kept() -> None:
    graph = random_graph(seed=1)
    pruned, ids = prune(graph), node_ids(graph)
    links = {(link["target"], link["source"]): link["weight"] for link in document(graph, pruned, "a")["links"]}
    expected = {(ids[t], ids[s]): float(graph.edges[t, s]) for t, s in pruned.pairs().tolist()}
    assert links == expected
    assert min(links.values()) < 0 < max(links.values())


def test_influence_is_the_cumulative_share_and_logits_have_none() -> None:
    graph = random_graph(seed=1)
    pruned = prune(graph)
    by_id = dict(zip(node_ids(graph), pruned.cumulative.tolist(), strict=True))
    for node in document(graph, pruned, "a")["nodes"]:
        expected = None if node["feature_type"] == "logit" else by_id[node["node_id"]]
        assert node["influence"] == expected


def test_targets_that_are_no_token_have_ids_of_their_own() -> None:
    graph = random_graph(probability=(0.5, 0.5, 0.0))
    graph.index[-3:] = torch.tensor([-1, 40, -1])
    graph.meta["labels"] = [" Paris - Rome", " Lyon", "1/4@2"]
    assert node_ids(graph)[-3:] == ["4_41_3", "4_40_3", "4_42_3"]
    clerps = [node["clerp"] for node in everything(graph)["nodes"] if node["feature_type"] == "logit"]
    assert clerps[0] == 'Output " Paris - Rome" (p=0.500)'


def test_labels_and_groups_are_shown_and_pruned_members_are_not() -> None:
    graph = random_graph(seed=1, features=14)
    pruned, ids = prune(graph), node_ids(graph)
    features = range(*graph.of(Kind.feature).indices(graph.n_nodes))
    kept = [i for i in features if pruned.nodes[i]]
    gone = [i for i in features if not pruned.nodes[i]]
    labels = {(int(graph.layer[kept[0]]), int(graph.index[kept[0]])): "Say a capital"}
    groups = [Supernode("two", (ids[kept[0]], ids[gone[0]], ids[kept[1]])), Supernode("none", (ids[gone[1]],))]
    found = document(graph, pruned, "a", labels=labels, supernodes=groups)
    assert found["qParams"]["supernodes"] == [["two", ids[kept[0]], ids[kept[1]]]]
    assert found["qParams"]["pinnedIds"] == [ids[kept[0]], ids[kept[1]]]
    clerps = {node["node_id"]: node["clerp"] for node in found["nodes"]}
    assert clerps[ids[kept[0]]] == "Say a capital"


def test_the_list_of_graphs_has_each_slug_once(tmp_path: Path) -> None:
    graph = random_graph()
    pruned = prune(graph)
    for slug, scan in (("a", "x"), ("b", "x"), ("a", "y")):
        file = graph_json.write(tmp_path / "graphs", document(graph, pruned, slug, scan=scan))
        assert json.loads(file.read_text())["metadata"]["scan"] == scan
    listed = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())["graphs"]
    assert [(entry["slug"], entry["scan"]) for entry in listed] == [("b", "x"), ("a", "y")]
    assert listed[1]["prompt_tokens"] == graph.texts
    assert sorted(os.listdir(tmp_path / "graphs")) == [
        ".graph-metadata.json.lock", "a.json", "b.json", "graph-metadata.json"
    ]  # fmt: skip


def test_graphs_written_at_once_are_all_listed(tmp_path: Path) -> None:
    graph = random_graph()
    pruned = prune(graph)
    found = [document(graph, pruned, f"graph-{i}") for i in range(8)]
    threads = [threading.Thread(target=graph_json.write, args=(tmp_path, each)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry["slug"] for entry in graph_json.known(tmp_path)} == {f"graph-{i}" for i in range(8)}


def test_a_list_of_graphs_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "graph-metadata.json").write_text("[1]")
    graph = random_graph()
    with pytest.raises(UserError, match="move it away"):
        graph_json.write(tmp_path, document(graph, prune(graph), "a"))
    assert os.listdir(tmp_path) == ["graph-metadata.json"]


def test_a_graph_of_tokens_alone_is_written_too() -> None:
    graph = graph_scores.reference(random_graph(features=0, errors=False))
    found = everything(graph)
    check_schema(found)
    assert len(found["nodes"]) == 4 + 2
