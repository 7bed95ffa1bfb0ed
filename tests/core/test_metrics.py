"""Every reported number against its definition, over uneven batches, and cases with known answers."""

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.core.metrics import Firing, Reconstruction, ratio
from pipeline.core.metrics_predictions import Divergence
from tests import oracle

L, F, D, V = 3, 11, 6, 7
N = 23
SIZES = [1, 9, 2, 11]
"""Uneven batches: a mean of the batches' ratios would be another number."""


def batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(SIZES) for tensor in tensors), strict=True)


def reconstruction(y_hat: Tensor, y: Tensor) -> Reconstruction:
    metric = Reconstruction(*y.shape[1:])
    for part in batches(y_hat, y):
        metric.update(*part)
    return metric


def targets() -> Tensor:
    """Layers of unequal size, far from 0, with batches of unequal spread."""
    y = oracle.normal(N, L, D) * torch.tensor([1.0, 5.0, 0.2])[:, None] + oracle.normal(L, D, seed=2)
    y[SIZES[0] : SIZES[0] + SIZES[1]] *= 3
    return y


def test_fvu_is_a_ratio_of_sums_over_the_whole_split() -> None:
    y = targets()
    y_hat = y + 0.3 * oracle.normal(N, L, D, seed=3) + 0.1
    pooled, per_layer = oracle.fvu(y_hat, y)
    fvu = reconstruction(y_hat, y).fvu()
    assert fvu["pooled"] == pytest.approx(pooled, rel=1e-12)
    assert fvu["per_layer"] == pytest.approx(per_layer, rel=1e-12)


def test_explained_variance_is_one_minus_fvu_and_not_clamped() -> None:
    y = targets()
    metric = reconstruction(-2 * y, y)
    fvu, explained = metric.fvu(), metric.explained_variance()
    assert fvu["pooled"] is not None
    assert explained["pooled"] == pytest.approx(1 - fvu["pooled"], rel=1e-12)
    assert explained["pooled"] is not None
    assert explained["pooled"] < -1
    assert explained["per_layer"] == pytest.approx([1 - f for f in fvu["per_layer"] if f is not None], rel=1e-12)


def test_a_constant_offset_counts_as_error() -> None:
    y, c = targets(), oracle.normal(L, D, seed=4)
    variance = (y - y.mean(dim=0)).square().sum(dim=(0, 2)) / N
    expected = c.square().sum(dim=1) / variance
    assert reconstruction(y + c, y).fvu()["per_layer"] == pytest.approx(expected.tolist(), rel=1e-12)
    pooled = float(c.square().sum() / variance.sum())
    assert reconstruction(y + c, y).fvu()["pooled"] == pytest.approx(pooled, rel=1e-12)


def test_the_mean_has_fvu_one_and_zero_has_one_plus_the_means_share() -> None:
    y = targets()
    mean = y.mean(dim=0)
    by_mean = reconstruction(mean.expand_as(y), y).fvu()
    assert by_mean["pooled"] == pytest.approx(1, rel=1e-12)
    assert by_mean["per_layer"] == pytest.approx([1] * L, rel=1e-12)
    variance = (y - mean).square().sum(dim=(0, 2)) / N
    by_zero = reconstruction(torch.zeros_like(y), y).fvu()
    assert by_zero["per_layer"] == pytest.approx((1 + mean.square().sum(dim=1) / variance).tolist(), rel=1e-12)
    assert by_zero["pooled"] == pytest.approx(float(1 + mean.square().sum() / variance.sum()), rel=1e-12)


def test_a_perfect_reconstruction_has_fvu_zero() -> None:
    assert reconstruction(targets(), targets()).fvu() == {"pooled": 0, "per_layer": [0] * L}


def test_targets_that_do_not_vary_have_no_fvu() -> None:
    y = targets()
    y[:, 1] = 0.1  # not exact in binary, summed 23 times
    metric = reconstruction(y + 1, y)
    assert metric.fvu()["per_layer"][1] is None
    assert metric.explained_variance()["per_layer"][1] is None
    assert metric.fvu()["per_layer"][0] is not None
    still = reconstruction(torch.zeros(N, L, D), torch.full((N, L, D), 0.1))
    assert still.fvu() == {"pooled": None, "per_layer": [None] * L}
    assert still.explained_variance() == {"pooled": None, "per_layer": [None] * L}
    assert Reconstruction(L, D).fvu() == {"pooled": None, "per_layer": [None] * L}


def test_fvu_keeps_its_digits_far_from_zero() -> None:
    # Sums of squares about 0 would lose every digit of a unit variance on an offset of a hundred million.
    y = oracle.normal(N, L, D)
    y_hat = y + 0.5 * oracle.normal(N, L, D, seed=2)
    fvu = reconstruction(y_hat + 1e8, y + 1e8).fvu()
    assert fvu["pooled"] == pytest.approx(oracle.fvu(y_hat, y)[0], rel=1e-6)


