"""Every start by its name: each architecture under each rule, and what each promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch import init, init_random, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Init
from pipeline.core import activations
from pipeline.core.normalize import Scaling
from pipeline.errors import UserError
from pipeline.train.inputs import Statistics, scaling
from pipeline.train.options import Norm
from tests import oracle
from tests.arch.test_init import NAMES, D, F, L, N, drawn, generator, sample


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
