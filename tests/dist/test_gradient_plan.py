"""What travels as terms: the same choice on every rank, never more bytes than without a choice."""

import random

import torch

from pipeline.dist.gradient_plan import ALONE, Held, Plan, Whole, beside, decided, keys_of, order, sent
from pipeline.dist.wire import Op, sent_bytes


def held(terms: list[list[tuple[int, int, int]]], sizes: dict[str, list[int]], dense: list[bool] | None = None) -> Held:
    """sizes: bytes by kind; of a pattern the same for its indices and its counts."""
    keys = sorted({key for each in terms for term in each for key in keys_of(term)}, key=order)
    kinds = {"indices": "patterns", "counts": "patterns", "weights": "weights", "rows": "rows"}
    each = {(kind, i): sizes[kinds[kind]][i] for kind, i in keys}
    return Held(dense or [False] * len(terms), terms, each)


def tables(*nbytes: int) -> list[Whole]:
    return [Whole(n, torch.float32, 10) for n in nbytes]


def total(plan: Plan, whole: list[Whole], one: Held, n_ranks: int) -> int:
    planned = sent(plan, whole, one, n_ranks)
    return planned["gradient terms"] + planned["gradients"]


TWO_LAYERS = [[(0, 0, 0)], [(1, 1, 1)], [(0, 2, 2)], [(0, 2, 3)], [(1, 3, 3)]]
"""Encoders of two layers, decoders 0 to 0, 0 to 1 and 1 to 1."""
SMALL = {"patterns": [8, 8], "weights": [16, 16, 16, 16], "rows": [20, 20, 20, 20]}


def test_numbers_give_back_what_they_say() -> None:
    one = held(TWO_LAYERS, SMALL, [False, True, False, False, True])
    assert Held.decoded(one.structure(), list(one.sizes.values())) == one
    assert one.header()[1:] == [len(one.structure()), 12]


def test_shared_tensors_count_once() -> None:
    """All terms are 176 bytes a rank, and would be 260 if every table brought its own."""
    one = held(TWO_LAYERS, SMALL)
    assert sum(one.sizes.values()) == 176
    found = {n: decided([one] * 2, tables(*[n] * 5)) for n in (36, 35, 34)}
    assert {n: plan.as_terms for n, plan in found.items()} == {36: [0, 1, 2, 3, 4], 35: [2, 3, 4], 34: []}
    # An encoder alone has 36 bytes of its own, the decoders together 104, and a dense table n.
    assert [total(plan, tables(*[n] * 5), one, 2) for n, plan in found.items()] == [176, 104 + 2 * 35, 5 * 34]


def test_a_table_whose_own_tensors_are_dear_is_summed() -> None:
    sizes = SMALL | {"rows": [40, 900, 40, 40]}
    plan = decided([held(TWO_LAYERS, sizes)] * 2, tables(*[100] * 5))
    assert plan.as_terms == [0, 2, 3, 4]
    assert plan.sums == [[1]]


def test_a_choice_never_costs_more_than_none() -> None:
    rng = random.Random(0)
    for _ in range(300):
        terms = [[(rng.randrange(3), rng.randrange(4), rng.randrange(4))] for _ in range(rng.randint(1, 7))]
        one = held(terms, {kind: [rng.randint(0, 60) for _ in range(4)] for kind in ("patterns", "weights", "rows")})
        whole = tables(*(rng.randint(0, 100) for _ in terms))
        got = total(decided([one] * 3, whole), whole, one, 3)
        assert got <= sum(sent_bytes(Op.reduce, table.nbytes, 3) for table in whole) + len(whole)  # rounding
        assert got <= sent_bytes(Op.gather, sum(one.sizes.values()), 3)


def test_what_ranks_do_not_have_alike_is_summed() -> None:
    """Rank 1 has a dense gradient of layer 0's encoder, and its terms are numbered otherwise for that."""
    one = held(TWO_LAYERS, SMALL)
    other = held(
        [[], [(0, 0, 0)], [(1, 1, 1)], [(1, 1, 2)], [(0, 2, 2)]],
        {"patterns": [8, 12], "weights": [16, 24, 16], "rows": [20, 20, 20]},
        [True, False, False, False, False],
    )
    plan = decided([one, other], tables(*[1000] * 5))
    assert plan.as_terms == [1, 2, 3, 4]
    assert plan.sums == [[0]]
    assert plan.keys[0][:2] == [("indices", 1), ("counts", 1)]
    assert plan.keys[1][:2] == [("indices", 0), ("counts", 0)]
    of_both = dict(zip(zip(*plan.keys, strict=True), plan.sizes, strict=True))
    assert of_both[("indices", 0), ("indices", 1)] == [8, 12]


def test_tables_that_share_otherwise_are_summed() -> None:
    """The same numbers of terms, but rank 1's decoders of layer 0 do not share their weights."""
    one = held(TWO_LAYERS, SMALL)
    sizes = SMALL | {"weights": [16] * 5}
    other = held([[(0, 0, 0)], [(1, 1, 1)], [(0, 2, 2)], [(0, 4, 3)], [(1, 3, 3)]], sizes)
    plan = decided([one, other], tables(*[1000] * 5))
    assert 3 not in plan.as_terms
    assert {0, 1, 2}.issubset(plan.as_terms)
    assert decided([other, one], tables(*[1000] * 5)).as_terms == plan.as_terms


def test_a_dense_gradient_beside_terms_goes_by_its_rows() -> None:
    one = held(TWO_LAYERS, SMALL, [True, False, False, False, False])
    assert beside([one]) == [0]
    whole = [Whole(1000, torch.float32, 10, 3), *tables(*[1000] * 4)]
    plan = decided([one] * 2, whole)
    assert plan.as_terms == [0, 1, 2, 3, 4]
    assert sent(plan, whole, one, 2) == {
        "gradient sizes": 8 * 3 + 8 * 12,
        "gradient rows": 10,
        "gradient terms": 176,
        "gradients": 300,
    }
    whole = [Whole(1000, torch.float32, 10, 10), *tables(*[1000] * 4)]
    assert decided([one] * 2, whole).sums == [[0]]
    assert decided([one] * 2, whole).as_terms == [1, 2, 3, 4]


def test_large_tensors_travel_alone() -> None:
    sizes = {"patterns": [8, 8], "weights": [16, ALONE, 16, 16], "rows": [ALONE, 40, 40, 40]}
    one = held(TWO_LAYERS, sizes, [False] * 5)
    plan = decided([one] * 2, [*tables(*[10 * ALONE] * 5)])
    assert sorted(len(call) for call in plan.gathers) == [1, 1, 10]
    dense = held([[], [], []], SMALL, [True] * 3)
    whole = [Whole(ALONE, torch.float32, 8), Whole(12, torch.float32, 3), Whole(24, torch.float64, 3)]
    assert decided([dense] * 2, whole).sums == [[0], [1], [2]]
