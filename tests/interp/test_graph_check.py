"""What a graph says of ablations, against what happens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError
from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.attribution import trace
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_check import check, predicted, table
from pipeline.interp.circuits.graph_options import GraphOptions, Precision
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering.feature_edits import Edit, Where
from pipeline.interp.steering.intervene import intervene
from pipeline.interp.steering.intervene_options import InterveneOptions, Model
from tests.interp.test_attribution import T, model_of, opened, random, tokens

EXACT = ("direct", "frozen")


@pytest.fixture(scope="module", params=["GPT2", "Llama", "Gemma2"])
def family(request: pytest.FixtureRequest, family_model: Callable[[str], Path]) -> LanguageModel:
    return opened(family_model(request.param))


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> LanguageModel:
    return opened(tiny_gpt2)


def checked(model: ReplacementModel, n: int = 12, **options: Any) -> tuple[Graph, dict[str, Any]]:
    graph = trace(model, tokens(), GraphOptions(**{"dtype": Precision.float64} | options))
    return graph, check(model, graph, n, batch_tokens=5 * T)


def worst(found: dict[str, Any], name: str) -> float:
    return max(found[name][kind]["error"] for kind in ("features", "outputs"))


@pytest.mark.parametrize("site", [Site.resid_mid, Site.mlp_in])
@pytest.mark.parametrize("arch", ["clt", "per_layer", "skip"])
def test_with_frozen_gates_total_effects_are_exact_in_double_precision(
    family: LanguageModel, arch: str, site: Site
) -> None:
    _, found = checked(model_of(family, random(arch), site))
    assert found["n"] == 12
    assert found["dtype"] == "float64"
    for name in EXACT:
        assert worst(found, name) < 1e-10
        assert found[name]["features"]["r2"] == pytest.approx(1, abs=1e-12)
        assert found[name]["features"]["n"] > 12
    assert found["gates"]["features"]["error"] > 1e-6
    assert found["gates"]["features"]["r2"] < 1 - 1e-9
    assert found["live"]["features"]["r2"] != found["gates"]["features"]["r2"]


def test_in_single_precision_they_are_as_exact_as_it_is(family: LanguageModel) -> None:
    _, found = checked(model_of(family, random("clt"), Site.mlp_in), dtype=Precision.float32)
    assert found["dtype"] == "float32"
    for name in EXACT:
        assert 0 < worst(found, name) < 2e-5


def test_total_effects_follow_the_order_of_the_layers(gpt2: LanguageModel) -> None:
    """The recursion written out, one feature after the other."""
    graph = trace(model_of(gpt2), tokens(), GraphOptions(dtype=Precision.float64))
    n, outputs = graph.of(Kind.feature).stop, graph.of(Kind.logit)
    sources = torch.tensor([0, n // 3, n // 2])
    direct, total = predicted(graph, sources)
    for i, s in enumerate(sources.tolist()):
        dh = torch.zeros(n, dtype=torch.float64)

        def effect(t: int, s: int = s, dh: Tensor = dh) -> Tensor:
            others = sum(graph.edges[t, u] / graph.activation[u] * dh[u] for u in range(n) if u != s)
            return others - graph.edges[t, s]

        for t in range(n):  # features stand by layer
            dh[t] = effect(t)
        torch.testing.assert_close(total.features[i], dh, rtol=1e-11, atol=1e-13)
        outs = torch.stack([effect(t) for t in range(graph.n_nodes)[outputs]])
        torch.testing.assert_close(total.outputs[i], outs, rtol=1e-11, atol=1e-13)
        assert torch.equal(direct.features[i], -graph.edges[:n, s])
        assert torch.equal(direct.outputs[i], -graph.edges[outputs, s])
    assert not torch.allclose(total.features, direct.features, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"difference": ["a", "e"]}, {"targets": ["o", "a"]}, {"max_feature_nodes": 15, "batch": 4}], ids=str
)
def test_any_output_and_any_limit_can_be_checked(gpt2: LanguageModel, options: dict[str, Any]) -> None:
    _, found = checked(model_of(gpt2), **options)
    assert max(worst(found, name) for name in EXACT) < 1e-10
    assert (found["n_cut"] > 0) == ("max_feature_nodes" in options)
    if "max_feature_nodes" in options:
        assert found["n_features"] == 15


def test_a_feature_as_the_output_is_read_where_it_is(gpt2: LanguageModel) -> None:
    model = model_of(gpt2)
    whole = trace(model, tokens(), GraphOptions())
    last = max(range(whole.of(Kind.feature).stop), key=lambda i: (int(whole.layer[i]), -int(whole.position[i])))
    place = f"{int(whole.layer[last])}/{int(whole.index[last])}@{int(whole.position[last])}"
    assert int(whole.position[last]) < T - 1
    _, found = checked(model, feature=place)
    assert found["frozen"]["outputs"]["error"] < 1e-10


@pytest.mark.parametrize("layers", [[1, 3], [0, 2]])
def test_layers_that_are_not_read_stand_still(tiny_gpt2: Path, layers: list[int]) -> None:
    lm = opened(tiny_gpt2, layers=layers)
    assert lm.n_layers == 2
    _, found = checked(model_of(lm, random("clt", n_layers=2)))
    assert max(worst(found, name) for name in EXACT) < 1e-10
    for node in found["nodes"]:
        if node["layer"] == 1:  # behind it nothing has a gate
            assert node["gates"] == pytest.approx(node["predicted"], rel=1e-9, abs=1e-11)


def test_what_happens_live_is_what_an_intervention_does(gpt2: LanguageModel) -> None:
    model = model_of(gpt2)
    graph, found = checked(model, n=4, targets=["a"], dtype=Precision.float32)
    top = graph_scores.influence(graph)[: graph.of(Kind.feature).stop].topk(4).indices
    assert [node["node"] for node in found["nodes"]] == top.tolist()
    [token] = model.lm.tokenizer("a", add_special_tokens=False)["input_ids"]
    for node in found["nodes"]:
        where = Where((node["position"],))
        edits = [[Edit(node["layer"], node["feature"], where, 0.0, 0.0)]]
        made = intervene(model, tokens(), edits, InterveneOptions(model=Model.replacement))
        change = made.logits[0, -1] - made.before.logits[0, -1]
        assert node["live"] == pytest.approx(float(change[token] - change.mean()), abs=2e-5)
        assert node["predicted"] == pytest.approx(node["frozen"], abs=2e-5)
        at = (graph.layer == node["layer"]) & (graph.index == node["feature"]) & (graph.position == node["position"])
        assert node["activation"] == pytest.approx(float(graph.activation[at].sum()))


def test_the_check_is_shown(gpt2: LanguageModel) -> None:
    graph, found = checked(model_of(gpt2), max_feature_nodes=15)
    texts = [str(i) for i in range(T)]
    lines = list(table(found, texts, graph.labels, top=3))
    cut = f"{found['n_cut']} features that a limit cut stay as they are"
    assert lines[0] == f"12 of 15 features ablated, one at a time, errors held; {cut}"
    [line] = [line for line in lines if "attention and norms held, gates live" in line]
    assert f"{found['gates']['features']['r2']:.3f}" in line
    assert f"{found['gates']['outputs']['slope']:.3f}" in line
    assert len(lines) == 3 + 5 + 2 + 3
    assert f"{found['nodes'][0]['layer']}/{found['nodes'][0]['feature']} " in lines[-3]


def test_a_graph_of_another_model_is_refused(gpt2: LanguageModel, tiny_gpt2: Path) -> None:
    graph = trace(model_of(gpt2), tokens(), GraphOptions())
    other = opened(tiny_gpt2, layers=[1, 3])
    with pytest.raises(UserError, match=r"transcoder of 3 layers; give the run"):
        check(model_of(other, random("clt", n_layers=2)), graph)
    nothing = trace(model_of(gpt2, random(threshold=1e9)), tokens(), GraphOptions())
    with pytest.raises(UserError, match=r"no feature to ablate"):
        check(model_of(gpt2, random(threshold=1e9)), nothing)
