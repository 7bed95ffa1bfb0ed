"""Initial weights: the published bounds, and what the data-dependent start promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch import init, init_random, init_rows, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Init, Tie
from pipeline.core import activations
from pipeline.core.activations import BatchTopK, JumpReLU
from pipeline.core.normalize import Scaling
from pipeline.errors import UserError
from pipeline.train.inputs import Statistics, scaling
from pipeline.train.options import Norm
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


# Every start by its name


def begun(
    start: str, activation: str = "topk", firing: float | None = None, variance: float | None = None, seed: int = 0
) -> tuple[Transcoder, Tensor, Tensor]:
    options = ArchOptions("clt", d_features=F, init=Init(start), init_firing=firing, init_variance=variance)
    rule = activations.build(oracle.activation_options(activation), L, F)
    model, (x, y) = table.build(options, Dims(L, D), rule), low_rank_sample()
    init.initialise(model, x, y, generator(seed))
    return model.requires_grad_(False), x, y


RANK = 4


def low_rank_sample() -> tuple[Tensor, Tensor]:
    """Inputs and targets off zero that vary in 4 of the 10 dimensions, other ones in each layer."""

    def site(seed: int) -> Tensor:
        values, mixed = oracle.normal(N, L, RANK, seed=seed), oracle.normal(L, RANK, D, seed=seed + 1)
        return (torch.einsum("nlr,lrd->nld", values, mixed) + oracle.normal(L, D, seed=seed + 2)).float()

    return site(30), site(40)


def outside(rows: Tensor, values: Tensor) -> float:
    """Share of the rows' length [F, D] outside the span in which `values` [n, D] vary about their mean."""
    centred = (values - values.mean(dim=0)).double()
    span = torch.linalg.svd(centred, full_matrices=False).Vh[:RANK]
    rows = rows.double()
    return float((rows - rows @ span.T @ span).norm() / rows.norm())


REFUSED = {("molt", Init.transposed)}
STARTS = [(a, start) for a in sorted(table.ARCHS) for start in Init if (a, start) not in REFUSED]
every_start = pytest.mark.parametrize(("architecture", "start"), STARTS)


@every_start
@pytest.mark.parametrize("activation", NAMES)
def test_every_architecture_starts_and_learns_under_every_rule_or_is_refused_in_a_line(
    architecture: str, start: Init, activation: str
) -> None:
    options, dims = oracle.arch_options(architecture, d_features=F, init=start), Dims(L, D)
    init.check(options, activation, N)
    rule = activations.build(oracle.activation_options(activation), table.n_sources(options, dims), F)
    if (architecture, activation) == ("crosscoder", "batchtopk_across"):
        with pytest.raises(UserError, match=r"^[^\n]*use activation=batchtopk$"):
            table.build(options, dims, rule)
        return
    model, (x, y) = table.build(options, dims, rule), sample()
    init.initialise(model, x, y, generator())
    before = float((model(x).y_hat - y).square().sum().detach())
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(6):
        adam.zero_grad()
        error = (model(x).y_hat - y).square().sum()
        error.backward()
        adam.step()
    assert float(error.detach()) < before


@pytest.mark.parametrize(("architecture", "start"), sorted(REFUSED))
def test_a_start_that_an_architecture_cannot_have_is_refused_in_a_line(architecture: str, start: Init) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*copies decoder rows, which arch=molt has not; use [^\n]*$"):
        init.check(oracle.arch_options(architecture, d_features=F, init=start), "topk", N)


def test_the_table_names_every_choice() -> None:
    assert set(init.INITS) == set(Init)


@pytest.mark.parametrize("start", Init)
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_start_is_decided_by_the_seed(start: str, activation: str) -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(17 + seed)
        return list(begun(start, activation, seed=seed)[0].parameters())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("start", Init)
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("share", [0.02, 0.25])
def test_any_start_fires_each_feature_at_the_share_that_is_asked_for(start: str, activation: str, share: float) -> None:
    model, x, _ = begun(start, activation, firing=share)
    fires = (model.activation(model.encode(x)) > 0).sum(dim=0)
    # One token lies at the threshold itself, where rounding decides.
    assert ((fires - share * N).abs() <= 1).all()


