"""The page of an attribution graph: everything is on it and adds up, and nothing comes from elsewhere."""

import json
import re
from typing import Any

import pytest
import torch

from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode, node_ids
from pipeline.web import graph_data
from pipeline.web.graph_page import page
from tests.web.made_graph import FRANCE, LONG, make_feature, make_graph
from tests.web.reading import Page


def data_of(text: str) -> dict[str, Any]:
    return dict(json.loads(Page(text).scripts[0]))


def edges_of(data: dict[str, Any]) -> torch.Tensor:
    """[m, m], read back from what is packed."""
    from base64 import b64decode

    sources = torch.frombuffer(bytearray(b64decode(data["edges"]["source"])), dtype=torch.uint16).long()
    weights = torch.frombuffer(bytearray(b64decode(data["edges"]["weight"])), dtype=torch.float32)
    counts = torch.tensor(data["edges"]["counts"])
    found = torch.zeros(len(counts), len(counts))
    found[torch.arange(len(counts)).repeat_interleave(counts), sources] = weights
    return found


@pytest.fixture
def graph() -> Graph:
    return make_graph(["<bos>", "The", " capital", " is"], per_cell=2, n_layers=3, n_logits=2)


def test_nothing_is_loaded_from_anywhere(graph: Graph) -> None:
    text = page(graph, features=make_feature)
    assert Page(text).addresses == ["data:,"]
    # The one address is the name of SVG.
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_all_that_pruning_keeps_is_on_the_page(graph: Graph) -> None:
    pruned = graph_scores.prune(graph)
    data = data_of(page(graph, pruned))
    kept = {name for name, there in zip(node_ids(graph), pruned.nodes.tolist(), strict=True) if there}
    assert kept <= set(data["nodes"]["id"])
    assert data["thresholds"] == {"node": 0.8, "edge": 0.98, "most": 0.95}
    always = {Kind.token, Kind.logit, Kind.bias}
    assert {name for name, kind in zip(node_ids(graph), graph.kind, strict=True) if kind in always} <= set(
        data["nodes"]["id"]
    )


def test_weights_are_those_of_the_graph_and_accounts_close(graph: Graph) -> None:
    data = data_of(page(graph))
    ids = torch.tensor([node_ids(graph).index(name) for name in data["nodes"]["id"]])
    edges = edges_of(data)
    assert torch.equal(edges, graph.edges[ids][:, ids])
    assert data["n_left_out"] == graph.n_nodes - len(ids) > 0
    for row, i in enumerate(ids.tolist()):
        if graph.kind[i] in (Kind.feature, Kind.logit):
            total = float(edges[row].sum()) + data["nodes"]["outside_sum"][row]
            assert total == pytest.approx(float(graph.value[i]), abs=1e-4)
        else:
            assert data["nodes"]["value"][row] is None


def test_a_graph_too_large_for_a_browser_is_cut_by_influence(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_data, "MOST_EDGES", 15)
    data = data_of(page(graph))
    assert sum(data["edges"]["counts"]) <= 15
    most = data["thresholds"]["most"]
    assert 0.1 <= most < 0.8
    assert data["thresholds"]["node"] == most
    influence = graph_scores.influence(graph)
    held = sum(data["nodes"]["influence"])
    assert held / float(influence.sum()) >= most


@pytest.mark.parametrize(
    "evil", ["</script><script>alert(1)</script>", "\"'&<b>", "\n", "👩‍🚀\u2028", "\\u003c", "{{ 7 * 7 }}"]
)
def test_texts_that_look_like_markup_stay_texts(evil: str) -> None:
    graph = make_graph(["<bos>", evil, " x"], per_cell=1, n_layers=2, n_logits=1)
    graph.meta["labels"], graph.meta["run"] = [evil], evil
    feature = {"examples_quantiles": [{"quantile_name": evil, "examples": []}], "top_logits": [evil], "label": evil}
    supernode = Supernode(evil, (node_ids(graph)[0],))
    text = page(graph, supernodes=[supernode], features=lambda *_: feature)
    found = Page(text)
    assert found.tags["script"] == 9
    assert found.tags.get("b", 0) == 2 + 1  # the run and the model, and one output
    data = json.loads(found.scripts[0])
    assert data["tokens"][1] == evil
    assert data["supernodes"] == [[evil, supernode.nodes[0]]]
    assert data["nodes"]["label"][data["nodes"]["id"].index(node_ids(graph)[graph.of(Kind.logit).start])] == evil


def test_features_are_named_by_label_by_top_contexts_and_by_what_later_layers_raise() -> None:
    graph = make_graph(per_cell=3)
    data = data_of(page(graph, features=make_feature, labels={(0, int(graph.index[0])): "my own"}))
    names = dict(zip(data["nodes"]["id"], data["nodes"]["label"], strict=True))
    for i in range(graph.of(Kind.feature).stop):
        layer, index, name = int(graph.layer[i]), int(graph.index[i]), node_ids(graph)[i]
        if name not in names:
            continue
        if (layer, index) == (0, int(graph.index[0])):
            assert names[name] == "my own"
        elif index % 9 == 0:
            assert names[name] == ""
        else:
            assert ("→ Paris" in names[name]) == (layer >= 2)


def test_contexts_are_cut_around_their_peak() -> None:
    graph = make_graph(FRANCE, per_cell=3)
    tokens, acts = [f"t{n}" for n in range(90)], [0.0] * 90
    acts[50] = 3.0
    example = {"tokens": tokens, "tokens_acts_list": acts}
    feature = {"examples_quantiles": [{"quantile_name": "Top", "examples": [example] * 9}], "label": "x"}
    data = data_of(page(graph, features=lambda *_: feature))
    one = next(iter(data["features"].values()))["contexts"][0][1]
    assert len(one) == 5
    numbers, acts = one[0]
    assert acts.index(3.0) == graph_data.BEFORE
    assert data["strings"][numbers[graph_data.BEFORE]] == "t50"
    assert len(numbers) == graph_data.BEFORE + 1 + graph_data.AFTER


def test_a_page_of_a_long_prompt_is_small() -> None:
    graph = make_graph(LONG)
    assert len(LONG) == 40
    assert len(page(graph, features=make_feature)) < 1_500_000


def test_a_graph_without_features_has_a_page() -> None:
    graph = make_graph(["<bos>", "a"], per_cell=0, n_layers=2, n_logits=1)
    assert graph.of(Kind.feature) == slice(0, 0)
    assert data_of(page(graph))["features"] == {}
