"""The MLP's frozen norm and the maps between units, against their formulas; scalings from statistics."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.core.normalize import MlpNorm, Scaling
from pipeline.train import inputs
from pipeline.train.inputs import Statistics
from pipeline.train.options import Norm
from tests import oracle

N, L, D = 9, 3, 6


def norm(kind: str, eps: float = 0.1) -> MlpNorm:
    """eps is large, so that a forgotten or misplaced one shows."""
    return MlpNorm(kind, oracle.normal(L, D, seed=2), oracle.normal(L, D, seed=3), eps)


def by_hand(r: Tensor, kind: str, gain: Tensor, bias: Tensor, eps: float) -> list[float]:
    """One token of one layer."""
    values = r.tolist()
    mean = sum(values) / len(values) if kind == "layer" else 0.0
    square = sum((v - mean) ** 2 for v in values) / len(values)
    pairs = zip(values, gain.tolist(), bias.tolist(), strict=True)
    return [(v - mean) / math.sqrt(square + eps) * g + b for v, g, b in pairs]


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_mlp_norm_equals_its_formula(kind: str) -> None:
    resid, n = oracle.normal(N, L, D) + 1, norm(kind)
    got = n(resid)
    for b in range(N):
        for l in range(L):
            expected = by_hand(resid[b, l], kind, n.gain[l], n.bias[l], n.eps)
            assert got[b, l].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_one_layer_of_the_mlp_norm_is_that_layer_of_all(kind: str) -> None:
    resid, n = oracle.normal(N, L, D), norm(kind)
    for l in range(L):
        assert torch.equal(n.layer(resid[:, l], l), n(resid)[:, l])
        assert torch.equal(n.layer(resid[:, l].reshape(3, 3, D), l), n(resid)[:, l].reshape(3, 3, D))


def test_the_mlp_norm_computes_bfloat16_rows_in_float32() -> None:
    resid = oracle.normal(N, L, D).bfloat16()
    n = MlpNorm("layer", torch.ones(L, D), torch.zeros(L, D), 1e-5)
    assert n(resid).dtype == torch.float32
    assert torch.equal(n(resid), n(resid.float()))
    exact = MlpNorm("layer", torch.ones(L, D).double(), torch.zeros(L, D).double(), 1e-5)(resid.double())
    assert oracle.normwise(n(resid), exact) < 1e-6


def scaling() -> Scaling:
    return Scaling(
        oracle.normal(L, D, seed=4),
        oracle.normal(L, D, seed=5).abs() + 0.5,
        oracle.normal(L, D, seed=6),
        oracle.normal(L, D, seed=7).abs() + 0.5,
    )


def test_units_are_mapped_by_mean_and_scale_of_each_layer_and_dimension() -> None:
    maps, x, y = scaling(), oracle.normal(N, L, D), oracle.normal(N, L, D, seed=2)
    for b in range(N):
        for l in range(L):
            for d in range(D):
                x_unit = (float(x[b, l, d]) - float(maps.x_mean[l, d])) / float(maps.x_scale[l, d])
                y_unit = (float(y[b, l, d]) - float(maps.y_mean[l, d])) / float(maps.y_scale[l, d])
                assert float(maps.x(x)[b, l, d]) == pytest.approx(x_unit, rel=1e-12)
                assert float(maps.y(y)[b, l, d]) == pytest.approx(y_unit, rel=1e-12)
    torch.testing.assert_close(maps.y_inverse(maps.y(y)), y, rtol=1e-12, atol=1e-14)


# From the cache's statistics


def rows(seed: int) -> Tensor:
    """Layers and dimensions of unequal scale, off zero."""
    scale = torch.tensor([1.0, 30.0, 0.05])[:, None] * torch.linspace(0.5, 2, D)
    return oracle.normal(400, L, D, seed=seed) * scale + scale * oracle.normal(L, D, seed=seed + 10)


def statistics(values: Tensor) -> Statistics:
    values = values.double()
    return Statistics(values.mean(0), values.var(0, correction=0).sqrt(), values.square().mean(dim=(0, 2)).sqrt())


def test_rms_scaling_is_one_number_for_each_layer_and_centres_nothing() -> None:
    x, y = rows(1), rows(2)
    maps = inputs.scaling(Norm.rms, statistics(x), statistics(y))
    assert not maps.x_mean.any()
    assert not maps.y_mean.any()
    for values, scale in ((maps.x(x), maps.x_scale), (maps.y(y), maps.y_scale)):
        assert (scale == scale[:, :1]).all()
        torch.testing.assert_close(values.square().mean(dim=(0, 2)), torch.ones(L).double(), rtol=1e-6, atol=0)


def test_standard_scaling_centres_and_scales_each_dimension() -> None:
    x, y = rows(1), rows(2)
    maps = inputs.scaling(Norm.standard, statistics(x), statistics(y))
    for values in (maps.x(x), maps.y(y)):
        torch.testing.assert_close(values.mean(dim=0), torch.zeros(L, D).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(values.square().mean(dim=0), torch.ones(L, D).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", list(Norm))
def test_what_never_varies_is_left_unscaled(kind: Norm) -> None:
    x, y = rows(1), rows(2)
    x[:, 1] = 0.0
    y[:, 0, 3] = 2.0
    maps = inputs.scaling(kind, statistics(x), statistics(y))
    assert torch.isfinite(maps.x(x)).all()
    assert torch.isfinite(maps.y(y)).all()
    assert (maps.x_scale[1] == 1).all()
    assert (maps.x_scale[0] != 1).all()


@pytest.mark.parametrize("kind", list(Norm))
def test_the_variance_is_that_of_the_targets_in_the_transcoders_units(kind: Norm) -> None:
    y = rows(2)
    y[:, 0, 3] = 2.0
    maps = inputs.scaling(kind, statistics(rows(1)), statistics(y))
    unit = maps.y(y)
    expected = sum(float((unit[:, m] - unit[:, m].mean(0)).square().sum() / len(y)) for m in range(L))
    assert inputs.variance(statistics(y), maps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("site", ["mlp_in", "resid_mid"])
def test_inputs_are_normed_only_where_the_transcoder_reads_behind_the_norm(site: str) -> None:
    resid, mlp_out = rows(1)[:N].bfloat16(), rows(2)[:N].bfloat16()
    n = MlpNorm("layer", torch.rand(L, D) + 0.5, torch.rand(L, D), 1e-5)
    maps = Scaling(*(t.float() for t in scaling()))
    prepare = inputs.build(n, inputs.Site(site), maps, torch.device("cpu"))
    x, y = prepare(resid, mlp_out)
    read = n(resid.float()) if site == "mlp_in" else resid.float()
    assert x.dtype == y.dtype == torch.float32
    torch.testing.assert_close(x, (read - maps.x_mean) / maps.x_scale)
    torch.testing.assert_close(y, (mlp_out.float() - maps.y_mean) / maps.y_scale)
    raw_x, raw_y = prepare.raw(resid, mlp_out)
    torch.testing.assert_close(raw_x, read)
    assert torch.equal(raw_y, mlp_out.float())


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("site", ["mlp_in", "resid_mid", "mlp_out"])
@pytest.mark.parametrize("target", ["mlp_out", "site"])
def test_inputs_are_the_formulas_to_the_bit_and_leave_what_was_stored_alone(kind: str, site: str, target: str) -> None:
    resid, mlp_out = rows(1)[:N].float(), rows(2)[:N].float()
    n = MlpNorm(kind, torch.rand(L, D) + 0.5, torch.rand(L, D), 1e-5)
    maps = Scaling(*(t.float() for t in scaling()))
    prepare = inputs.build(n, inputs.Site(site), maps, torch.device("cpu"), inputs.Target(target))
    before = resid.clone(), mlp_out.clone()
    x, y = prepare(resid, mlp_out)
    expected = inputs.pair(inputs.Site(site), inputs.Target(target), n, resid, mlp_out)
    assert torch.equal(x, maps.x(expected[0]))
    assert torch.equal(y, maps.y(expected[1]))
    assert torch.equal(resid, before[0])
    assert torch.equal(mlp_out, before[1])


def test_the_inverse_maps_undo_the_maps() -> None:
    maps = Scaling(*(torch.randn(3, 4, dtype=torch.float64) for _ in range(4)))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    back = maps.inverse()
    torch.testing.assert_close(back.x(maps.x(x)), x)
    torch.testing.assert_close(back.y(maps.y(x)), x)
    torch.testing.assert_close(back.y_inverse(maps.y_inverse(x)), x)