def test_low_precision_activations_are_summed_in_float64() -> None:
    y = targets().bfloat16()
    y_hat = (targets() + 0.3).bfloat16()
    pooled, per_layer = oracle.fvu(y_hat.double(), y.double())
    fvu = reconstruction(y_hat, y).fvu()
    assert fvu["pooled"] == pytest.approx(pooled, rel=1e-12)
    assert fvu["per_layer"] == pytest.approx(per_layer, rel=1e-12)


def test_a_ratio_over_nothing_is_none_not_zero() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(0.0, 0.0) is None
    assert ratio(1.0, 0.0) is None


# L0, densities, dead features


def firing(features: Tensor) -> Firing:
    metric = Firing(*features.shape[1:])
    for (part,) in batches(features):
        metric.update(part)
    return metric


def sparse_features() -> Tensor:
    """Unequal densities; feature 4 of layer 0 and all of layer 1 never fire; token 3 has no feature."""
    features = (oracle.normal(N, L, F) - torch.linspace(-1, 2, F, dtype=torch.float64)).relu()
    features[:, 0, 4] = 0
    features[:, 1] = 0
    features[3] = 0
    return features


def test_l0_counts_active_features_of_a_token() -> None:
    features = sparse_features()
    counts = oracle.l0(features)
    l0 = firing(features).l0()
    assert l0["total"] == pytest.approx(sum(counts) / N, rel=1e-12)
    per_layer = [sum(oracle.l0(features[:, l : l + 1])) / N for l in range(L)]
    assert l0["per_layer"] == pytest.approx(per_layer, rel=1e-12)
    assert l0["per_layer"][1] == 0


def test_l0_counts_what_is_above_zero_only() -> None:
    features = torch.tensor([[[1e-30, 0.0, -1.0]]])
    metric = Firing(1, 3)
    metric.update(features)
    assert metric.l0()["total"] == 1


def test_l0_percentiles_are_those_of_the_tokens_total() -> None:
    l0 = firing(sparse_features()).l0()
    counts = oracle.l0(sparse_features())
    assert [l0[f"p{q}"] for q in (5, 50, 95)] == [oracle.percentile(counts, q) for q in (5, 50, 95)]


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 100])
def test_l0_percentiles_on_numbers_of_tokens_around_the_cut(n: int) -> None:
    counts = random.Random(n).choices(range(F + 1), k=n)
    metric = Firing(1, F)
    metric.update(torch.stack([(torch.arange(F) < count).float()[None] for count in counts]))
    l0 = metric.l0()
    assert [l0[f"p{q}"] for q in (5, 50, 95)] == [oracle.percentile(counts, q) for q in (5, 50, 95)]


def test_percentiles_by_hand() -> None:
    # Twenty tokens with 0 to 9 active features, each twice: the 1st, 10th and 19th of the sorted list.
    metric = Firing(1, F)
    for count in [*range(10), *range(10)]:
        metric.update((torch.arange(F) < count).float()[None, None])
    l0 = metric.l0()
    assert (l0["p5"], l0["p50"], l0["p95"]) == (0, 4, 9)


def test_density_is_the_share_of_tokens() -> None:
    features = sparse_features()
    density = firing(features).density()
    for l in range(L):
        for i in range(F):
            assert float(density[l, i]) == sum(float(features[n, l, i]) > 0 for n in range(N)) / N


def test_dead_features_never_fired_on_any_batch() -> None:
    features = sparse_features()
    dead = firing(features).dead_fraction()
    per_layer = [sum(not (features[:, l, i] > 0).any() for i in range(F)) / F for l in range(L)]
    assert per_layer[1] == 1
    assert dead["per_layer"] == pytest.approx(per_layer, rel=1e-12)
    assert dead["total"] == pytest.approx(sum(per_layer) / L, rel=1e-12)


def test_the_density_histogram_holds_every_feature_once() -> None:
    features = sparse_features()
    features[:, 2, 0] = 1.0  # fires on every token: log10 density 0, the upper edge
    histogram = firing(features).density_histogram()
    edges = histogram["log10_edges"]
    for l in range(L):
        expected = [0] * (len(edges) - 1)
        never = 0
        for i in range(F):
            fires = int((features[:, l, i] > 0).sum())
            if not fires:
                never += 1
                continue
            position = math.log10(fires / N)
            expected[max(j for j in range(len(edges) - 1) if edges[j] <= position)] += 1
        assert histogram["per_layer"][l] == expected
        assert histogram["never_fired"][l] == never
        assert sum(expected) + never == F


