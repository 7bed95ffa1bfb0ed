"""Every term of the loss against its sum written out, its gradient by hand, and the reductions."""

import pytest
import torch
from torch import Tensor

from pipeline.core import losses
from pipeline.core.activations import JumpReLU
from pipeline.core.options import ActivationOptions, ThetaGrad
from pipeline.core.sparse import Features, Pattern, Sparse, fixed_k, sparsify
from tests import oracle

B, L, F, D = 5, 3, 11, 6


def features(seed: int = 1) -> Tensor:
    """About half of them active; token 2 and layer 1 have none."""
    a = oracle.normal(B, L, F, seed=seed).relu()
    a[2] = 0
    a[:, 1] = 0
    return a


def grad(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs))


def test_reconstruction_is_a_mean_over_tokens_and_a_sum_over_layers_and_dimensions() -> None:
    y_hat, y = oracle.normal(B, L, D), oracle.normal(B, L, D, seed=2)
    y_hat.requires_grad_()
    loss = losses.reconstruction(y_hat, y)
    torch.testing.assert_close(loss.detach(), oracle.reconstruction(y_hat.detach(), y), rtol=1e-12, atol=0)
    assert oracle.normwise(grad(loss, y_hat)[0], 2 * (y_hat.detach() - y) / B) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reconstruction_has_the_bits_of_its_formula_under_autograd(dtype: torch.dtype) -> None:
    y_hat, y = (oracle.normal(B, L, D, seed=seed).to(dtype).requires_grad_() for seed in (3, 4))
    found, expected = losses.reconstruction(y_hat, y.float()), (y_hat - y.float()).square().sum() / B
    assert torch.equal(found, expected)
    for one, other in zip(grad(3 * found, y_hat, y), grad(3 * expected, y_hat, y), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def test_reconstruction_by_hand() -> None:
    # Two tokens, one layer, errors (3, 4) and (0, 0): mean of 25 and 0.
    y = torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]])
    y_hat = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]])
    assert float(losses.reconstruction(y_hat, y)) == 12.5


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("c", [1.0, 4.0])
def test_tanh_sparsity_equals_the_sum_and_its_gradient_reaches_features_and_norms(c: float, form: str) -> None:
    a, norms = features().requires_grad_(), oracle.normal(L, F, seed=2).abs().requires_grad_()
    given: Features = sparsify(a) if form == "sparse" else a
    loss = losses.tanh_sparsity(given, norms, c)
    torch.testing.assert_close(loss, oracle.tanh_sparsity(a, norms, c), rtol=1e-12, atol=0)
    # d tanh(u) = (1 - tanh(u)^2) du
    slope = (1 - torch.tanh(c * norms * a) ** 2).detach() / B
    d_a, d_norms = grad(loss, a, norms)
    expected = c * norms.detach() * slope
    if form == "sparse":
        expected = expected * (a.detach() > 0)
    assert oracle.normwise(d_a, expected) < 1e-12
    assert oracle.normwise(d_norms, (c * a.detach() * slope).sum(dim=0)) < 1e-12


