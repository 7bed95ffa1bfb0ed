"""The page of a graph in a real browser, the network off: what a reader sees, clicks and types."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode, node_ids
from pipeline.interp.circuits.supernodes import grouped, load, save
from pipeline.interp.circuits.top_paths import strongest
from pipeline.web.graph_page import page
from tests.web.browser import CHROMIUM, Browser
from tests.web.made_graph import LONG, make_feature, make_graph

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return make_graph()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Whatever a test does, the console stays silent and no address is asked for."""
    yield chromium
    assert chromium.complaints == []
    chromium.value("localStorage.clear()")


def opened(browser: Browser, graph: Graph, place: Path, hash: str = "", **given: Any) -> dict[str, int]:
    """The page, drawn. -> the key of each node that is on it, by node id."""
    file = place / "graph.html"
    file.write_text(page(graph, features=make_feature, **given))
    browser.open(file, hash)
    assert browser.value("document.body.dataset.drawn") == "yes"
    return dict(browser.value("Object.fromEntries(graph.nodes.map((node) => [node.id, node.i]))"))


def top(graph: Graph, kind: Kind = Kind.feature) -> int:
    """The most influential node of a kind."""
    mine = torch.tensor([one == kind for one in graph.kind])
    return int(((graph_scores.influence(graph) + graph_scores.weights(graph)) * mine).argmax())


def drawn(graph: Graph, share: float = 0.8) -> int:
    """Nodes that the page shows at first: biases reach everything and are drawn on demand."""
    kept = graph_scores.prune(graph, share).nodes.tolist()
    return sum(there and kind != Kind.bias for there, kind in zip(kept, graph.kind, strict=True))


@pytest.mark.parametrize("texts", [LONG, LONG[:7], ["</script>", "\"<i>'", "\n", " ", "👩‍🚀", "&amp;"]])
def test_a_page_opens_without_network_or_complaint(browser: Browser, tmp_path: Path, texts: list[str]) -> None:
    graph = make_graph(texts, per_cell=3)
    opened(browser, graph, tmp_path)
    assert browser.value("document.querySelectorAll('#picture .node').length") == drawn(graph)
    assert browser.value("document.querySelectorAll('#picture .axis text').length") == len(texts)


@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (0.5, 0.9), (0.95, 1.0), (0.3, 0.5), (0.9, 0.8), (0.0, 0.0)])
def test_the_page_prunes_as_python_does(browser: Browser, tmp_path: Path, nodes: float, edges: float) -> None:
    graph = make_graph(LONG[:12], seed=5)
    opened(browser, graph, tmp_path)
    pruned = graph_scores.prune(graph, nodes, edges)
    ids = node_ids(graph)
    found = browser.value(
        f"""(() => {{ const kept = prune(graph, {nodes}, {edges}); return [
            graph.nodes.filter((_, i) => kept.nodes[i]).map((node) => node.id),
            [...kept.edges.keys()].filter((e) => kept.edges[e]).map((e) =>
                graph.nodes[graph.target[e]].id + " " + graph.nodes[graph.source[e]].id)]; }})()"""
    )
    assert set(found[0]) == {ids[i] for i in pruned.nodes.nonzero().flatten().tolist()}
    assert set(found[1]) == {f"{ids[t]} {ids[s]}" for t, s in pruned.pairs().tolist()}


