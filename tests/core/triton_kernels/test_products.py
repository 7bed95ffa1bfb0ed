"""The products of the sparse step by the kernels, against loops, on every shape of emptiness."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.core.sparse import Pattern, fixed_k
from pipeline.core.triton_kernels import (
    Moments,
    adam_,
    bag,
    bag_gradients,
    bag_of_tokens,
    by_feature,
    by_token,
    joined,
    row_products,
    shapes,
)
from tests import oracle

F, D = 7, 5

RAGGED = {
    "ragged": [[2, 5], [0], [1, 3, 6], [5, 2]],
    "empty rows first, inside and last": [[], [4, 1], [], [], [6], []],
    "one token, no feature": [[]],
    "every feature": [list(range(F))] * 3,
    "one feature for all": [[3]] * 11,
}

ragged = pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())


@pytest.fixture(autouse=True, params=["one block", "many blocks"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """D is not a multiple of the block; features have more tokens than a chunk, and chunks more than a tile."""
    if request.param == "many blocks":
        monkeypatch.setattr(shapes, "COLUMNS", 2)
        monkeypatch.setattr(by_feature, "CHUNK", 4)
        monkeypatch.setattr(by_feature, "ENTRIES", 2)
        monkeypatch.setattr(by_token, "ENTRIES", 2)


class Case:
    """Random numbers for rows of active features, on the device, and what the loops make of them."""

    def __init__(self, rows: Sequence[Sequence[int]], device: str, dtype: torch.dtype = torch.float64) -> None:
        offsets = [sum(map(len, rows[:b])) for b in range(len(rows) + 1)]
        indices = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        self.pattern = Pattern(indices.to(device), torch.tensor(offsets, device=device), F)
        self.pairs = [(b, i) for b, row in enumerate(rows) for i in row]
        self.values = oracle.normal(len(self.pairs), dtype=dtype).to(device)
        self.table = oracle.normal(F, D, seed=2, dtype=dtype).to(device)
        self.x = oracle.normal(len(rows), D, seed=3, dtype=dtype).to(device)

    def bag(self) -> Tensor:
        y = torch.zeros_like(self.x)
        for (b, i), value in zip(self.pairs, self.values, strict=True):
            y[b] += value * self.table[i]
        return y

    def row_products(self) -> Tensor:
        return torch.stack([self.values[:0].sum(), *[self.x[b] @ self.table[i] for b, i in self.pairs]])[1:]

    def bag_of_tokens(self) -> Tensor:
        g = torch.zeros_like(self.table)
        for (b, i), value in zip(self.pairs, self.values, strict=True):
            g[i] += value * self.x[b]
        return g


@ragged
def test_a_bag_equals_the_loops(rows: list[list[int]], device: str) -> None:
    case = Case(rows, device)
    assert oracle.normwise(bag(case.pattern, case.values, case.table), case.bag()) < 1e-15


@ragged
def test_row_products_equal_the_loops(rows: list[list[int]], device: str) -> None:
    case = Case(rows, device)
    assert oracle.normwise(row_products(case.pattern, case.x, case.table), case.row_products()) < 1e-15


@ragged
def test_bags_of_tokens_equal_the_loops_and_features_of_no_token_are_0(rows: list[list[int]], device: str) -> None:
    case = Case(rows, device)
    got = bag_of_tokens(case.pattern, case.values, case.x)
    assert oracle.normwise(got, case.bag_of_tokens()) < 1e-15
    unused = [i for i in range(F) if not any(i in row for row in rows)]
    assert torch.equal(got[unused], torch.zeros_like(got[unused]))


@ragged
def test_both_gradients_of_a_bag_equal_the_loops(rows: list[list[int]], device: str) -> None:
    case = Case(rows, device)
    by_table, by_values = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert oracle.normwise(by_table, case.bag_of_tokens()) < 1e-15
    assert oracle.normwise(by_values, case.row_products()) < 1e-15


def test_padding_adds_nothing_even_where_its_index_is_active(device: str) -> None:
    # Token 0: feature 0 is active and two entries are padding (index 0, value 0); token 1: padding alone.
    case = Case([[0, 4, 0, 0], [0, 0, 0, 0]], device)
    case.pattern = fixed_k(case.pattern.indices.view(2, 4), F)
    case.values = torch.tensor([1.5, 2.5, 0, 0, 0, 0, 0, 0], dtype=torch.float64, device=device)
    y = bag(case.pattern, case.values, case.table)
    assert oracle.normwise(y[0], 1.5 * case.table[0] + 2.5 * case.table[4]) < 1e-15
    assert not y[1].any()
    gradient = bag_of_tokens(case.pattern, case.values, case.x)
    assert gradient.any(dim=1).nonzero().squeeze(1).tolist() == [0, 4]
    assert oracle.normwise(gradient[0], 1.5 * case.x[0]) < 1e-15


def test_a_bfloat16_table_is_summed_in_float32(device: str) -> None:
    case = Case(RAGGED["ragged"], device, torch.float32)
    case.table = case.table.bfloat16()
    wide = Case(RAGGED["ragged"], device)
    wide.table, wide.values, wide.x = case.table.double(), case.values.double(), case.x.double()
    assert oracle.normwise(bag(case.pattern, case.values, case.table), wide.bag()) < 1e-6
    by_table, by_values = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert by_table.dtype == by_values.dtype == torch.float32
    assert oracle.normwise(by_table, wide.bag_of_tokens()) < 1e-6
    assert oracle.normwise(by_values, wide.row_products()) < 1e-6


def test_tables_and_rows_may_be_some_columns_of_wider_ones(device: str) -> None:
    case = Case(RAGGED["ragged"], device)
    case.table = oracle.normal(F, 3 * D, seed=5).to(device)[:, D : 2 * D]
    case.x = oracle.normal(4, 2 * D, seed=6).to(device)[:, D:]
    assert oracle.normwise(bag(case.pattern, case.values, case.table), case.bag()) < 1e-15
    assert oracle.normwise(row_products(case.pattern, case.x, case.table), case.row_products()) < 1e-15
    by_table, by_values = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert oracle.normwise(by_table, case.bag_of_tokens()) < 1e-15
    assert oracle.normwise(by_values, case.row_products()) < 1e-15


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_in_place_makes_the_steps_of_torch(weight_decay: float, device: str) -> None:
    parameter = torch.nn.Parameter(oracle.normal(F, D, seed=2, dtype=torch.float32))
    optimiser = torch.optim.AdamW([parameter], lr=0.03, betas=(0.8, 0.99), eps=1e-6, weight_decay=weight_decay)
    table = parameter.detach().clone().to(device)
    first, second = torch.zeros_like(table), torch.zeros_like(table)
    for step, rows in enumerate([RAGGED["ragged"], RAGGED["one feature for all"], RAGGED["every feature"]], start=1):
        case = Case(rows, device, torch.float32)
        parameter.grad = case.bag_of_tokens().cpu()
        optimiser.step()
        adam_(
            case.pattern,
            case.values,
            case.x,
            table,
            Moments(first, second, step),
            lr=0.03,
            betas=(0.8, 0.99),
            eps=1e-6,
            weight_decay=weight_decay,
        )
    state = optimiser.state[parameter]
    assert oracle.normwise(table.cpu(), parameter) < 1e-6
    assert oracle.normwise(first.cpu(), state["exp_avg"]) < 1e-6
    assert oracle.normwise(second.cpu(), state["exp_avg_sq"]) < 1e-6


def test_terms_of_several_batches_are_one_term(device: str) -> None:
    cases = [Case(rows, device) for rows in RAGGED.values()]
    whole = joined([(case.pattern, case.values, case.x) for case in cases])
    together = torch.stack([case.bag_of_tokens() for case in cases]).sum(0)
    assert whole[0].n_tokens == sum(len(rows) for rows in RAGGED.values())
    assert oracle.normwise(bag_of_tokens(*whole), together) < 1e-15
    assert joined([(cases[0].pattern, cases[0].values, cases[0].x)])[0] is cases[0].pattern


def test_every_result_is_the_same_bits_every_time(device: str) -> None:
    rows = [[(b * 3 + j) % F for j in range(4)] for b in range(9)]
    case = Case(rows, device, torch.float32)
    results = [bag_gradients(case.pattern, case.values, case.x, case.table) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
