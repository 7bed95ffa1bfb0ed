"""Initial weights: the published bounds, and what the data-dependent start promises."""

import pytest
import torch
from torch import Tensor

from pipeline.arch import init_random, init_rows, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Tie
from pipeline.core import activations
from pipeline.core.activations import BatchTopK, JumpReLU
from tests import oracle

L, F, D, N = 3, 128, 10, 400
NAMES = sorted(activations.ACTIVATIONS)


def blank(activation: str = "topk", d_features: int = F) -> Transcoder:
    rule = activations.build(oracle.activation_options(activation), L, d_features)
    return table.build(ArchOptions("clt", d_features=d_features), Dims(L, D), rule)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample() -> tuple[Tensor, Tensor]:
    """Inputs off zero and targets that depend on them."""
    x = oracle.normal(N, L, D, dtype=torch.float32) + oracle.normal(L, D, seed=2, dtype=torch.float32)
    y = torch.tanh(x) * 0.7 + 0.2 * x.roll(1, dims=2) - 0.5
    return x, y


def started(activation: str = "topk", d_features: int = F) -> tuple[Transcoder, Tensor, Tensor]:
    model, (x, y) = blank(activation, d_features), sample()
    init_rows.from_data(model, x, y, generator())
    return model, x, y


def test_uniform_weights_fill_the_bounds_of_the_recipe() -> None:
    model = blank()
    init_random.uniform(model, generator())
    weights = [(model.W_enc, F**-0.5), *((W, (L * D) ** -0.5) for W in model.W_dec)]
    for weight, bound in weights:
        assert weight.abs().max() <= bound
        assert weight.max() > 0.97 * bound
        assert weight.min() < -0.97 * bound
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not model.b_enc.any()
    assert not model.b_dec.any()


@pytest.mark.parametrize("start", ["uniform", "data"])
def test_the_seed_decides_the_weights(start: str) -> None:
    def weights(seed: int) -> list[Tensor]:
        model = blank()
        torch.manual_seed(seed + 100)  # not the generator that counts
        if start == "uniform":
            init_random.uniform(model, generator(seed % 2))
        else:
            init_rows.from_data(model, *sample(), generator(seed % 2))
        return [p.detach() for p in model.parameters()]

    first, again, other = weights(0), weights(2), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def drawn(model: Transcoder, x: Tensor, layer: int) -> list[int]:
    """Which row of the sample each feature of a layer looks along."""
    centred = x[:, layer].double() - x[:, layer].double().mean(dim=0)
    cosines = torch.nn.functional.normalize(centred, dim=1) @ model.encoders[layer].double().T
    assert (cosines.max(dim=0).values > 1 - 1e-6).all()
    return cosines.argmax(dim=0).tolist()


def test_features_look_along_different_inputs_with_unit_rows() -> None:
    model, x, _ = started()
    torch.testing.assert_close(model.W_enc.norm(dim=2), torch.ones(L, F))
    for l in range(L):
        assert len(set(drawn(model, x, l))) == F


def test_features_write_their_inputs_target_in_the_own_layer_only() -> None:
    model, x, y = started()
    for l in range(L):
        rows = drawn(model, x, l)
        x_centred, y_centred = x[:, l] - x[:, l].mean(dim=0), y[:, l] - y[:, l].mean(dim=0)
        expected = y_centred[rows] / x_centred[rows].norm(dim=1, keepdim=True)
        own, *later = model.tables(l)
        gain = float((own.detach() * expected).sum() / expected.square().sum())
        assert gain > 0
        assert oracle.normwise(own, gain * expected) < 1e-5
        assert not any(table.any() for table in later)


