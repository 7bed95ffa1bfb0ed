"""What the linear architectures promise beyond the common contract: whom they write, how they fold, what they cost,
what they refuse."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.cost import flops
from pipeline.arch.options import ArchOptions, Site, Target, Tie
from pipeline.arch.table import ARCHS
from pipeline.core import activations
from pipeline.core.normalize import Scaling
from pipeline.core.options import ActivationOptions
from pipeline.errors import UserError
from pipeline.train import calibrate
from pipeline.train.objective import explain_error
from tests import oracle

B, L, F, D = 5, 4, 11, 6
P = L * (L + 1) // 2
BIASES = L * F + L * D

PARAMETERS: list[tuple[str, dict[str, Any], int]] = [
    ("clt", {}, (L + P) * F * D + BIASES),
    ("clt", {"max_reach": 0}, 2 * L * F * D + BIASES),
    ("clt", {"max_reach": 2}, (L + 3 * L - 3) * F * D + BIASES),
    ("clt", {"max_reach": 9, "skip": True}, (L + P) * F * D + BIASES + L * D * D),
    ("per_layer", {}, 2 * L * F * D + BIASES),
    ("skip", {}, 2 * L * F * D + BIASES + L * D * D),
    ("tied", {}, 2 * L * F * D + BIASES + P * F),
    ("tied", {"tie": Tie.target, "offset": True, "skip": True}, 2 * L * F * D + BIASES + 2 * P * F + L * D * D),
    ("tied", {"scale": False}, 2 * L * F * D + BIASES),
    ("sae", {}, 2 * L * F * D + BIASES),
    ("crosscoder", {}, 2 * L * F * D + F + L * D),
]


def model_of(architecture: str, activation: str = "topk", **options: Any) -> Any:
    return oracle.transcoder(oracle.arch_options(architecture, **options), activation, n_layers=L)


@pytest.mark.parametrize(("architecture", "options", "expected"), PARAMETERS)
def test_parameters_are_those_of_the_documented_formula(
    architecture: str, options: dict[str, Any], expected: int
) -> None:
    model = model_of(architecture, **options)
    assert model.n_parameters == expected


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (None, [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]),
        (0, [[0], [1], [2], [3]]),
        (1, [[0, 1], [1, 2], [2, 3], [3]]),
        (3, [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]),
        (50, [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]),
    ],
)
def test_a_reach_bounds_the_layers_that_are_written(reach: int | None, expected: list[list[int]]) -> None:
    model = model_of("clt", max_reach=reach)
    assert [list(model.targets(l)) for l in range(L)] == expected


def test_a_clt_that_reaches_no_further_is_a_per_layer_transcoder() -> None:
    clt, per_layer = model_of("clt", max_reach=0), model_of("per_layer")
    per_layer.load_weights(clt.weights())
    x = oracle.normal(B, L, D)
    assert torch.equal(clt(x).y_hat, per_layer(x).y_hat)
    assert clt.weights().keys() == per_layer.weights().keys()


def test_a_skip_path_starts_at_zero() -> None:
    rule = activations.build(oracle.activation_options("topk"), L, F)
    fresh = table.build(oracle.arch_options("skip"), Dims(L, D), rule)
    assert fresh.W_skip is not None
    assert fresh.W_skip.shape == (L, D, D)
    assert not fresh.W_skip.any()


@pytest.mark.parametrize("tie", list(Tie))
def test_tied_factors_start_at_one_and_offsets_at_zero(tie: Tie) -> None:
    rule = activations.build(oracle.activation_options("topk"), L, F)
    fresh = table.build(oracle.arch_options("tied", tie=tie, offset=True), Dims(L, D), rule)
    weights = fresh.weights()
    for l in range(L):
        assert torch.equal(weights[f"scale.{l}"], torch.ones(F, L - l))
        assert torch.equal(weights[f"offset.{l}"], torch.zeros(F, L - l))


def test_files_of_each_architecture_hold_the_documented_tensors() -> None:
    shapes = {
        "per_layer": {f"W_dec.{l}": (F, 1, D) for l in range(L)},
        "skip": {**{f"W_dec.{l}": (F, 1, D) for l in range(L)}, "W_skip": (L, D, D)},
        "sae": {f"W_dec.{l}": (F, 1, D) for l in range(L)},
        "tied": {"W_tied": (L, F, D), **{f"scale.{l}": (F, L - l) for l in range(L)}, "y_scale": (L, D)},
        "crosscoder": {"W_dec.0": (F, L, D)},
    }
    for architecture, expected in shapes.items():
        n_sources = 1 if architecture == "crosscoder" else L
        common = {"W_enc": (L, F, D), "b_enc": (n_sources, F), "b_dec": (L, D)}
        found = {name: tuple(weight.shape) for name, weight in model_of(architecture).weights().items()}
        assert found == common | expected, architecture


@pytest.mark.parametrize("architecture", ["clt", "skip", "tied", "crosscoder"])
def test_folding_scales_each_target_by_its_own_scale(architecture: str) -> None:
    """Against the formula: the effective decoder times S of the target, the encoder over s of the layer read."""
    model = model_of(architecture)
    W_enc, W_dec, b_dec = (model.W_enc, model.W_dec, model.b_dec.detach().clone())
    skip = None if model.W_skip is None else model.W_skip.detach().clone()
    maps = Scaling(*(oracle.normal(L, D, seed=n).abs() + n - 20 for n in range(20, 24)))
    model.fold(maps)
    assert oracle.normwise(model.W_enc, W_enc / maps.x_scale[:, None]) < 1e-12
    for l in range(model.n_sources):
        for slot, m in enumerate(model.targets(l)):
            assert oracle.normwise(model.W_dec[l][:, slot], W_dec[l][:, slot] * maps.y_scale[m]) < 1e-12
    expected = b_dec * maps.y_scale + maps.y_mean
    if skip is not None:
        folded = torch.stack([maps.y_scale[m][:, None] * skip[m] / maps.x_scale[m] for m in range(L)])
        assert oracle.normwise(model.W_skip, folded) < 1e-12
        expected = expected - torch.stack([folded[m] @ maps.x_mean[m] for m in range(L)])
    assert oracle.normwise(model.b_dec, expected) < 1e-12


def test_a_crosscoder_reads_all_layers_at_once() -> None:
    model, x = model_of("crosscoder", "relu"), oracle.normal(B, L, D)
    assert not model.causal
    assert oracle.normwise(model.encode(x), oracle.encode_all(x, model.W_enc, model.b_enc)) < 1e-12
    changed = x.clone()
    changed[:, L - 1] += 1
    assert not torch.equal(model(changed).y_hat[:, 0], model(x).y_hat[:, 0])


E = 2 * L * D * F  # encode
K = 2


@pytest.mark.parametrize(
    ("architecture", "options", "dense", "sparse"),
    [
        ("clt", {}, 2 * P * F * D, 2 * P * K * D),
        ("clt", {"max_reach": 1, "skip": True}, 2 * 7 * F * D + 2 * L * D * D, 2 * 7 * K * D + 2 * L * D * D),
        ("per_layer", {}, 2 * L * F * D, 2 * L * K * D),
        ("sae", {}, 2 * L * F * D, 2 * L * K * D),
        ("crosscoder", {}, 2 * L * F * D, 2 * L * K * D),
        ("tied", {}, 2 * P * F * D + P * F, 2 * P * K * D + P * K),
        ("tied", {"scale": False}, 2 * L * F * D, 2 * L * K * D),
        ("tied", {"tie": Tie.target}, 2 * L * F * D + 2 * P * F, 2 * P * K * D + P * K),
    ],
)
def test_arithmetic_is_counted_as_documented(
    architecture: str, options: dict[str, Any], dense: int, sparse: int
) -> None:
    model = model_of(architecture, **options)
    cost = flops(model, needs_pre_acts=False)
    assert cost[:3] == (E, dense, sparse)
    assert cost.step == pytest.approx(E + E * K / F + 3 * sparse)
    assert flops(model, needs_pre_acts=True).step == 2 * E + 3 * sparse
    relu = flops(model_of(architecture, "relu", **options), needs_pre_acts=False)
    assert relu == (E, dense, None, 2 * E + 3 * dense)


def test_arithmetic_counts_each_layers_own_k_and_the_ranks_of_a_mixture() -> None:
    rule = activations.build(ActivationOptions("topk", k_per_layer=[1, 2, 3, 5]), L, F)
    # Layer 0 writes four layers, layer 3 itself.
    assert flops(oracle.transcoder("clt", rule, n_layers=L), False).decode_sparse == 2 * D * (4 + 3 * 2 + 2 * 3 + 5)
    # 36 rows of U and of V for 11 transforms, each read and written once.
    assert flops(model_of("molt"), False)[:3] == (E, 2 * 2 * L * 36 * D, pytest.approx(2 * 2 * L * 36 * D * K / F))


def test_shapes_alone_suffice_to_count() -> None:
    with torch.device("meta"):
        rule = activations.build(oracle.activation_options("batchtopk"), 48, 65536)
        model = table.build(ArchOptions("clt", d_features=65536), Dims(48, 1600), rule)
    n_layers, d_model, d_features, pairs = 48, 1600, 65536, 48 * 49 // 2
    assert model.n_parameters == (n_layers + pairs) * d_features * d_model + n_layers * (d_features + d_model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (ArchOptions("clt", max_reach=-1), r"max_reach=-1 must be 0.*null"),
        (ArchOptions("per_layer", max_reach=2), r"max_reach has no meaning for arch=per_layer; leave it out"),
        (ArchOptions("per_layer", skip=True), r"skip has no meaning for arch=per_layer"),
        (ArchOptions("skip"), r"arch=skip has arch.skip=true always, not false"),
        (ArchOptions("sae"), r"arch=sae has arch.target=site always, not mlp_out"),
        (ArchOptions("sae", target=Target.site, skip=True), r"skip has no meaning for arch=sae"),
        (ArchOptions("crosscoder", skip=True), r"skip has no meaning for arch=crosscoder"),
        (ArchOptions("crosscoder", tie=Tie.target), r"tie has no meaning for arch=crosscoder"),
        (ArchOptions("clt", target=Target.site), r"target has no meaning for arch=clt"),
        (ArchOptions("tied", target=Target.site, skip=True), r"target has no meaning for arch=tied"),
        (ArchOptions("clt", scale=False), r"scale has no meaning for arch=clt"),
        (ArchOptions("clt", site=Site.mlp_out), r"site=mlp_out is what arch=clt is to predict; read arch.site=mlp_in"),
        (ArchOptions("tied", site=Site.mlp_out, skip=True), r"site=mlp_out is what arch=tied is to predict"),
        (ArchOptions("crosscoder", site=Site.mlp_out), r"arch=crosscoder arch.target=site"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_fix(options: ArchOptions, says: str) -> None:
    with pytest.raises(UserError, match=says):
        table.check(options)


@pytest.mark.parametrize("architecture", sorted(ARCHS))
@pytest.mark.parametrize("site", [Site.mlp_in, Site.resid_mid])
def test_every_architecture_reads_both_sites_before_the_mlp(architecture: str, site: Site) -> None:
    table.check(replace(oracle.arch_options(architecture), site=site))


def test_competing_across_one_feature_space_is_refused_with_the_rule_that_is_meant() -> None:
    options = oracle.arch_options("crosscoder")
    rule = activations.build(ActivationOptions("batchtopk_across", k=2), 1, F)
    with pytest.raises(UserError, match=r"one feature space.*same as batchtopk; use activation=batchtopk$"):
        table.build(options, Dims(L, D), rule)
    table.build(oracle.arch_options("clt"), Dims(1, D), rule)  # a model of one layer is another matter


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("clt", {"max_reach": 1}), ("skip", {}), ("tied", {}), ("tied", {"tie": Tie.target}), ("crosscoder", {})],
)
def test_dead_features_explain_the_error_through_the_effective_decoder(
    architecture: str, options: dict[str, Any]
) -> None:
    model, x = model_of(architecture, **options), oracle.normal(B, L, D)
    dead = torch.zeros(model.n_sources, F, dtype=torch.bool)
    dead[0, [3, 8]] = dead[-1] = True
    encode = oracle.encode_all if model.n_sources == 1 else oracle.encode
    h = encode(x, model.W_enc, model.b_enc).detach()
    chosen = set()
    for b in range(B):
        for l in range(model.n_sources):
            ids = [i for i in range(F) if dead[l, i]]
            order = sorted(ids, key=lambda i: -float(h[b, l, i]))
            chosen |= {(b, l, i) for i in order[: min(D // 2, len(ids))] if h[b, l, i] > 0}
    weights = {**model.weights(), "b_dec": torch.zeros(L, D)}
    linear = replace(model.options, skip=False)
    expected = oracle.reconstruct(linear, weights, oracle.at_pairs(h, chosen), x)
    assert oracle.normwise(explain_error(model, x, dead), expected) < 1e-12


@pytest.mark.parametrize("architecture", sorted(oracle.SUMS))
def test_calibrated_thresholds_fire_each_feature_as_often_as_its_rule(architecture: str) -> None:
    model, x = model_of(architecture, "batchtopk"), oracle.normal(103, L, D)
    before = calibrate.firing_counts(model, x, 16, 3)
    assert before.shape == (model.n_sources, F)
    theta = calibrate.thresholds(model, x, 16, 3)
    assert torch.equal((model.encode(x) > theta).sum(dim=0), before)
