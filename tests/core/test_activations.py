"""Activations against the rules written out pair by pair, and JumpReLU's gradients by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.core import activations
from pipeline.core.activations import ACTIVATIONS, OPTIONAL, USES, Activation, BatchTopK, FixedThreshold, JumpReLU
from pipeline.core.options import ActivationOptions, ThetaGrad
from pipeline.core.sparse import Sparse
from pipeline.errors import UserError
from tests import oracle

B, L, F = 5, 3, 11
NAMES = sorted(ACTIVATIONS)
CHOOSING = sorted(oracle.SELECTIONS)
BATCH_RULES = ["batchtopk", "batchtopk_across"]


def build(name: str, n_layers: int = L, d_features: int = F, **options: object) -> Activation:
    filled = replace(oracle.activation_options(name), **options)
    return activations.build(filled, n_layers, d_features).eval()


def jumprelu(theta: Tensor, bandwidth: float, rule: ThetaGrad) -> JumpReLU:
    """Thresholds [L, F] in float64."""
    rule_options = ActivationOptions("jumprelu", threshold=1.0, bandwidth=bandwidth, theta_grad=rule)
    activation = JumpReLU(rule_options, *theta.shape).double()
    activation.log_threshold.data = theta.log()
    return activation


def pairs(features: Tensor) -> oracle.Pairs:
    return {tuple(index) for index in (features != 0).nonzero().tolist()}


def choose(activation: Activation, h: Tensor) -> Tensor:
    """The sparse form of a rule, made dense."""
    layers = list(activation.choose([layer.clone() for layer in h.unbind(1)]))
    return Sparse([pattern for pattern, _ in layers], [values for _, values in layers]).dense()


def with_ties(seed: int) -> Tensor:
    """Small integers: nearly every cut falls on a tie, and rows have fewer positive values than k."""
    return torch.randint(-4, 4, (B, L, F), generator=torch.Generator().manual_seed(seed)).double()


# JumpReLU


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(ThetaGrad.anthropic, [-0.03, -0.03, 0.0]), (ThetaGrad.gdm, [-0.0009, -0.0009, 0.0])],
)
def test_jumprelu_gradients_of_the_published_example(rule: ThetaGrad, expected: list[float]) -> None:
    activation = jumprelu(torch.full((1, 3), 0.03, dtype=torch.float64), 1.0, rule)
    h = torch.tensor([[[0.2, -0.4, 0.6]]], dtype=torch.float64, requires_grad=True)
    activation(h).sum().backward()
    assert h.grad is not None
    assert h.grad.tolist() == [[[1.0, 0.0, 1.0]]]
    assert activation.log_threshold.grad is not None
    torch.testing.assert_close(activation.log_threshold.grad[0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rule", list(ThetaGrad))
@pytest.mark.parametrize("bandwidth", [1.0, 2.0, 0.1])
def test_jumprelu_equals_the_rule_written_out(rule: ThetaGrad, bandwidth: float) -> None:
    theta = oracle.normal(L, F, seed=2).abs() + 0.01
    h, g = oracle.normal(B, L, F, seed=3).requires_grad_(), oracle.normal(B, L, F, seed=4)
    activation = jumprelu(theta, bandwidth, rule)
    features = activation(h)
    features.backward(g)
    dh, dt = oracle.jumprelu_gradients(h.detach(), theta, bandwidth, g, rule)
    assert torch.equal(features, oracle.above(h.detach(), theta))
    assert h.grad is not None
    assert activation.log_threshold.grad is not None
    assert oracle.normwise(h.grad, dh) == 0
    assert oracle.normwise(activation.log_threshold.grad, dt) < 1e-12


@pytest.mark.parametrize("rule", list(ThetaGrad))
def test_jumprelu_window_is_open_and_the_step_strict(rule: ThetaGrad) -> None:
    # theta = 1 and bandwidth 1/2 are exact in binary, so the edges are met exactly.
    activation = jumprelu(torch.ones(1, 4, dtype=torch.float64), 0.5, rule)
    h = torch.tensor([[[1.0, 0.75, 1.25, 1.125]]], dtype=torch.float64, requires_grad=True)
    features = activation(h)
    features.sum().backward()
    assert features.tolist() == [[[0.0, 0.0, 1.25, 1.125]]]
    assert h.grad is not None
    assert h.grad.tolist() == [[[0.0, 0.0, 1.0, 1.0]]]
    assert activation.log_threshold.grad is not None
    assert activation.log_threshold.grad.tolist() == [[-2.0, 0.0, 0.0, -2.0]]


def test_jumprelu_thresholds_start_at_the_setting() -> None:
    activation = build("jumprelu", threshold=0.03)
    assert isinstance(activation, JumpReLU)
    torch.testing.assert_close(activation.threshold, torch.full((L, F), 0.03))
    assert activation.log_threshold.requires_grad


def test_fixed_thresholds_are_strict_and_of_each_feature() -> None:
    theta = oracle.normal(L, F, seed=5).abs()
    h = oracle.normal(B, L, F, seed=6)
    h[0] = theta
    features = FixedThreshold(theta)(h)
    assert torch.equal(features, oracle.above(h, theta))
    assert not features[0].any()


def test_relu_keeps_what_is_positive() -> None:
    h = oracle.normal(B, L, F)
    assert torch.equal(build("relu")(h), oracle.above(h, torch.zeros(L, F)))


# The TopK family


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("k", [1, 2, 5, F])
@pytest.mark.parametrize("name", CHOOSING)
def test_choosing_rules_equal_the_sorted_list(name: str, k: int, form: str) -> None:
    activation = build(name, k=k)
    for h in [oracle.normal(B, L, F, seed=7), -oracle.normal(B, L, F, seed=7).abs(), *map(with_ties, range(6))]:
        expected = oracle.at_pairs(h, oracle.SELECTIONS[name](h, k))
        got = activation(h) if form == "dense" else choose(activation, h)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", CHOOSING)
def test_ties_go_to_the_lowest_index_in_long_rows(name: str) -> None:
    # Sorting networks treat short and long rows differently; 1,500 equal values leave them no excuse.
    h = torch.ones(2, 2, 1500, dtype=torch.float64)
    h[1, :, 700] = 2.0
    activation = build(name, n_layers=2, d_features=1500, k=3)
    expected = oracle.SELECTIONS[name](h, 3)
    assert pairs(activation(h)) == expected
    assert pairs(choose(activation, h)) == expected


def test_topk_of_a_row_by_hand() -> None:
    h = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 2.0]], [[-1.0, -2.0, 0.0, 0.5, -3.0]]])
    features = build("topk", n_layers=1, d_features=5, k=2)(h)
    assert features.tolist() == [[[0, 3, 3, 0, 0]], [[0, 0, 0, 0.5, 0]]]


def test_batchtopk_lets_tokens_compete_within_a_layer_and_across_layers_by_hand() -> None:
    # Two tokens, two layers, three features, k = 1.
    h = torch.tensor([[[9.0, 8.0, 1.0], [5.0, -1.0, 0.0]], [[7.0, 0.5, 0.0], [4.0, 3.0, 2.0]]])
    per_layer = build("batchtopk", n_layers=2, d_features=3, k=1)(h)
    across = build("batchtopk_across", n_layers=2, d_features=3, k=1)(h)
    assert per_layer.tolist() == [[[9, 8, 0], [5, 0, 0]], [[0, 0, 0], [4, 0, 0]]]
    assert across.tolist() == [[[9, 8, 0], [5, 0, 0]], [[7, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("name", CHOOSING)
def test_the_gradient_of_a_choosing_rule_reaches_the_chosen_pairs_only(name: str) -> None:
    h, g = oracle.normal(B, L, F, seed=8).requires_grad_(), oracle.normal(B, L, F, seed=9)
    build(name, k=3)(h).backward(g)
    assert h.grad is not None
    assert torch.equal(h.grad, oracle.at_pairs(g, oracle.SELECTIONS[name](h.detach(), 3)))


@pytest.mark.parametrize("name", BATCH_RULES)
@pytest.mark.parametrize("remembered", [1e-3, 0.5, 1.0, 2.0, 4.0, 5.0, 8.0, 1e6])
def test_what_a_batch_rule_remembers_never_changes_what_it_chooses(name: str, remembered: float) -> None:
    for k in (1, 2, 4):
        for seed in range(6):
            activation = build(name, k=k)
            assert isinstance(activation, BatchTopK)
            activation.threshold_ema.fill_(remembered)
            activation.ema_weight.fill_(1.0)
            for h in (with_ties(seed), 2 * oracle.normal(B, L, F, seed=seed)):
                assert pairs(activation(h)) == oracle.SELECTIONS[name](h, k)


@pytest.mark.parametrize("name", BATCH_RULES)
def test_a_batch_rule_keeps_to_its_budget_when_just_that_many_values_stand_out(name: str) -> None:
    # k B values far above what was chosen before, every other positive value far below.
    h = torch.tensor([[[4.0, 0.1, 0.2]], [[3.0, 0.3, -1.0]]])
    activation = build(name, n_layers=1, d_features=3, k=1)
    assert isinstance(activation, BatchTopK)
    activation.threshold_ema.fill_(3.0)
    activation.ema_weight.fill_(1.0)
    assert activation(h).tolist() == [[[4, 0, 0]], [[3, 0, 0]]]
    assert choose(activation, h).tolist() == [[[4, 0, 0]], [[3, 0, 0]]]


@pytest.mark.parametrize("n", [1, 2, 7, 40, 41, 1000])
@pytest.mark.parametrize("guess", [0.0, 0.5, 1.0, 2.5, 3.75, 100.0])
def test_the_largest_values_are_found_whatever_the_guess(n: int, guess: float) -> None:
    for seed in range(4):
        for flat in (with_ties(seed).relu().reshape(-1), oracle.normal(60, seed=seed).relu(), torch.zeros(60)):
            order = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))
            expected = sorted(i for i in order[:n] if flat[i] > 0)
            positions, smallest = activations.largest(flat, n, guess)
            assert positions.tolist() == expected
            assert float(smallest) == min((float(flat[i]) for i in expected), default=0.0)


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("name", BATCH_RULES)
def test_batch_rules_follow_the_smallest_chosen_value_with_bias_correction(name: str, form: str) -> None:
    activation = build(name, k=2).train()
    assert isinstance(activation, BatchTopK)
    seen: list[list[float]] = [[] for _ in range(L)]
    for step in range(4):
        h = oracle.normal(B, L, F, seed=20 + step)
        features = activation(h) if form == "dense" else choose(activation, h)
        whole = features[features > 0].min()
        for l in range(L):
            smallest = whole if name == "batchtopk_across" else features[:, l][features[:, l] > 0].min()
            seen[l].append(float(smallest))
        # sum_s beta^(t - s) (1 - beta) v_s / (1 - beta^t)
        weights = [0.999 ** (step - s) for s in range(step + 1)]
        expected = [sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights) for values in seen]
        torch.testing.assert_close(activation.threshold, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", BATCH_RULES)
def test_batch_rules_learn_their_threshold_in_training_only_and_from_positive_values_only(name: str) -> None:
    activation = build(name, k=2)
    assert isinstance(activation, BatchTopK)
    activation(oracle.normal(B, L, F))
    assert not activation.threshold.any()
    activation.train()
    activation(-oracle.normal(B, L, F).abs())
    assert not activation.threshold.any()
    h = oracle.normal(B, L, F).abs() + 1
    h[:, 1] = -1.0
    features = activation(h)
    # Neither the batch before nor layer 1, where nothing was chosen, counts as a value of 0.
    if name == "batchtopk_across":
        expected = [float(features[features > 0].min())] * L
    else:
        expected = [float(layer[layer > 0].min()) if layer.any() else 0.0 for layer in features.unbind(1)]
    torch.testing.assert_close(activation.threshold, torch.tensor(expected, dtype=torch.float64))


# All entries of the table


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_is_its_pre_activation_or_zero_and_never_negative(name: str) -> None:
    h = oracle.normal(B, L, F)
    features = build(name)(h)
    assert features.shape == h.shape
    assert (features >= 0).all()
    assert torch.equal(features[features > 0], h[features > 0])
    assert (features > 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_no_rule_fires_on_zeros_or_below(name: str) -> None:
    assert not build(name)(torch.zeros(B, L, F)).any()
    assert not build(name)(-oracle.normal(B, L, F).abs()).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_says_per_token_looks_at_no_other_token_and_no_other_layer(name: str) -> None:
    activation = build(name)
    h = oracle.normal(B, L, F)
    features = activation(h)
    changed = h.clone()
    changed[2] += 5 * oracle.normal(L, F, seed=30).abs()
    others = [0, 1, 3, 4]
    unmoved = torch.equal(activation(changed)[others], features[others])
    assert unmoved == activation.per_token
    if activation.per_token:
        changed = h.clone()
        changed[:, 1] += 5.0
        assert torch.equal(activation(changed)[:, [0, 2]], features[:, [0, 2]])
        for l in range(L):
            assert torch.equal(activation.layer(h[:, l], l), features[:, l])


@pytest.mark.parametrize("name", [name for name in NAMES if ACTIVATIONS[name].chooses])
def test_both_forms_of_a_choosing_rule_agree(name: str) -> None:
    for h in (oracle.normal(B, L, F), with_ties(1), -oracle.normal(B, L, F).abs()):
        assert torch.equal(choose(build(name), h), build(name)(h))


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_the_rule_does_not_read_is_refused_by_name(name: str) -> None:
    values = {"k": 2, "threshold": 0.1, "bandwidth": 1.0, "theta_grad": ThetaGrad.gdm}
    for option in values.keys() - USES[name]:
        wrong = replace(oracle.activation_options(name), **{option: values[option]})
        with pytest.raises(UserError, match=rf"activation\.{option} .*{name}"):
            activations.build(wrong, L, F)


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_the_rule_needs_must_be_given(name: str) -> None:
    for option in USES[name] - OPTIONAL:
        missing = replace(oracle.activation_options(name), **{option: None})
        with pytest.raises(UserError, match=rf"activation\.{option}"):
            activations.build(missing, L, F)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *[(name, "k", value) for name in CHOOSING for value in (0, -1, F + 1)],
        ("jumprelu", "threshold", 0.0),
        ("jumprelu", "threshold", -0.1),
        ("jumprelu", "bandwidth", 0.0),
    ],
)
def test_values_out_of_range_are_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"activation\.{option}="):
        build(name, **{option: value})


def test_an_unknown_rule_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(UserError, match=r"relu6.*jumprelu"):
        activations.build(ActivationOptions("relu6"), L, F)


def test_the_two_published_threshold_rules_differ_by_the_threshold() -> None:
    theta = torch.tensor([[0.03]], dtype=torch.float64)
    grads = []
    for rule in (ThetaGrad.anthropic, ThetaGrad.gdm):
        activation = jumprelu(theta, 1.0, rule)
        activation(torch.full((B, 1, 1), 0.2, dtype=torch.float64)).sum().backward()
        assert activation.log_threshold.grad is not None
        grads.append(float(activation.log_threshold.grad))
    assert math.isclose(grads[0], -B * 0.03, rel_tol=1e-12)
    assert math.isclose(grads[1] / grads[0], 0.03, rel_tol=1e-12)