def test_a_slider_prunes_the_picture(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    opened(browser, graph, tmp_path)
    browser.value(
        "(() => { const n = document.getElementById('n'); n.value = .5; n.dispatchEvent(new Event('input')); })()"
    )
    assert browser.value("document.querySelectorAll('#picture .node').length") == drawn(graph, 0.5)
    assert "n=0.5" in browser.value("location.hash")


def test_a_click_selects_a_node_and_shows_its_edges(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    keys = opened(browser, graph, tmp_path)
    i = top(graph)
    name = node_ids(graph)[i]
    browser.click(f'#picture [data-key="n{keys[name]}"] .mark')
    assert browser.value("document.querySelector('.node.selected').dataset.key") == f"n{keys[name]}"
    own = browser.value("document.querySelectorAll('.own-edges .edge').length")
    kept = graph_scores.prune(graph).nodes  # all of its own edges, those that are else pruned too
    kept &= torch.tensor([kind != Kind.bias for kind in graph.kind])
    assert own == int((graph.edges[i][kept] != 0).sum() + (graph.edges[kept, i] != 0).sum()) > 0
    lists = browser.value(
        "[...document.querySelectorAll('.edge-list')].map((one) => one.querySelector('h3').firstChild.data)"
    )
    assert lists == ["Inputs", "Outputs"]
    shown = browser.value("[...document.querySelectorAll('.edge-list:first-of-type b')].map((one) => one.textContent)")
    weights = [float(text.replace("−", "-")) for text in shown]
    expected = graph.edges[i][graph.edges[i].abs().sort(descending=True).indices]
    assert weights == pytest.approx(expected[: len(weights)].tolist(), rel=0.01)
    total = browser.value("document.querySelector('.account .sum td:last-child').textContent").replace("−", "-")
    assert float(total) == pytest.approx(float(graph.value[i]), rel=0.01)
    assert f"s={name}" in browser.value("location.hash")


def test_a_listed_edge_leads_to_its_other_end_and_back_by_keys(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    keys = opened(browser, graph, tmp_path, f"s={node_ids(graph)[top(graph, Kind.logit)]}")
    logit = browser.value("state.selected[0]")
    assert logit in {f"n{key}" for key in keys.values()}
    first = browser.value("document.querySelector('.edge-list .walk:not(.pruned)').dataset.key")
    browser.click(".edge-list .walk:not(.pruned)")
    assert browser.value("state.selected") == [first]
    browser.key("ArrowUp")
    up = browser.value("state.selected[0]")
    assert up not in (None, first)
    browser.key("ArrowDown")
    assert browser.value("state.selected[0]") not in (None, up)
    browser.key("Escape")
    assert browser.value("state.selected") == []
    assert browser.value("document.querySelector('#panel h2').textContent") == "Outputs"


def test_a_chosen_feature_shows_contexts_words_and_histogram(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    features = [
        i for i in graph_scores.prune(graph).nodes.nonzero().flatten().tolist() if graph.kind[i] == Kind.feature
    ]
    i = next(i for i in features if int(graph.index[i]) % 9)
    opened(browser, graph, tmp_path, f"s={node_ids(graph)[i]}")
    assert browser.value("document.querySelectorAll('.feature-data > .context').length") == 3
    assert browser.value("document.querySelector('.context .peak').textContent.length") > 0
    assert "Lyon" in browser.value("document.querySelector('.words.positive').textContent")
    assert browser.value("document.querySelectorAll('.histogram rect').length") == 50


def test_a_pointer_shows_what_a_node_is_and_a_list_points_into_the_picture(
    browser: Browser, graph: Graph, tmp_path: Path
) -> None:
    i = top(graph)
    keys = opened(browser, graph, tmp_path)
    browser.click(f'#picture [data-key="n{keys[node_ids(graph)[i]]}"] .mark')
    browser.key("Escape")
    browser.move(f'#picture [data-key="n{keys[node_ids(graph)[i]]}"] .mark')
    told = browser.value("document.getElementById('tip').innerText")
    assert f"feature {int(graph.layer[i])}/{int(graph.index[i])}" in told
    assert "activation" in told
    browser.move("#panel .walk[data-key]:nth-child(1)")
    assert browser.value("document.querySelectorAll('.node.hot').length") == 1


def test_a_path_is_shown_alone_and_let_go(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    keys = opened(browser, graph, tmp_path)
    browser.click(".paths .walk")
    path = [f"n{keys[node_ids(graph)[i]]}" for i in strongest(graph, 1)[0].nodes]
    drawn = browser.value(
        "[...document.querySelectorAll('.own-edges .edge')].map((e) => [e.dataset.from, e.dataset.to])"
    )
    assert sorted(drawn) == sorted([a, b] for a, b in pairwise(path))
    assert set(browser.value("[...document.querySelectorAll('.node.selected')].map((n) => n.dataset.key)")) == set(path)
    assert "path=0" in browser.value("location.hash")
    browser.key("Escape")
    assert browser.value("document.querySelectorAll('.node.selected').length") == 0


def test_pins_survive_pruning_and_a_reload(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    name = node_ids(graph)[top(graph)]
    keys = opened(browser, graph, tmp_path, f"s={name}")
    browser.key("p")
    browser.key("Escape")
    browser.value(
        "(() => { const n = document.getElementById('n'); n.value = 0; n.dispatchEvent(new Event('input')); })()"
    )
    assert browser.value(f"document.querySelector('[data-key=\"n{keys[name]}\"]').classList.contains('pinned')")
    opened(browser, graph, tmp_path)  # another address: what the browser remembers
    assert browser.value("[...state.pinned]") == [keys[name]]


def test_nodes_are_grouped_named_saved_and_let_go(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    kept = graph_scores.prune(graph).nodes.nonzero().flatten().tolist()
    two = [node_ids(graph)[i] for i in kept if graph.kind[i] == Kind.feature][-2:]
    keys = opened(browser, graph, tmp_path)
    browser.click(f'#picture [data-key="n{keys[two[0]]}"] .mark')
    browser.click(f'#picture [data-key="n{keys[two[1]]}"] .mark', shift=True)
    browser.value("document.getElementById('group-name').value = 'say Paris'")
    browser.click("#make-group")
    assert browser.value("document.querySelector('.node.group .label').textContent") == "say Paris"
    assert browser.value(f"document.querySelector('#picture .node[data-key=\"n{keys[two[0]]}\"]')") is None
    saved = json.dumps(browser.value("remember()"))
    (tmp_path / "groups.json").write_text(saved)
    groups, edited = load(tmp_path / "groups.json")  # as clt graph reads it
    assert edited
    assert [(one.label, set(one.nodes)) for one in groups] == [("say Paris", set(two))]
    assert "say+Paris" in browser.value("location.hash")
    browser.value("ungroup(0)")
    assert browser.value("document.querySelectorAll('.node.group').length") == 0


def test_saved_groups_are_loaded_and_what_is_no_such_file_is_said(
    browser: Browser, graph: Graph, tmp_path: Path
) -> None:
    features = [name for name, kind in zip(node_ids(graph), graph.kind, strict=True) if kind == Kind.feature]
    opened(browser, graph, tmp_path)
    save(tmp_path / "good.json", [Supernode("mine", tuple(features[:3]))])
    (tmp_path / "bad.json").write_text("[1, 2")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    box = browser.call("DOM.querySelector", nodeId=root, selector="#open")["nodeId"]
    for name, expected in (("good", "mine"), ("bad", "mine")):
        browser.call("DOM.setFileInputFiles", nodeId=box, files=[str(tmp_path / f"{name}.json")])
        browser.value("new Promise((done) => setTimeout(done, 200))")
        assert browser.value("state.groups.map((one) => one.name).join()") == expected
        assert ("holds no groups" in browser.value("document.getElementById('said').textContent")) == (name == "bad")


def test_a_group_has_the_edges_that_python_gives_it(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    pruned = graph_scores.prune(graph)
    kept = [i for i in pruned.nodes.nonzero().flatten().tolist() if graph.kind[i] == Kind.feature]
    groups = [Supernode("a", tuple(node_ids(graph)[i] for i in kept[:3])),
              Supernode("b", tuple(node_ids(graph)[i] for i in kept[-4:]))]  # fmt: skip
    opened(browser, graph, tmp_path, "h=", supernodes=groups)
    expected = grouped(graph, groups, pruned)
    found = browser.value(
        "edges.map((edge) => [edge.to, edge.from].map((one) => one.node ? one.node.id : one.label).concat(edge.weight))"
    )
    assert found
    for to, source, weight in found:
        wanted = float(expected.edges[expected.names.index(to), expected.names.index(source)])
        assert weight == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    counted = int((expected.edges.fill_diagonal_(0) != 0).sum())
    assert len(found) == counted


def test_a_kind_is_hidden_and_shown_and_sums_stay(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    i = top(graph, Kind.logit)
    opened(browser, graph, tmp_path, f"s={node_ids(graph)[i]}")
    account = "[...document.querySelectorAll('.account tr')].map((one) => one.textContent)"
    before = browser.value(account)
    assert any("bias" in line for line in before)
    assert browser.value("document.querySelectorAll('#picture .bias').length") == 0
    browser.click('#legend [data-kind="bias"]')
    assert browser.value("document.querySelectorAll('#picture .node.bias').length") > 0
    browser.click('#legend [data-kind="feature"]')
    assert browser.value("document.querySelectorAll('#picture .node.feature').length") == 0
    assert browser.value(account) == before


def test_a_narrow_window_and_paper_hold_the_picture(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    opened(browser, graph, tmp_path)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.value("getComputedStyle(document.getElementById('tools')).display") == "none"
        assert browser.value("document.getElementById('picture').getBoundingClientRect().width <= innerWidth")
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_labels_do_not_overlap(browser: Browser, graph: Graph, tmp_path: Path) -> None:
    for texts in (LONG, None):
        opened(browser, graph if texts is None else make_graph(texts), tmp_path)
        boxes = browser.value(
            """[...document.querySelectorAll('.node .label')].map((one) => one.getBoundingClientRect())
            .map((box) => [box.left, box.top, box.right, box.bottom])"""
        )
        assert len(boxes) >= 10
        for n, a in enumerate(boxes):
            for b in boxes[:n]:
                apart = a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 3 or b[3] <= a[1] + 3
                assert apart, (a, b)
