import itertools

import pytest

from pipeline.dist.share import Share
from pipeline.errors import UserError


@pytest.mark.parametrize(("batch_rows", "count", "parts"), [(12, 3, 2), (14, 3, 2), (5, 5, 1), (35, 4, 5), (7, 1, 7)])
def test_the_slices_of_each_part_in_order_of_ranks_are_the_batch(batch_rows: int, count: int, parts: int) -> None:
    shares = [Share(index, count, parts) for index in range(count)]
    spans = [share.spans(batch_rows) for share in shares]
    in_order = itertools.chain(*(spans[index][part] for part in range(parts) for index in range(count)))
    assert list(in_order) == list(range(batch_rows))
    assert sum(share.rows(batch_rows) for share in shares) == batch_rows


@pytest.mark.parametrize(("n", "count"), [(7, 3), (8, 3), (9, 3), (64, 5)])
def test_sizes_differ_by_one_at_most_and_weights_add_up(n: int, count: int) -> None:
    sizes = Share(0, count).sizes(n)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == n
    assert [Share(index, count).weight(n) for index in range(count)] == [size / n for size in sizes]


def test_positions_of_a_ranks_tokens_are_those_among_all() -> None:
    assert [Share(index, 3).part(8) for index in range(3)] == [range(2), range(2, 5), range(5, 8)]


def test_a_rank_without_tokens_is_refused() -> None:
    Share(0, 3, 2).check(6)
    with pytest.raises(UserError, match=r"batch_tokens=4 in train.accumulate=2 parts of 2 .* 3 data ranks.*; raise"):
        Share(0, 3, 2).check(4)
    with pytest.raises(UserError, match=r"batch_tokens=2 cannot be shared by 3 data ranks"):
        Share(0, 3).check(2)
