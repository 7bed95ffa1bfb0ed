"""Fixed thresholds: the same firing counts as the rule they stand in for, feature by feature."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core import activations
from pipeline.core.activations import BatchTopK, FixedThreshold, JumpReLU
from pipeline.core.normalize import Scaling
from pipeline.core.options import Rank
from pipeline.train import calibrate
from tests import oracle

N, L, F, D = 103, 3, 11, 6
BATCH, SEED = 16, 3
"""103 = 6 * 16 + 7: the last batch is a smaller one."""
CHOOSING = sorted(oracle.SELECTIONS)


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return oracle.normal(N, L, D, dtype=dtype), oracle.normal(N, L, D, seed=2, dtype=dtype)


def model_of(activation: str, dtype: torch.dtype = torch.float32) -> Transcoder:
    """Feature 5 of layer 1 never fires."""
    model = oracle.transcoder("clt", activation, dtype=dtype)
    with torch.no_grad():
        model.b_enc[1, 5] = -50.0
    return model


def counts_by_rule(model: Transcoder, x: Tensor, activation: str) -> Tensor:
    """The training rule on the shuffled batches, pair by pair."""
    counts = torch.zeros(L, F, dtype=torch.int64)
    for batch in calibrate.shuffled_batches(N, BATCH, SEED):
        for _, l, i in oracle.SELECTIONS[activation](model.encode(x[batch]), 2):
            counts[l, i] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", CHOOSING)
def test_each_feature_fires_as_often_after_calibration_as_before(activation: str, dtype: torch.dtype) -> None:
    model, (x, _) = model_of(activation, dtype), rows(dtype)
    before = counts_by_rule(model, x, activation)
    assert torch.equal(calibrate.firing_counts(model, x, BATCH, SEED), before)
    assert before[1, 5] == 0
    theta = calibrate.thresholds(model, x, BATCH, SEED)
    model.activation = FixedThreshold(theta)
    assert torch.equal((model(x).features > 0).sum(dim=0), before)
    assert torch.equal(calibrate.firing_counts(model, x, BATCH, SEED), before)
    assert torch.equal(calibrate.firing_counts(model, x, 1, SEED), before)  # whatever the batch


@pytest.mark.parametrize("options", [{"rank": Rank.norm}, {"rank": Rank.norm, "k": None, "k_per_layer": [1, 4, 2]}])
@pytest.mark.parametrize("activation", CHOOSING)
def test_the_counts_of_a_rule_that_ranks_by_norm_or_differs_by_layer_hold_too(
    activation: str, options: dict[str, Any]
) -> None:
    if activation == "batchtopk_across" and "k_per_layer" in options:
        options = {"rank": Rank.norm, "k": 4}
    rule = replace(oracle.activation_options(activation), **options)
    model, (x, _) = oracle.transcoder("clt", activations.build(rule, L, F), dtype=torch.float32), rows()
    with torch.no_grad():  # unequal decoders, one of them zero
        for l in range(L):
            for table in model.tables(l):
                table.mul_(torch.linspace(0, 3, F)[:, None])
    norms = oracle.decoder_norms([W.detach() for W in model.W_dec])
    k = rule.k if rule.k is not None else rule.k_per_layer
    before = torch.zeros(L, F, dtype=torch.int64)
    for batch in calibrate.shuffled_batches(N, BATCH, SEED):
        for _, l, i in oracle.SELECTIONS[activation](model.encode(x[batch]).detach() * norms, k):
            before[l, i] += 1
    assert torch.equal(calibrate.firing_counts(model, x, BATCH, SEED), before)
    theta = calibrate.thresholds(model, x, BATCH, SEED)
    assert (theta >= 0).all()
    model.activation = FixedThreshold(theta)
    assert torch.equal(calibrate.firing_counts(model, x, BATCH, SEED), before)


@pytest.mark.parametrize("activation", CHOOSING)
def test_each_feature_fires_as_often_in_the_models_units_as_before(activation: str) -> None:
    # What is written to disk is folded: pre-activations are the same numbers but for their last bits. Most of these
    # 300 features are never chosen.
    model = oracle.transcoder("clt", activation, n_layers=L, d_features=300, d_model=24, dtype=torch.float32)
    x = oracle.normal(N, L, 24, dtype=torch.float32)
    before = calibrate.firing_counts(model, x, BATCH, SEED)
    model.activation = FixedThreshold(calibrate.thresholds(model, x, BATCH, SEED))
    scale = oracle.normal(L, 1, seed=9, dtype=torch.float32).abs() + 0.5
    zero = torch.zeros(L, 24)
    maps = Scaling(zero, scale.expand(L, 24), zero, scale.expand(L, 24))
    model.fold(maps)
    after = calibrate.firing_counts(model, x * maps.x_scale, BATCH, SEED)
    assert (before == 0).sum() > 100
    assert torch.equal(after[before > 0], before[before > 0])
    assert torch.equal(after, before)


@pytest.mark.parametrize("activation", CHOOSING)
def test_thresholds_are_midpoints_at_the_firing_count(activation: str) -> None:
    model, (x, _) = model_of(activation, torch.float64), rows(torch.float64)
    theta = calibrate.thresholds(model, x, BATCH, SEED)
    h = oracle.encode(x, model.W_enc, model.b_enc).detach()
    counts = counts_by_rule(model, x, activation)
    for l in range(L):
        for i in range(F):
            values = sorted([*h[:, l, i].clamp(min=0).tolist(), 0.0], reverse=True)
            n = int(counts[l, i])
            if n:
                assert float(theta[l, i]) == pytest.approx((values[n - 1] + values[n]) / 2, rel=1e-5)
            else:  # never chosen: just above all that was seen
                assert values[0] * (1 - 1e-6) <= float(theta[l, i]) <= values[0] * 1.01 + 1e-6
    assert (theta >= 0).all()


def test_blocks_of_features_get_the_same_thresholds_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, _) = model_of("batchtopk"), rows()
    whole = calibrate.thresholds(model, x, BATCH, SEED)
    monkeypatch.setattr(calibrate, "FEATURES_AT_ONCE", 4)
    torch.testing.assert_close(calibrate.thresholds(model, x, BATCH, SEED), whole, rtol=1e-6, atol=1e-6)


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ((3.0, 1.0, 2.0), 1, 2.5),
        ((3.0, 1.0, 2.0), 2, 1.5),
        ((3.0, 1.0, 2.0), 3, 0.5),  # the next lower value that counts is 0
        ((3.0, -5.0, 2.0), 2, 1.0),  # and never one below it
    ],
)
def test_a_threshold_at_its_count_by_hand(values: tuple[float, ...], count: int, expected: float) -> None:
    theta = calibrate.at_count(column(*values), torch.tensor([count]))
    assert theta.tolist() == [expected]
    assert int((column(*values) > theta).sum()) == count


@pytest.mark.parametrize("values", [(3.0, 1.0, 2.0), (-3.0, -1.0, -2.0), (0.0, 0.0, 0.0)])
def test_a_feature_that_was_never_chosen_does_not_fire(values: tuple[float, ...]) -> None:
    theta = calibrate.at_count(column(*values), torch.tensor([0]))
    assert not (column(*values) > theta).any()
    assert 0 <= float(theta) <= 3.1


@pytest.mark.parametrize("below", [1.0, 1e-30, 0.1, 3e5])
def test_neighbouring_floats_are_still_separated(below: float) -> None:
    # No float lies between them: the midpoint rounds to one of the two, and it must be the right one.
    low = torch.tensor(below)
    high = torch.nextafter(low, torch.tensor(torch.inf))
    for low_end, high_end in ((low, high), (high, torch.nextafter(high, torch.tensor(torch.inf)))):
        h = torch.stack([low_end, high_end])[:, None]
        theta = calibrate.at_count(h, torch.tensor([1]))
        assert (h > theta).tolist() == [[False], [True]]


def test_counts_of_many_columns_hold_at_once() -> None:
    h = oracle.normal(40, F, seed=7, dtype=torch.float32)
    positive = (h > 0).sum(dim=0)
    counts = torch.minimum(positive, torch.arange(F) * 2)
    assert torch.equal((h > calibrate.at_count(h, counts)).sum(dim=0), counts)
    assert torch.equal((h > calibrate.at_count(h, positive)).sum(dim=0), positive)


def test_rules_with_thresholds_keep_them_and_relu_has_zeros() -> None:
    x, _ = rows()
    jump = model_of("jumprelu")
    assert isinstance(jump.activation, JumpReLU)
    theta = calibrate.thresholds(jump, x, BATCH, SEED)
    assert torch.equal(theta, jump.activation.threshold)
    assert not theta.requires_grad
    with torch.no_grad():
        jump.activation.log_threshold.add_(1)
    assert not torch.equal(theta, jump.activation.threshold)  # a copy
    fixed = FixedThreshold(torch.rand(L, F))
    kept = calibrate.thresholds(oracle.transcoder("clt", fixed, dtype=torch.float32), x, BATCH, SEED)
    assert torch.equal(kept, fixed.threshold)
    fixed.threshold.add_(1)
    assert not torch.equal(kept, fixed.threshold)
    relu = calibrate.thresholds(model_of("relu"), x, BATCH, SEED)
    assert relu.shape == (L, F)
    assert not relu.any()


def test_calibration_is_no_training() -> None:
    model, (x, _) = model_of("batchtopk"), rows()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    calibrate.thresholds(model, x, BATCH, SEED)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.activation, BatchTopK)
    assert torch.equal(torch.get_rng_state(), random)


def test_batches_are_a_seeded_partition_of_the_rows() -> None:
    parts = [part.tolist() for part in calibrate.shuffled_batches(N, BATCH, SEED)]
    assert [len(part) for part in parts] == [16] * 6 + [7]
    flat = [row for part in parts for row in part]
    assert sorted(flat) == list(range(N))
    assert flat != list(range(N))
    assert parts == [part.tolist() for part in calibrate.shuffled_batches(N, BATCH, SEED)]
    assert parts != [part.tolist() for part in calibrate.shuffled_batches(N, BATCH, SEED + 1)]


@pytest.mark.parametrize("activation", ["relu", "threshold", *CHOOSING])
def test_l0_and_fvu_are_measured_in_the_models_units(activation: str) -> None:
    # Target dimensions of unequal scale: in the transcoder's units the FVU is another number.
    if activation == "threshold":
        model = oracle.transcoder("clt", FixedThreshold(torch.rand(L, F) / 2), dtype=torch.float32)
    else:
        model = model_of(activation)
    x, y = rows()
    y_mean = oracle.normal(L, D, seed=8)
    y_scale = torch.tensor([[0.1], [5.0], [1.0]]) * (oracle.normal(L, D, seed=9, dtype=torch.float32).abs() + 0.2)
    got = calibrate.measure(model, x, y, y_scale, BATCH, SEED)
    a = torch.zeros(N, L, F, dtype=torch.float64)
    for batch in calibrate.shuffled_batches(N, BATCH, SEED):
        h = oracle.encode(x[batch].double(), model.W_enc.double(), model.b_enc.double()).detach()
        if activation in oracle.SELECTIONS:
            a[batch] = oracle.at_pairs(h, oracle.SELECTIONS[activation](h, 2))
        else:
            a[batch] = oracle.above(h, getattr(model.activation, "threshold", torch.zeros(L, F)))
    y_hat = oracle.decode(a, [W.detach().double() for W in model.W_dec], model.b_dec.detach().double())
    assert got["l0"] == pytest.approx(sum(oracle.l0(a)) / N, rel=1e-12)
    expected, _ = oracle.fvu(y_hat * y_scale + y_mean, y.double() * y_scale + y_mean)
    assert got["fvu"] == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(oracle.fvu(y_hat, y.double())[0], rel=1e-2)
