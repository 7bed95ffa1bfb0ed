"""Virtual weights against products of the weights written out, and co-activation against loops over tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.core.activations import FixedThreshold
from pipeline.errors import UserError
from pipeline.interp.circuits import frozen
from pipeline.interp.circuits.frozen import Gates
from pipeline.interp.circuits.global_weights import count, into, out_of, strongest, typical
from pipeline.interp.replacement import ReplacementModel
from tests import oracle
from tests.families import D_MODEL, N_LAYERS
from tests.interp.small_models import F, made

H = 2


def text() -> Tensor:
    return torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(4))


def normed(gates: Gates, name: str, module: Any, u: Tensor, centred: bool, offset: float = 0) -> Tensor:
    x = u - u.mean() if centred else u
    return x / gates.norms[name][1].flatten() * (module.weight.detach() + offset)


def test_denominators_are_the_harmonic_mean_behind_position_0(tiny_gpt2: Path) -> None:
    lm = made(tiny_gpt2).lm
    gates, recorded = typical(lm, text()), frozen.record(lm, text())
    for name, (_, denominator) in recorded.norms.items():
        expected = 1 / (1 / denominator[:, 1:]).mean()
        assert float(gates.norms[name][1]) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("site", [Site.mlp_in, Site.resid_mid])
def test_gpt2_weights_are_products_of_its_matrices(tiny_gpt2: Path, site: Site) -> None:
    model = made(tiny_gpt2, site=site)
    gates, transcoder, lm = typical(model.lm, text()), model.transcoder, model.lm
    W_dec = transcoder.W_dec
    target, feature = 2, 4
    found = dict(into(model, gates, target, feature))
    assert list(found) == ["residual", *(f"head {layer}.{head}" for layer in range(3) for head in range(H))]
    blocks: Any = lm.weights.get_submodule("transformer.h")

    def read(u: Tensor) -> Tensor:
        own = normed(gates, "transformer.h.2.ln_2", blocks[2].ln_2, u, centred=True) if site == Site.mlp_in else u
        return own @ transcoder.encoders[target][feature]

    for source in range(2):
        for s in range(F):
            rows = {source + j: W_dec[source][s, j] for j in range(N_LAYERS - source)}
            before = {m: sum((row for at, row in rows.items() if at < m), torch.zeros(D_MODEL)) for m in range(3)}
            expected = float(read(before[2]))
            assert float(found["residual"][source, s]) == pytest.approx(expected, abs=1e-10)
            for layer in range(3):
                attention = blocks[layer].attn
                u = normed(gates, f"transformer.h.{layer}.ln_1", blocks[layer].ln_1, before[layer], centred=True)
                for head in range(H):
                    own = slice(head * D_MODEL // H, (head + 1) * D_MODEL // H)
                    W_v = attention.c_attn.weight.detach()[:, 2 * D_MODEL :][:, own]
                    moved = u @ W_v @ attention.c_proj.weight.detach()[own]
                    got = float(found[f"head {layer}.{head}"][source, s])
                    assert got == pytest.approx(float(read(moved)), abs=1e-10)
    assert found["head 2.1"][0].abs().max() > 1e-3
    assert not found["residual"][2].any()


def test_llamas_heads_share_the_values_of_their_group(family_model: Callable[[str], Path]) -> None:
    """Two heads, one group of values: W_V is the same, W_O is not."""
    model = made(family_model("Llama"))
    gates, transcoder = typical(model.lm, text()), model.transcoder
    block: Any = model.lm.weights.get_submodule("model.layers.1")
    last: Any = model.lm.weights.get_submodule("model.layers.2")
    found = dict(into(model, gates, 2, 3))
    width = D_MODEL // H
    for s in range(F):
        u = transcoder.W_dec[0][s, 0]
        v = normed(gates, "model.layers.1.input_layernorm", block.input_layernorm, u, centred=False)
        v = v @ block.self_attn.v_proj.weight.detach().T
        for head in range(H):
            moved = v @ block.self_attn.o_proj.weight.detach()[:, head * width : (head + 1) * width].T
            name = "model.layers.2.post_attention_layernorm"
            read = normed(gates, name, last.post_attention_layernorm, moved, centred=False)
            expected = float(read @ transcoder.encoders[2][3])
            assert float(found[f"head 1.{head}"][0, s]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2"])
def test_what_a_feature_gives_is_what_the_other_gets(family_model: Callable[[str], Path], family: str) -> None:
    model = made(family_model(family))
    gates = typical(model.lm, text())
    outputs = dict(out_of(model, gates, 0, 5))
    for layer, feature in ((1, 2), (2, 7)):
        inputs = dict(into(model, gates, layer, feature))
        for path, weights in inputs.items():
            assert float(outputs[path][layer, feature]) == pytest.approx(float(weights[0, 5]), abs=1e-10)
    assert outputs["head 2.1"][2].abs().max() > 1e-4
    assert not outputs["head 2.1"][:2].any()


def test_a_skip_path_is_part_of_the_residual_path(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2, arch="skip")
    gates = typical(model.lm, text())
    before = dict(into(model, gates, 2, 3))["residual"][0]
    assert model.transcoder.W_skip is not None
    model.transcoder.W_skip.zero_()
    assert (dict(into(model, gates, 2, 3))["residual"][0] - before).abs().max() > 1e-3


def test_counts_are_sums_over_tokens() -> None:
    B, L, D = 13, 3, 6
    threshold = FixedThreshold(oracle.normal(L, F, seed=3).abs() * 0.3)
    model = oracle.transcoder(oracle.arch_options("clt"), threshold, dtype=torch.float64)
    x = oracle.normal(B, L, D)
    a = model(x, True).features.detach()
    layer, feature = 1, int((a[:, 1] > 0).sum(dim=0).argmax())
    found = count(model, x.split(5), layer, feature)
    own = a[:, layer, feature]
    assert (found.n_tokens, found.own) == (B, pytest.approx(float(own.sum())))
    assert 1 < (own > 0).sum() < B
    V = oracle.normal(L, a.shape[2], seed=8)
    for l in range(L):
        for i in range(a.shape[2]):
            other = a[:, l, i]
            both = [b for b in range(B) if own[b] > 0 and other[b] > 0]
            assert int(found.tokens[l, i]) == len(both)
            mean = sum(float(own[b] * other[b]) for b in range(B)) / B
            as_target = mean / float(own.mean()) * float(V[l, i])
            as_source = mean / float(other.mean()) * float(V[l, i]) if other.any() else 0.0
            assert float(found.twera(True)[l, i] * V[l, i]) == pytest.approx(as_target, abs=1e-12)
            assert float(found.twera(False)[l, i] * V[l, i]) == pytest.approx(as_source, abs=1e-12)
            assert float(found.era(True)[l, i]) == pytest.approx(sum(float(other[b]) for b in both) / B, abs=1e-12)
            assert float(found.era(False)[l, i]) == pytest.approx(sum(float(own[b]) for b in both) / B, abs=1e-12)


def test_the_strongest_are_ranked_by_target_weighted_attribution_where_features_were_counted(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2)
    gates = typical(model.lm, text())
    weights = dict(into(model, gates, 2, 4))
    plain = strongest(model, gates, 2, 4, n=3).inputs
    best = weights["residual"].abs().flatten().topk(3).indices.tolist()
    assert [(row.path, row.layer * F + row.feature) for row in plain[:3]] == [("residual", i) for i in best]
    through = [(path, w.abs().max()) for path, w in weights.items() if path != "residual"]
    assert plain[3].path == max(through, key=lambda pair: float(pair[1]))[0]
    assert len(plain) == 6
    assert (plain[0].era, plain[0].twera, plain[0].tokens) == (None, None, None)
    x = torch.randn(40, N_LAYERS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = count(model.transcoder, [x], 2, 4)
    found = strongest(model, gates, 2, 4, n=3, together=together)
    score = (weights["residual"] * together.twera(True)).abs().flatten()
    assert [row.layer * F + row.feature for row in found.inputs[:3]] == score.topk(3).indices.tolist()
    first = found.inputs[0]
    assert first.twera == pytest.approx(float(together.twera(True)[first.layer, first.feature]) * first.weight)
    assert [row for row in found.outputs if row.path == "residual"] == [], "nothing lies above the last layer"


def test_features_that_there_are_not_are_refused(tiny_gpt2: Path) -> None:
    model = made(tiny_gpt2)
    gates = typical(model.lm, text())
    with pytest.raises(UserError, match=r"no feature 3/0; layers are 0 to 2, features 0 to 10"):
        strongest(model, gates, 3, 0)
    with pytest.raises(UserError, match="arch=molt has no attribution graph"):
        strongest(made(tiny_gpt2, arch="molt"), gates, 1, 0)
    with pytest.raises(UserError, match="two tokens or more"):
        typical(model.lm, text()[:, :1])


def test_a_crossing_of_one_models_layer_is_none_of_anothers(family_model: Callable[[str], Path]) -> None:
    """Layers that are not read keep their heads."""
    model: ReplacementModel = made(family_model("Llama"), first=1)
    found = dict(into(model, typical(model.lm, text()), 1, 3))
    assert {path.split(".")[0] for path in found} == {"residual", "head 0", "head 1", "head 2"}
    assert found["head 2.0"][0].abs().max() > 1e-4
    assert found["head 1.0"].abs().max() < 1e-12