def test_padding_adds_nothing_to_the_tanh_penalty() -> None:
    norms = oracle.normal(1, F).abs().requires_grad_()
    values = torch.tensor([0.7, 0.2, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    padded = Sparse([fixed_k(torch.tensor([[4, 2, 0], [0, 0, 0]]), F)], [values])
    loss = losses.tanh_sparsity(padded, norms, 1.0)
    torch.testing.assert_close(loss, oracle.tanh_sparsity(padded.dense(), norms, 1.0), rtol=1e-12, atol=0)
    assert grad(loss, norms)[0].nonzero().tolist() == [[0, 2], [0, 4]]


def test_the_tanh_penalty_of_no_feature_at_all_is_zero() -> None:
    empty = Pattern(torch.zeros(0, dtype=torch.int64), torch.zeros(B + 1, dtype=torch.int64), F)
    nothing = Sparse([empty] * L, [torch.zeros(0, dtype=torch.float64)] * L)
    assert float(losses.tanh_sparsity(nothing, oracle.normal(L, F).abs(), 1.0)) == 0


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.0, 3.0]])
def test_a_layers_weight_multiplies_its_error(weights: list[float]) -> None:
    y_hat, y = oracle.normal(B, L, D).requires_grad_(), oracle.normal(B, L, D, seed=2)
    w = torch.tensor(weights, dtype=torch.float64)
    loss = losses.reconstruction(y_hat, y, w)
    expected = oracle.weighted_reconstruction(y_hat.detach(), y, weights)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    assert oracle.normwise(grad(loss, y_hat)[0], 2 * w[:, None] * (y_hat.detach() - y) / B) < 1e-12


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_l1_sparsity_equals_the_sum_and_its_gradient_reaches_features_and_norms(form: str) -> None:
    a, norms = features().requires_grad_(), oracle.normal(L, F, seed=2).abs().requires_grad_()
    loss = losses.l1_sparsity(sparsify(a) if form == "sparse" else a, norms)
    torch.testing.assert_close(loss, oracle.l1_sparsity(a, norms), rtol=1e-12, atol=0)
    d_a, d_norms = grad(loss, a, norms)
    expected = norms.detach().expand_as(a) / B
    if form == "sparse":
        expected = expected * (a.detach() > 0)
    assert oracle.normwise(d_a, expected) < 1e-12
    assert oracle.normwise(d_norms, a.detach().sum(dim=0) / B) < 1e-12


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("target", [2.0, 9.0])
def test_the_l0_target_teaches_thresholds_through_the_window_and_nothing_else(target: float, eps: float) -> None:
    theta = oracle.normal(L, F, seed=2).abs() + 0.01
    rule = JumpReLU(ActivationOptions("jumprelu", threshold=1.0, bandwidth=eps, theta_grad=ThetaGrad.gdm), L, F)
    rule = rule.double()
    rule.log_threshold.data = theta.log()
    h = oracle.normal(B, L, F).requires_grad_()
    loss = losses.l0_target(rule.active(h), target)
    value, slope = oracle.l0_target(h.detach(), theta, eps, target)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-12)
    d_h, d_t = torch.autograd.grad(loss, [h, rule.log_threshold], materialize_grads=True)
    assert not d_h.any()
    assert slope.any()
    assert oracle.normwise(d_t, slope) < 1e-12


def test_the_l0_target_by_hand() -> None:
    # Two tokens with three and one active features: L0 is 2, half of the target.
    active = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    assert float(losses.l0_target(active, 4.0)) == 0.25
    assert float(losses.l0_target(active, 2.0)) == 0


def test_pre_activation_penalises_what_lies_below_zero() -> None:
    h = oracle.normal(B, L, F).requires_grad_()
    loss = losses.pre_activation(h)
    torch.testing.assert_close(loss.detach(), oracle.pre_activation(h.detach()), rtol=1e-12, atol=0)
    assert torch.equal(grad(loss, h)[0], -(h.detach() < 0).double() / B)


def test_january_pre_activation_penalises_what_lies_below_the_threshold() -> None:
    h, theta = oracle.normal(B, L, F).requires_grad_(), oracle.normal(L, F, seed=2).abs().requires_grad_()
    norms = oracle.normal(L, F, seed=3).abs().requires_grad_()
    loss = losses.pre_activation_january(h, theta, norms)
    expected = oracle.pre_activation_january(h.detach(), theta.detach(), norms.detach())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    below = (h < theta).double()
    d_h, d_theta, d_norms = grad(loss, h, theta, norms)
    assert oracle.normwise(d_h, -(below * norms).detach() / B) < 1e-12
    assert oracle.normwise(d_theta, (below * norms).detach().sum(dim=0) / B) < 1e-12
    assert oracle.normwise(d_norms, (below * (theta - h)).detach().sum(dim=0) / B) < 1e-12