# What the replacement does to the predictions


def divergence(original: Tensor, replaced: Tensor, scored: Tensor, next_token: Tensor, has_next: Tensor) -> Divergence:
    metric = Divergence()
    sizes = [1, 3]
    for part in zip(*(t.split(sizes) for t in (original, replaced, scored, next_token, has_next)), strict=True):
        metric.update(*part)
    return metric


def predictions() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Four contexts of five positions. Batches have 2 and 10 scored positions; a scored one has no next token."""
    original, replaced = 2 * oracle.normal(4, 5, V), 2 * oracle.normal(4, 5, V, seed=2)
    replaced[2] = original[2]
    next_token = torch.randint(0, V, (4, 5), generator=torch.Generator().manual_seed(0))
    scored = torch.ones(4, 5, dtype=torch.bool)
    scored[:, 0] = False
    scored[0, 3:] = False
    scored[3, 4:] = False
    has_next = scored.clone()
    has_next[:, 4] = False
    has_next[1, 2] = False
    return original, replaced, scored, next_token, has_next


def test_divergences_equal_the_sums_over_scored_positions() -> None:
    original, replaced, scored, next_token, has_next = predictions()
    kl, same, before, after = [], [], [], []
    for n in range(4):
        for t in range(5):
            o, r = original[n, t].tolist(), replaced[n, t].tolist()
            if scored[n, t]:
                kl.append(oracle.kl(o, r))
                same.append(o.index(max(o)) == r.index(max(r)))
            if has_next[n, t]:
                before.append(-math.log(oracle.softmax(o)[int(next_token[n, t])]))
                after.append(-math.log(oracle.softmax(r)[int(next_token[n, t])]))
    metric = divergence(*predictions())
    assert (metric.n, metric.n_next) == (len(kl), len(before))
    assert metric.n > metric.n_next
    assert metric.kl == pytest.approx(sum(kl) / len(kl), rel=1e-12)
    assert metric.top1 == pytest.approx(sum(same) / len(same), rel=1e-12)
    assert metric.ce_original == pytest.approx(sum(before) / len(before), rel=1e-12)
    assert metric.delta_ce == pytest.approx((sum(after) - sum(before)) / len(before), rel=1e-12)


def one_position(original: list[float], replaced: list[float], next_token: int) -> Divergence:
    metric = Divergence()
    yes = torch.tensor([[True]])
    logits = [torch.tensor([[values]]).log() for values in (original, replaced)]
    metric.update(logits[0], logits[1], yes, torch.tensor([[next_token]]), yes)
    return metric


def test_kl_goes_from_the_original_to_the_replaced_prediction() -> None:
    # P = (3/4, 1/4), Q = (1/2, 1/2): KL(P || Q) = log 2 - H(P); KL(Q || P) would be 0.1438.
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert expected == pytest.approx(0.1308, abs=1e-4)
    assert one_position([0.75, 0.25], [0.5, 0.5], 0).kl == pytest.approx(expected, rel=1e-6)


def test_delta_ce_of_two_tokens_by_hand() -> None:
    # Token 0 was predicted with 1/2 and then 1/8, token 1 with 1/4 and then 1/2: log 4 and -log 2, half of each.
    metric = Divergence()
    original = torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]).log()
    replaced = torch.tensor([[[0.125, 0.375, 0.5], [0.25, 0.5, 0.25]]]).log()
    yes = torch.ones(1, 2, dtype=torch.bool)
    metric.update(original, replaced, yes, torch.tensor([[0, 1]]), yes)
    assert metric.delta_ce == pytest.approx((math.log(4) - math.log(2)) / 2, rel=1e-6)
    assert metric.ce_original == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)
    assert metric.top1 == 0


def test_the_own_predictions_diverge_from_nothing() -> None:
    original, _, scored, next_token, has_next = predictions()
    metric = divergence(original, original, scored, next_token, has_next)
    assert (metric.kl, metric.top1, metric.delta_ce) == (0, 1, 0)


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    original, replaced, *rest = predictions()
    shifted = divergence(original + 50, replaced - 70, *rest)
    plain = divergence(original, replaced, *rest)
    assert shifted.kl == pytest.approx(plain.kl, rel=1e-10)
    assert shifted.delta_ce == pytest.approx(plain.delta_ce, rel=1e-10)


def test_what_is_not_scored_is_not_looked_at() -> None:
    original, replaced, scored, next_token, has_next = predictions()
    spoiled = replaced.clone()
    spoiled[~scored] = math.nan
    got = divergence(original, spoiled, scored, next_token, has_next)
    expected = divergence(original, replaced, scored, next_token, has_next)
    assert (got.kl, got.top1, got.delta_ce) == (expected.kl, expected.top1, expected.delta_ce)
