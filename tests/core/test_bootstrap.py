"""Intervals: what is drawn, what comes of it, and that they cover the truth as often as they say."""

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.bootstrap import interval, paired_interval, ratio_interval, resample
from tests import oracle

C = 7


def test_each_resample_is_as_many_contexts_drawn_with_replacement_and_the_same_ones_for_every_sum() -> None:
    sums = {"one": torch.eye(C, dtype=torch.float64), "kl": oracle.normal(C), "error": oracle.normal(C, 3, seed=2)}
    drawn = resample(sums, 50)
    counts = drawn["one"]
    assert counts.sum(dim=1).tolist() == [C] * 50
    assert counts.max() > 1
    assert (counts == counts.round()).all()
    for r in range(50):
        kl = sum(int(counts[r, c]) * float(sums["kl"][c]) for c in range(C))
        assert float(drawn["kl"][r]) == pytest.approx(kl, rel=1e-12)
        for l in range(3):
            error = sum(int(counts[r, c]) * float(sums["error"][c, l]) for c in range(C))
            assert float(drawn["error"][r, l]) == pytest.approx(error, rel=1e-12)


def test_every_context_is_as_likely_as_the_others() -> None:
    counts = resample({"one": torch.eye(C, dtype=torch.float64)}, 5000)["one"]
    # Each count has mean 1 and variance 1 - 1/C: four standard errors of the mean.
    assert (counts.mean(dim=0) - 1).abs().max() < 4 * ((1 - 1 / C) / 5000) ** 0.5
    assert counts.var(dim=0).tolist() == pytest.approx([1 - 1 / C] * C, rel=0.1)


def test_a_seed_repeats_and_another_one_differs() -> None:
    sums = {"kl": oracle.normal(C)}
    again, other = resample(sums, 20)["kl"], resample(sums, 20, seed=1)["kl"]
    assert torch.equal(resample(sums, 20)["kl"], again)
    assert not torch.equal(again, other)


@pytest.mark.parametrize("n", [2, 21, 2000])
def test_the_interval_lies_between_the_percentiles(n: int) -> None:
    values = oracle.normal(n, 3)
    low, high = np.quantile(values.numpy(), [0.025, 0.975], axis=0)
    assert interval(values)[:, 0].tolist() == pytest.approx(low.tolist(), rel=1e-12)
    assert interval(values)[:, 1].tolist() == pytest.approx(high.tolist(), rel=1e-12)


def test_there_is_none_where_a_resample_has_no_value() -> None:
    values = oracle.normal(9, 2)
    values[4, 1] = torch.nan
    assert interval(values).isnan().tolist() == [[False, False], [True, True]]
    denominator = torch.tensor([1.0, 0.0, 0.0])  # some draws miss the first context
    assert ratio_interval(torch.ones(3), denominator) is None
    assert ratio_interval(torch.ones(1), torch.ones(1)) is None, "one context says nothing of others"


def test_contexts_that_agree_have_an_interval_of_no_width() -> None:
    tokens = torch.tensor([5.0, 1.0, 9.0, 2.0])
    low, high = ratio_interval(0.3 * tokens, tokens) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(0.3), pytest.approx(0.3))


def test_long_contexts_count_for_more() -> None:
    """A ratio of sums, not a mean of ratios, in each resample."""
    numerator, denominator = torch.tensor([1.0, 90.0]), torch.tensor([10.0, 100.0])
    # Of two contexts the draws are: both the first (.1), one of each (91 / 110), both the second (.9).
    assert ratio_interval(numerator, denominator) == (pytest.approx(0.1), pytest.approx(0.9))
    assert ratio_interval(numerator, denominator, level=0.01) == (pytest.approx(91 / 110), pytest.approx(91 / 110))


def test_a_paired_interval_is_free_of_what_both_runs_find_hard() -> None:
    tokens = torch.full((40,), 127.0, dtype=torch.float64)
    first = 127 * (1 + oracle.normal(40).abs())
    second = first * 1.1 + 0.1 * oracle.normal(40, seed=2)
    low, high = paired_interval((first, tokens), (second, tokens)) or (0.0, 0.0)
    assert 0 < low < float((second - first).sum() / tokens.sum()) < high
    one, other = (ratio_interval(numbers, tokens) or (0.0, 0.0) for numbers in (first, second))
    assert one[1] > other[0], "each one's own interval says nothing of the difference"
    assert high - low < 0.2 * (other[1] - one[0])


def test_a_run_differs_from_itself_by_nothing() -> None:
    sums = (oracle.normal(C).abs(), oracle.normal(C, seed=2).abs())
    assert paired_interval(sums, sums) == (0, 0)


def test_two_thousand_resamples_take_well_under_a_second() -> None:
    sums = {"all": oracle.normal(128, 800)}  # what eight layers and contexts of 128 tokens come to
    start = time.process_time()
    resample(sums)
    assert time.process_time() - start < 0.5


def clustered(generator: torch.Generator, n_contexts: int) -> tuple[Tensor, Tensor]:
    """Values of tokens and which there are, [C, 12] each. Those of a context are high or low together, and where they
    are high there are fewer; the ratio of means is `true_ratio`."""
    level = torch.rand(n_contexts, 1, generator=generator, dtype=torch.float64)
    length = 4 + (8 * (1 - level)).round()
    noise = 0.2 * torch.randn(n_contexts, 12, generator=generator, dtype=torch.float64)
    scored = (torch.arange(12) < length).double()
    return scored * (level + noise), scored


def true_ratio() -> float:
    """By the length of each eighth of the levels: round(8 (1 - level)) = j on an interval of levels."""
    edges = [1.0, *((16 - 2 * j - 1) / 16 for j in range(8)), 0.0]
    top = bottom = 0.0
    for j in range(9):
        high, low = edges[j], edges[j + 1]
        top += (4 + j) * (high**2 - low**2) / 2
        bottom += (4 + j) * (high - low)
    return top / bottom


@pytest.mark.slow
def test_nineteen_of_twenty_intervals_cover_the_truth_and_those_of_single_tokens_far_fewer() -> None:
    generator, truth, n = torch.Generator().manual_seed(0), true_ratio(), 400
    by_context = by_token = 0
    for _ in range(n):
        numerator, denominator = clustered(generator, 60)
        low, high = ratio_interval(numerator.sum(dim=1), denominator.sum(dim=1), 1000) or (0.0, 0.0)
        by_context += low <= truth <= high
        scored = denominator.flatten() > 0
        tokens = (numerator.flatten()[scored], denominator.flatten()[scored])
        low, high = ratio_interval(*tokens, 300) or (0.0, 0.0)
        by_token += low <= truth <= high
    assert 0.92 <= by_context / n <= 0.97
    assert by_token / n < 0.8


@pytest.mark.slow
def test_paired_intervals_cover_the_difference_too() -> None:
    generator, n, covered = torch.Generator().manual_seed(1), 400, 0
    for _ in range(n):
        numerator, denominator = clustered(generator, 60)
        tokens = denominator.sum(dim=1)
        first = numerator.sum(dim=1)
        # The second run is worse by .05 a token on average, independent of its length.
        worse = 0.1 * torch.rand(60, generator=generator, dtype=torch.float64)
        low, high = paired_interval((first, tokens), (first + worse * tokens, tokens), 1000) or (0.0, 0.0)
        covered += low <= 0.05 <= high
    assert 0.92 <= covered / n <= 0.97
