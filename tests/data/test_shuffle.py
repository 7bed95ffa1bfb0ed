import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.shuffle import SMALL, Permutation, derive


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097, SMALL - 1, SMALL, SMALL + 1, 300_001])
def test_every_index_is_reached_exactly_once(n: int) -> None:
    image = Permutation(n, seed=3).forward(np.arange(n))
    assert image.dtype == np.int64
    assert (np.sort(image) == np.arange(n)).all()


@given(n=st.integers(1, 2**61), seed=st.integers(0, 2**62), data=st.data())
def test_inverse_undoes_forward_for_any_size(n: int, seed: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)))
    permutation = Permutation(n, seed)
    image = permutation.forward(index)
    assert ((image >= 0) & (image < n)).all()
    assert (permutation.inverse(image) == index).all()
    assert (permutation.forward(permutation.inverse(index)) == index).all()


def test_what_an_index_maps_to_does_not_depend_on_what_is_asked_with_it() -> None:
    permutation = Permutation(100_000, seed=1)
    whole = permutation.forward(np.arange(100_000))
    assert (permutation.forward(np.array([[99_999, 5], [40_000, 0]])) == whole[[[99_999, 5], [40_000, 0]]]).all()


def test_an_index_outside_is_refused() -> None:
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            Permutation(10, seed=0).forward(np.array([wrong]))


@pytest.mark.parametrize("n", [2, 4, 5])
def test_all_orders_of_a_few_shards_are_equally_likely(n: int) -> None:
    """Chi-squared of the n! orders over seeds: within 5 standard deviations of its mean."""
    n_seeds = 1500
    counts = Counter(tuple(Permutation(n, derive(seed, "x")).forward(np.arange(n)).tolist()) for seed in range(n_seeds))
    n_orders = math.factorial(n)
    expected = n_seeds / n_orders
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values()) + (n_orders - len(counts)) * expected
    assert chi2 < (n_orders - 1) + 5 * math.sqrt(2 * (n_orders - 1))


def test_neighbours_are_scattered_over_the_whole_range() -> None:
    """Images of consecutive indices, 60 at a time, fall into 20 equal parts as independent draws would."""
    n = 1_000_003
    image = Permutation(n, seed=5).forward(np.arange(600_000)).reshape(-1, 60)
    counts = np.stack([(image * 20 // n == part).sum(axis=1) for part in range(20)], axis=1)
    chi2 = ((counts - 3) ** 2 / 3).sum(axis=1)
    assert abs(chi2.mean() - 19) < 0.3  # standard error 0.06


def test_seeds_give_unrelated_orders() -> None:
    a, b = (Permutation(50_000, seed).forward(np.arange(50_000)) for seed in (0, 1))
    assert (a == b).sum() < 10


def test_the_order_is_the_one_that_caches_and_runs_were_made_with() -> None:
    assert Permutation(10, seed=0).forward(np.arange(10)).tolist() == [1, 3, 2, 9, 8, 4, 7, 0, 5, 6]
    assert Permutation(400_000, seed=0).forward(np.array([0, 1, 399_999])).tolist() == [101349, 143098, 330150]
    assert derive(0, "rows", 1, 2) == 6883775606557538402