def test_a_choosing_rule_starts_centred_with_the_mean_target_as_bias() -> None:
    model, x, y = started("topk")
    torch.testing.assert_close(model.b_dec, y.mean(dim=0))
    for l in range(L):
        rows, centred = drawn(model, x, l), x[:, l] - x[:, l].mean(dim=0)
        h = model.encode_layer(x[:, l], l)
        torch.testing.assert_close(h, centred @ model.encoders[l].T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(h[rows, range(F)], centred[rows].norm(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", NAMES)
def test_the_gain_is_the_least_squares_one(activation: str) -> None:
    model, x, y = started(activation)
    y_hat = model.eval().requires_grad_(False)(x).y_hat
    for l in range(L):
        part, left = (y_hat - model.b_dec)[:, l].double(), (y - y_hat)[:, l].double()
        # At the minimum over the gain the error is orthogonal to what the gain multiplies.
        assert abs(float((part * left).sum())) < 1e-4 * float(part.norm() * left.norm())
        assert float(left.square().sum()) < float((y[:, l] - y[:, l].mean(dim=0)).square().sum())


@pytest.mark.parametrize("d_features", [40, 128])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_a_rule_that_does_not_choose_starts_at_the_wanted_firing_rate(activation: str, d_features: int) -> None:
    model, x, _ = started(activation, d_features)
    fires = (model.activation(model.encode(x)) > 0).sum(dim=0)
    wanted = round(min(0.5, init_rows.FIRING / d_features) * N)
    # One token lies at the threshold itself, where rounding decides.
    assert ((fires - wanted).abs() <= 1).all()


def test_another_firing_rate_can_be_asked_for() -> None:
    model, x, y = started("jumprelu", 128)
    init_rows.from_data(model, x, y, generator(), firing=16.0)
    fires = (model.activation(model.encode(x)) > 0).sum(dim=0)
    assert ((fires - round(16 / 128 * N)).abs() <= 1).all()


def test_blocks_of_features_get_the_same_bias_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, *_ = started("jumprelu", 40)
    monkeypatch.setattr(init_rows, "BLOCK", 7)
    blocks, *_ = started("jumprelu", 40)
    torch.testing.assert_close(whole.b_enc, blocks.b_enc, rtol=1e-5, atol=1e-5)


def test_initialisation_leaves_thresholds_and_what_a_rule_remembers_alone() -> None:
    jump, *_ = started("jumprelu")
    assert isinstance(jump.activation, JumpReLU)
    torch.testing.assert_close(jump.activation.threshold, torch.full((L, F), 0.3))
    # The moving average begins with training; the gain's look at the sample is not part of it.
    batch, *_ = started("batchtopk")
    assert isinstance(batch.activation, BatchTopK)
    assert not batch.activation.ema_weight.any()


def test_rows_are_drawn_once_each() -> None:
    directions = torch.nn.functional.normalize(oracle.normal(90, D, dtype=torch.float32), dim=1)
    for n in (1, 33, 70, 90):
        rows = init_rows.draw_apart(directions, n, generator()).tolist()
        assert len(rows) == n
        assert len(set(rows)) == n
        assert set(rows) <= set(range(90))


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_drawn_from_rare_directions_too(seed: int) -> None:
    # 500 inputs along one axis, one along each of two others: three rows are drawn one by one, a round each.
    directions = torch.zeros(502, 3)
    directions[:500, 0] = directions[500, 1] = directions[501, 2] = 1
    first = init_rows.draw_apart(directions, 2, generator(seed)).tolist()
    assert len({int(directions[row].argmax()) for row in first}) == 2


def test_rounds_remember_all_that_was_drawn_before() -> None:
    # 5,000 inputs along one axis, one along each of 63 others: 64 rows are drawn in three rounds, one along each axis.
    directions = torch.zeros(5063, 64)
    directions[:5000, 0] = 1
    directions[5000:, 1:] = torch.eye(63)
    rows = init_rows.draw_apart(directions, 64, generator())
    assert rows[0] < 5000
    assert sorted(directions[rows].argmax(dim=1).tolist()) == list(range(64))


def test_equal_inputs_are_drawn_once_each_too() -> None:
    rows = init_rows.draw_apart(torch.ones(60, 4) / 2, 50, generator()).tolist()
    assert len(set(rows)) == 50


@pytest.mark.parametrize("architecture", ["per_layer", "skip", "sae", "crosscoder", "tied", "tied to target"])
def test_every_architecture_starts_better_than_the_mean(architecture: str) -> None:
    tie = {"tie": Tie.target} if architecture == "tied to target" else {}
    options = oracle.arch_options(architecture.split()[0], d_features=F, **tie)
    rule = activations.build(oracle.activation_options("topk"), table.n_sources(options, Dims(L, D)), F)
    model, (x, y) = table.build(options, Dims(L, D), rule), sample()
    y = x if architecture == "sae" else y
    init_rows.from_data(model, x, y, generator())
    error = (model.eval()(x).y_hat - y).square().sum().detach()
    assert error < 0.9 * (y - y.mean(dim=0)).square().sum()
    torch.testing.assert_close(model.b_dec, y.mean(dim=0))
    assert all(any(tensor.any() for tensor in model.tables(l)) for l in range(model.n_sources))
    if architecture == "crosscoder":
        assert all(tensor.any() for tensor in model.tables(0))
    if architecture == "tied to target":  # feature i looks for the same token in every layer
        rows = [drawn(model, x, l) for l in range(L)]
        assert rows[0] == rows[1] == rows[2]


def test_tables_that_write_several_layers_are_scaled_together() -> None:
    options = oracle.arch_options("tied", d_features=F)
    rule = activations.build(oracle.activation_options("topk"), L, F)
    model, (x, y) = table.build(options, Dims(L, D), rule), sample()
    init_rows.from_data(model, x, y, generator())
    out = model.eval()(x)
    left = (y - out.y_hat).detach().double()
    for l in range(L):  # the error is orthogonal to what each table writes
        part = torch.zeros_like(left)
        for m in model.targets(l):
            part[:, m] = model.write(out.features, l, m).detach().double()
        assert abs(float((part * left).sum())) < 1e-3 * float(part.norm() * left.norm())


@pytest.mark.parametrize("architecture", ["tied", "crosscoder"])
def test_uniform_weights_fill_every_table_and_leave_factors_alone(architecture: str) -> None:
    options = oracle.arch_options(architecture, d_features=F)
    rule = activations.build(oracle.activation_options("topk"), table.n_sources(options, Dims(L, D)), F)
    model = table.build(options, Dims(L, D), rule)
    init_random.uniform(model, generator())
    assert all(t.any() for l in range(model.n_sources) for t in [*model.tables(l), model.encoders[l]])
    if architecture == "tied":
        assert all(torch.equal(model.weights()[f"scale.{l}"], torch.ones(F, L - l)) for l in range(L))