@pytest.mark.parametrize("n_dead", [1, 2, 3, 4, 33])
def test_aux_k_equals_the_ratio_of_sums(n_dead: int) -> None:
    # d/2 = 3, so that 1 and 2 dead features are scaled down, 3 and more are not.
    error, error_hat = oracle.normal(B, L, D), oracle.normal(B, L, D, seed=2).requires_grad_()
    loss = losses.aux_k(error, error_hat, n_dead, 7.25)
    torch.testing.assert_close(loss.detach(), oracle.aux_k(error, error_hat.detach(), n_dead, 7.25), rtol=1e-12, atol=0)
    spread = (error - error.mean(dim=0)).square().sum()
    expected = min(1.0, n_dead / 3) * 7.25 * 2 * (error_hat.detach() - error) / spread
    assert oracle.normwise(grad(loss, error_hat)[0], expected) < 1e-12


def test_explaining_nothing_of_a_centred_error_costs_the_variance() -> None:
    error = oracle.normal(B, L, D)
    error -= error.mean(dim=0)
    torch.testing.assert_close(float(losses.aux_k(error, torch.zeros_like(error), 1000, 7.25)), 7.25)
    assert float(losses.aux_k(error, error, 1000, 7.25)) == 0


def twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def test_no_term_depends_on_the_number_of_tokens() -> None:
    a, h = features(), oracle.normal(B, L, F, seed=4)
    y_hat, y = oracle.normal(B, L, D), oracle.normal(B, L, D, seed=2)
    norms, theta = oracle.normal(L, F, seed=3).abs(), oracle.normal(L, F, seed=5).abs()
    pairs = [
        (losses.reconstruction(y_hat, y), losses.reconstruction(twice(y_hat), twice(y))),
        (losses.tanh_sparsity(a, norms, 1.0), losses.tanh_sparsity(twice(a), norms, 1.0)),
        (losses.tanh_sparsity(sparsify(a), norms, 1.0), losses.tanh_sparsity(sparsify(twice(a)), norms, 1.0)),
        (losses.reconstruction(y_hat, y, norms[:, 0]), losses.reconstruction(twice(y_hat), twice(y), norms[:, 0])),
        (losses.l1_sparsity(a, norms), losses.l1_sparsity(twice(a), norms)),
        (losses.l1_sparsity(sparsify(a), norms), losses.l1_sparsity(sparsify(twice(a)), norms)),
        (losses.l0_target((h > 0).double(), 3.0), losses.l0_target((twice(h) > 0).double(), 3.0)),
        (losses.pre_activation(h), losses.pre_activation(twice(h))),
        (losses.pre_activation_january(h, theta, norms), losses.pre_activation_january(twice(h), theta, norms)),
        (losses.aux_k(y, y_hat, 2, 7.25), losses.aux_k(twice(y), twice(y_hat), 2, 7.25)),
    ]
    for once, doubled in pairs:
        assert float(once) > 0
        torch.testing.assert_close(doubled, once, rtol=1e-12, atol=0)


def test_layers_and_features_are_summed_not_averaged() -> None:
    # The same layer three times costs three times as much.
    a, h = features()[:, :1], oracle.normal(B, 1, F)
    y_hat, y = oracle.normal(B, 1, D), oracle.normal(B, 1, D, seed=2)
    norms = oracle.normal(1, F, seed=3).abs()
    one, three = (1, 1, 1), (1, 3, 1)
    for loss in (
        lambda n: losses.reconstruction(y_hat.repeat(n), y.repeat(n)),
        lambda n: losses.tanh_sparsity(a.repeat(n), norms.repeat(n[1:]), 1.0),
        lambda n: losses.l1_sparsity(a.repeat(n), norms.repeat(n[1:])),
        lambda n: losses.pre_activation(h.repeat(n)),
        lambda n: losses.pre_activation_january(h.repeat(n), 0.1 + norms.repeat(n[1:]), norms.repeat(n[1:])),
    ):
        torch.testing.assert_close(loss(three), 3 * loss(one), rtol=1e-12, atol=0)
