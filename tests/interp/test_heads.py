"""The parts of an edge by attention head, against products of weights written out and against the model itself."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.errors import UserError
from pipeline.interp.circuits import attribution, frozen, graph_scores, heads, paths
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import node_ids
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.replacement import ReplacementModel
from tests.families import D_MODEL, FAMILIES, N_LAYERS
from tests.interp.graphs import random_graph
from tests.interp.small_models import made

T = 6


def graph_of(model: ReplacementModel) -> Graph:
    """Some features, tokens, errors and two tokens among the outputs; nobody looks at its edges."""
    graph = random_graph(seed=1, n_tokens=T, features=25)
    tokens = torch.randint(3, 60, (T,), generator=torch.Generator().manual_seed(2))
    index = graph.index.clone()
    index[graph.of(Kind.token)] = tokens
    last = graph.layer.clamp(max=model.lm.n_layers - 1)
    return replace(graph, tokens=tokens, index=index, layer=last, texts=[str(i) for i in range(T)])


def node(graph: Graph, kind: Kind, layer: int, position: int) -> int:
    found = [
        i
        for i in range(graph.n_nodes)
        if (graph.kind[i], int(graph.layer[i]), int(graph.position[i])) == (kind, layer, position)
    ]
    return found[0]


def ablated(model: ReplacementModel, graph: Graph, target: int, source: int) -> float:
    """What the target loses without the source, in the model with its gates and everything else as they are."""
    lm, layer = model.lm, int(graph.layer[target])
    seen: list[float] = []
    p, q = int(graph.position[source]), int(graph.position[target])
    vector = heads._written(model, graph, [source])[0]
    own = model.original(graph.tokens[None]).mlp_out
    gates = frozen.record(lm, graph.tokens[None])
    for amount in (0.0, 1.0):

        def mlp(at: int, resid: Tensor, _: Tensor, amount: float = amount) -> Tensor:
            if at == layer and graph.kind[target] == Kind.feature:
                row = model.transcoder.encoders[layer][int(graph.index[target])]
                norm = lm.modules(lm.layers[layer])[0]
                x = norm(resid) if model.site == Site.mlp_in else resid
                seen.append(float(x[0, q] @ row))
            out = own[at].clone()
            out[0, p] -= amount * vector[at]
            return out

        with frozen.held(lm, gates):
            logits = lm.logits(graph.tokens[None], mlp)
        if graph.kind[target] == Kind.logit:
            row = logits[0, -1]
            seen.append(float(row[int(graph.index[target])] - row.mean()))
    return seen[0] - seen[1]


@pytest.mark.parametrize("site", [Site.mlp_in, Site.resid_mid])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Gemma2"])
def test_the_parts_of_an_edge_sum_to_what_the_target_loses_without_the_source(
    family_model: Callable[[str], Path], family: str, site: Site
) -> None:
    model = made(family_model(family), site=site)
    graph = graph_of(model)
    sources = [node(graph, Kind.feature, 0, 2), node(graph, Kind.feature, 1, 4), node(graph, Kind.position_0, 1, 0)]
    for target in (graph.n_nodes - 1, node(graph, Kind.feature, 2, 4)):
        found = heads.of_edges(model, graph, target, sources)
        for i, source in enumerate(sources):
            assert float(found.total()[i]) == pytest.approx(ablated(model, graph, target, source), abs=1e-9)
        assert int(graph.position[target]) != 2
        assert abs(float(found.direct[0])) < 1e-12, "what stays at its position cannot reach another one"
        assert found.heads[:, :, 0].abs().max() > 1e-4
        assert found.heads[0, :, 0].abs().max() < 1e-12, "the source writes behind layer 0's attention"


def test_gemma_too_with_its_norms_behind_attention(family_model: Callable[[str], Path]) -> None:
    model = made(family_model("Gemma2"))
    graph = graph_of(model)
    sources = [node(graph, Kind.feature, 0, 2), node(graph, Kind.feature, 1, 4)]
    target = node(graph, Kind.feature, 2, 4)
    found = heads.of_edges(model, graph, target, sources)
    for i, source in enumerate(sources):
        assert float(found.total()[i]) == pytest.approx(ablated(model, graph, target, source), abs=1e-9)


def test_one_heads_part_is_the_product_of_the_weights_along_it(tiny_gpt2: Path) -> None:
    """GPT-2, layer 1, whose output is read two layers up and by the logits."""
    model = made(tiny_gpt2)
    graph, lm = graph_of(model), model.lm
    source, target = node(graph, Kind.feature, 0, 2), graph.n_nodes - 2
    gates = frozen.record(lm, graph.tokens[None])
    found = heads.of_edges(model, graph, target, [source])
    block: Any = lm.weights.get_submodule("transformer.h.1")
    D, H = D_MODEL, 2
    u = heads._written(model, graph, [source])[0][0]  # layer 0's MLP output alone comes before layer 1's attention
    denominator = gates.norms["transformer.h.1.ln_1"][1][0, 2, 0]
    normed = (u - u.mean()) / denominator * block.ln_1.weight
    W_v, W_o = block.attn.c_attn.weight[:, 2 * D :], block.attn.c_proj.weight
    full = paths.effects(lm, model.transcoder, gates, 1, graph.tokens[None], heads._target(model, graph, target))
    after = full.mlp_out[0, 1]  # of layer 1's MLP output, which is added where its attention's is
    lm.weights.requires_grad_(False)
    for head in range(H):
        own = slice(head * D // H, (head + 1) * D // H)
        moved = (normed @ W_v[:, own] @ W_o[own]).detach()
        pattern = gates.patterns["transformer.h.1.attn"][0, head, :, 2]
        expected = sum(float(pattern[q] * (moved @ after[q])) for q in range(T))
        assert float(found.heads[1, head, 0]) == pytest.approx(expected, abs=1e-10)
        assert abs(expected) > 1e-4


def test_tokens_are_sources_too_and_their_first_heads_are_in_layer_0(family_model: Callable[[str], Path]) -> None:
    model = made(family_model("Llama"))
    graph = graph_of(model)
    token = graph.of(Kind.token).start + 2
    target = node(graph, Kind.feature, 1, 3)
    found = heads.of_edges(model, graph, target, [token])
    without = copy.deepcopy(model)
    without.lm.weights.get_input_embeddings().weight.data[int(graph.tokens[2])] = 0
    lm, values = model.lm, []
    gates = frozen.record(lm, graph.tokens[None])
    own = model.original(graph.tokens[None]).mlp_out
    for each in (model, without):

        def mlp(at: int, resid: Tensor, _: Tensor, each: ReplacementModel = each) -> Tensor:
            if at == 1:
                x = each.lm.modules(1)[0](resid)[0, 3]
                values.append(float(x @ model.transcoder.encoders[1][int(graph.index[target])]))
            return own[at]

        with frozen.held(each.lm, gates):
            each.lm.logits(graph.tokens[None], mlp)
    assert (graph.tokens == graph.tokens[2]).sum() == 1
    assert float(found.total()[0]) == pytest.approx(values[0] - values[1], abs=1e-9)
    assert found.heads[0].abs().max() > 1e-5


def test_a_skip_path_carries_what_a_head_has_moved(tiny_gpt2: Path) -> None:
    """Nothing but the skip path of layer 1 reads what its attention moves, where the residual stream is cut."""
    model = made(tiny_gpt2, arch="skip")
    graph = graph_of(model)
    source, target = node(graph, Kind.feature, 0, 2), node(graph, Kind.feature, 2, 4)
    found = heads.of_edges(model, graph, target, [source])
    assert model.transcoder.W_skip is not None
    model.transcoder.W_skip.zero_()
    plain = heads.of_edges(model, graph, target, [source])
    assert float((found.heads - plain.heads)[1].abs().max()) > 1e-4


def test_layers_that_are_not_read_count_as_constants_and_keep_their_heads(family_model: Callable[[str], Path]) -> None:
    model = made(family_model("Llama"), first=1)
    graph = graph_of(model)
    source, target = node(graph, Kind.feature, 0, 2), graph.n_nodes - 1
    found = heads.of_edges(model, graph, target, [source])
    assert found.heads.shape[0] == N_LAYERS
    assert float(found.total()[0]) == pytest.approx(ablated(model, graph, target, source), abs=1e-9)
    assert found.heads[:2].abs().max() < 1e-12, "the first layer that is read writes behind the attention of layer 1"


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2"])
def test_the_parts_sum_to_the_edges_of_an_attribution_graph(family_model: Callable[[str], Path], family: str) -> None:
    model = made(family_model(family))
    model.lm.weights.float()
    model.lm.dtype = torch.float32
    model.transcoder.float()
    tokens = torch.randint(3, 60, (1, T), generator=torch.Generator().manual_seed(2))
    graph = attribution.trace(model, tokens, GraphOptions(max_logits=2))
    sources = [i for kind in heads.SOURCES for i in range(graph.n_nodes)[graph.of(kind)][::5]]
    for target in (graph.n_nodes - 1, graph.of(Kind.feature).stop - 3):
        found = heads.of_edges(model, graph, target, sources)
        edges = graph.edges[target, sources].double()
        torch.testing.assert_close(found.total(), edges, rtol=0, atol=2e-5 * float(edges.abs().max()))


def test_errors_are_sources_too(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2)
    graph = graph_of(model)
    model.lm.weights.float()
    model.lm.dtype = torch.float32
    model.transcoder.float()
    source = node(graph, Kind.error, 0, 4)
    for target in (graph.n_nodes - 1, node(graph, Kind.feature, 2, 4)):
        found = heads.of_edges(model, graph, target, [source])
        assert float(found.total()[0]) == pytest.approx(ablated(model, graph, target, source), rel=1e-3, abs=1e-4)
        assert abs(float(found.direct[0])) > 1e-3 or target == graph.n_nodes - 1


def test_the_strongest_parts_come_first_by_size() -> None:
    parts = torch.zeros(2, 2, 1, dtype=torch.float64)
    parts[1, 0, 0], parts[0, 1, 0] = -3, 1
    found = heads.strongest(heads.Crossings(parts, torch.tensor([2.0])), 0)
    assert found == [("head 1.0", -3), ("direct", 2), ("head 0.1", 1)]


def test_the_strongest_moving_edges_are_told_with_their_largest_parts(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2)
    model.lm.weights.float()
    model.lm.dtype = torch.float32
    model.transcoder.float()
    tokens = torch.randint(3, 60, (1, T), generator=torch.Generator().manual_seed(2))
    graph = attribution.trace(model, tokens, GraphOptions(max_logits=2))
    pruned = graph_scores.prune(graph, 1, 1)
    w = graph_scores.influence(graph) + graph_scores.weights(graph)
    size = graph.edges.abs()
    score = w[:, None] * size / size.sum(dim=1, keepdim=True).clamp(min=1e-30)
    for target, source in pruned.pairs().tolist():
        if graph.position[target] == graph.position[source] or graph.kind[source] not in heads.SOURCES:
            score[target, source] = 0
    best = [divmod(i, graph.n_nodes) for i in score.flatten().topk(4).indices.tolist()]
    pairs = heads.moving(graph, pruned, 4)
    assert pairs == best
    ids = node_ids(graph)
    found = heads.report(model, graph, pairs, n=99)
    assert [(row["target"], row["source"]) for row in found] == [(ids[t], ids[s]) for t, s in pairs]
    for row, (target, source) in zip(found, pairs, strict=True):
        assert row["weight"] == float(graph.edges[target, source])
        assert sum(part["part"] for part in row["parts"]) == pytest.approx(row["weight"], rel=1e-3, abs=1e-5)
        parts = [abs(part["part"]) for part in row["parts"]]
        assert parts == sorted(parts, reverse=True)


def test_an_output_that_is_a_feature_is_no_token(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2)
    graph = graph_of(model)
    graph.meta["settings"] = {"feature": "1/4@3"}
    with pytest.raises(UserError, match="no single token"):
        heads.of_edges(model, graph, graph.n_nodes - 1, [0])


def test_other_nodes_are_refused(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2)
    graph = graph_of(model)
    with pytest.raises(UserError, match="is a bias; choose features"):
        heads.of_edges(model, graph, graph.n_nodes - 1, [node(graph, Kind.bias, 1, -1)])
    with pytest.raises(UserError, match="choose such a target"):
        heads.of_edges(model, graph, graph.of(Kind.error).start, [0])
    with pytest.raises(UserError, match=r"arch=sae|arch=molt"):
        heads.of_edges(made(tiny_gpt2, arch="molt"), graph, graph.n_nodes - 1, [0])