def test_a_transposed_encoder_is_the_own_slot_of_the_decoder_scaled() -> None:
    model, *_ = begun("transposed")
    for l, W in enumerate(model.W_dec):
        bound = ((L - l) * D) ** -0.5
        torch.testing.assert_close(model.W_enc[l], W[:, 0] * (D / F))
        assert 0.97 * bound < float(W.abs().max()) <= bound
        assert float(W.std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not model.b_enc.any()
    assert not model.b_dec.any()


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_a_zero_decoder_begins_at_the_mean_target(activation: str) -> None:
    model, x, y = begun("zero_decoder", activation)
    assert not any(W.any() for W in model.W_dec)
    y_hat = model(x).y_hat
    torch.testing.assert_close(y_hat, y.mean(dim=0).expand_as(y))
    torch.testing.assert_close(model.encode(x).mean(dim=0), torch.zeros(L, F), atol=1e-5, rtol=0)
    assert 0.97 * F**-0.5 < float(model.W_enc.abs().max()) <= F**-0.5


def test_rows_of_an_active_subspace_lie_where_the_sample_varies() -> None:
    model, x, y = begun("active_subspace", variance=1.0)
    lengths = []
    for l in range(L):
        assert outside(model.encoders[l], x[:, l]) < 1e-5
        assert torch.linalg.matrix_rank(model.encoders[l].double(), rtol=1e-5) == RANK
        lengths.append(model.encoders[l].square().sum(dim=1).mean())
        for m, rows in zip(range(l, L), model.tables(l), strict=True):
            assert outside(rows, y[:, m]) < 1e-5
            assert float(rows.square().sum(dim=1).mean()) == pytest.approx(1 / (3 * L), rel=0.2)
    # As long as rows of U(+-1/sqrt F): the mean square of the D numbers is 1 / (3 F).
    assert float(torch.stack(lengths).mean()) == pytest.approx(D / (3 * F), rel=0.15)
    torch.testing.assert_close(model.encode(x).mean(dim=0), torch.zeros(L, F), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.b_dec, y.mean(dim=0))


@pytest.mark.parametrize(("share", "kept"), [(0.5, 1), (0.66, 1), (0.67, 2), (0.96, 2), (0.97, 3), (1.0, 3)])
def test_the_fewest_components_that_keep_the_share_are_kept(share: float, kept: int) -> None:
    # Variances 18, 8 and 1 of 27 along three axes of five: shares .667, .963 and 1.
    values = torch.zeros(6, 5)
    for axis, size in ((1, 3.0), (4, 2.0), (2, 0.5**0.5)):
        values[2 * [1, 4, 2].index(axis), axis], values[2 * [1, 4, 2].index(axis) + 1, axis] = size, -size
    basis = init_random.components(values + 7, share)
    assert basis.shape == (kept, 5)
    torch.testing.assert_close(basis.abs(), torch.eye(5, dtype=torch.float64)[[1, 4, 2]][:kept])


def test_plainly_drawn_rows_are_inputs_once_each_and_not_those_drawn_apart() -> None:
    model, x, _ = begun("random_rows")
    apart, *_ = begun("data")
    for l in range(L):
        assert len(set(drawn(model, x, l))) == F
        assert set(drawn(model, x, l)) != set(drawn(apart, x, l))


@pytest.mark.parametrize("norm", Norm)
@every_start
def test_every_start_is_finite_under_both_normalisations(norm: Norm, start: Init, architecture: str) -> None:
    x, y = low_rank_sample()
    y[:, 1, 3] = 2.0  # a dimension that never varies
    maps = scaling(norm, statistics(x), statistics(y))
    options = oracle.arch_options(architecture, d_features=F, init=Init(start))
    dims = Dims(L, D)
    rule = activations.build(oracle.activation_options("jumprelu"), table.n_sources(options, dims), F)
    model = table.build(options, dims, rule)
    init.initialise(model, maps.x(x), maps.y(y), generator())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    out = model.eval().requires_grad_(False)(maps.x(x))
    error = float((out.y_hat - maps.y(y)).square().sum())
    assert error < 20 * float(maps.y(y).square().sum())


@every_start
def test_any_architecture_fires_at_the_share_that_is_asked_for(architecture: str, start: Init) -> None:
    x, y = low_rank_sample()
    options, dims = oracle.arch_options(architecture, d_features=F, init=Init(start), init_firing=0.1), Dims(L, D)
    rule = activations.build(oracle.activation_options("relu"), table.n_sources(options, dims), F)
    model = table.build(options, dims, rule)
    init.initialise(model, x, y, generator())
    assert (((model.encode(x) > 0).sum(dim=0) - 0.1 * N).abs() <= 1).all()


@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_folding_with_the_inverse_maps_brings_the_weights_back(architecture: str) -> None:
    model = oracle.transcoder(architecture, "relu")
    n_layers, d_model = model.dims
    maps = Scaling(*(oracle.normal(n_layers, d_model, seed=50 + i) for i in range(4)))
    maps = maps._replace(x_scale=maps.x_scale.exp(), y_scale=maps.y_scale.exp())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.fold(maps)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.fold(maps.inverse())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-10, atol=1e-10)


def statistics(values: Tensor) -> Statistics:
    values = values.double()
    spread = values.std(dim=0, unbiased=False)
    return Statistics(values.mean(dim=0), spread, values.square().mean(dim=(0, 2)).sqrt())


@pytest.mark.parametrize(
    ("changes", "activation", "message"),
    [
        ({"init": Init.data}, "topk", "draws 128 different rows"),
        ({"init": Init.random_rows}, "topk", "arch.init=random_rows draws 128"),
        ({"init": Init.uniform, "init_firing": 0.1}, "batchtopk", "no meaning for activation=batchtopk"),
        ({"init": Init.uniform, "init_firing": 0.0}, "relu", r"must lie in \(0, 0.5\]"),
        ({"init": Init.uniform, "init_firing": 0.7}, "jumprelu", r"must lie in \(0, 0.5\]"),
        ({"init": Init.uniform, "init_variance": 0.9}, "topk", "no meaning for arch.init=uniform"),
        ({"init": Init.active_subspace, "init_variance": 1.1}, "topk", r"must lie in \(0, 1\]"),
        ({"init": Init.active_subspace, "init_variance": 0.0}, "topk", r"must lie in \(0, 1\]"),
    ],
)
def test_options_without_meaning_are_refused(changes: dict[str, Any], activation: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        init.check(ArchOptions("clt", d_features=F, **changes), activation, n_rows=100)


def test_only_starts_that_look_at_the_sample_ask_for_one() -> None:
    assert not init.needs_sample(ArchOptions("clt", init=Init.uniform))
    assert not init.needs_sample(ArchOptions("clt", init=Init.transposed))
    assert init.needs_sample(ArchOptions("clt", init=Init.uniform, init_firing=0.1))
    assert init.needs_sample(ArchOptions("clt", init=Init.zero_decoder))
