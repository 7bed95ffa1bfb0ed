"""The products of the sparse step by the kernels, against loops, on every shape of emptiness."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from pipeline.core import products, triton_kernels
from pipeline.core.deferred import RowTerm
from pipeline.core.options import Kernels
from pipeline.core.pattern import Pattern, fixed_k
from pipeline.core.triton_kernels import (
    adam,
    bag,
    bag_gradients,
    bag_of_tokens,
    by_feature,
    by_token,
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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """D is not a multiple of the block; features have more tokens than a chunk, and chunks more than a tile."""
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
@pytest.mark.parametrize("way", [by_feature.row_products, by_token.row_products], ids=["by feature", "by token"])
def test_row_products_equal_the_loops(way: Callable[..., Tensor], rows: list[list[int]], device: str) -> None:
    case = Case(rows, device)
    assert oracle.normwise(way(case.pattern, case.x, case.table), case.row_products()) < 1e-15


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
    by_values, by_table = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert oracle.normwise(by_table, case.bag_of_tokens()) < 1e-15
    assert oracle.normwise(by_values, case.row_products()) < 1e-15
    twice, _ = bag_gradients(case.pattern, case.values, case.x, case.table, by_values)
    assert twice is by_values
    assert oracle.normwise(twice, 2 * case.row_products()) < 1e-15


@pytest.mark.parametrize(("columns", "entries"), [(256, 8), (4, 1)])
def test_the_sizes_of_blocks_change_nothing(
    columns: int, entries: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "COLUMNS", columns)
    monkeypatch.setattr(by_feature, "CHUNK", 64)
    monkeypatch.setattr(by_feature, "ENTRIES", entries)
    monkeypatch.setattr(by_token, "ENTRIES", entries)
    case = Case(RAGGED["ragged"], device)
    by_values, by_table = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert oracle.normwise(by_table, case.bag_of_tokens()) < 1e-15
    assert oracle.normwise(by_values, case.row_products()) < 1e-15
    assert oracle.normwise(bag(case.pattern, case.values, case.table), case.bag()) < 1e-15
    assert oracle.normwise(row_products(case.pattern, case.x, case.table), case.row_products()) < 1e-15


def test_weights_are_summed_by_feature(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(RAGGED["ragged"], device)
    expected = products.sums_by_feature(case.pattern, case.values)
    monkeypatch.setattr(products, "_active", (Kernels.triton, triton_kernels))
    assert oracle.normwise(products.sums_by_feature(case.pattern, case.values), expected) < 1e-15


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
    by_values, by_table = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert by_table.dtype == by_values.dtype == torch.float32
    assert oracle.normwise(by_table, wide.bag_of_tokens()) < 1e-6
    assert oracle.normwise(by_values, wide.row_products()) < 1e-6


def test_tables_and_rows_may_be_some_columns_of_wider_ones(device: str) -> None:
    case = Case(RAGGED["ragged"], device)
    case.table = oracle.normal(F, 3 * D, seed=5).to(device)[:, D : 2 * D]
    case.x = oracle.normal(4, 2 * D, seed=6).to(device)[:, D:]
    assert oracle.normwise(bag(case.pattern, case.values, case.table), case.bag()) < 1e-15
    assert oracle.normwise(row_products(case.pattern, case.x, case.table), case.row_products()) < 1e-15
    by_values, by_table = bag_gradients(case.pattern, case.values, case.x, case.table)
    assert oracle.normwise(by_table, case.bag_of_tokens()) < 1e-15
    assert oracle.normwise(by_values, case.row_products()) < 1e-15


@ragged
def test_a_result_may_be_added_to_some_columns_of_a_wider_one(rows: list[list[int]], device: str) -> None:
    case = Case(rows, device)
    wide = oracle.normal(len(rows), 2 * D, seed=6).to(device)
    before, out = wide.clone(), wide[:, D:]
    assert bag(case.pattern, case.values, case.table, out, add=True) is out
    assert torch.equal(wide[:, :D], before[:, :D])
    assert oracle.normwise(out, before[:, D:] + case.bag()) < 1e-15
    bag(case.pattern, case.values, case.table, out)
    assert oracle.normwise(out, case.bag()) < 1e-15
    inner = torch.ones_like(case.values)
    row_products(case.pattern, case.x, case.table, inner, add=True)
    assert oracle.normwise(inner, 1 + case.row_products()) < 1e-15
    row_products(case.pattern, case.x, case.table, inner)
    assert oracle.normwise(inner, case.row_products()) < 1e-15


class Adam:
    """Steps of the kernel beside those of torch, on the same gradients."""

    settings: ClassVar = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-6}

    def __init__(self, start: Tensor, device: str, weight_decay: float, decoupled: bool) -> None:
        self.parameter = torch.nn.Parameter(start.clone())
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        self.torch = kind([self.parameter], weight_decay=weight_decay, **self.settings)
        self.weight = start.clone().to(device)
        self.moments = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.options = {"weight_decay": weight_decay, "decoupled": decoupled, **self.settings}
        self.steps = 0

    def step(self, grad: Tensor | None, terms: Sequence[RowTerm], whole: Tensor) -> None:
        self.steps += 1
        self.parameter.grad = whole.cpu()
        self.torch.step()
        adam(self.weight, self.moments, grad, terms, step=float(self.steps), **self.options)

    def check(self) -> None:
        state = self.torch.state[self.parameter]
        assert oracle.normwise(self.weight.cpu(), self.parameter) < 1e-6
        assert oracle.normwise(self.moments[0].cpu(), state["exp_avg"]) < 1e-6
        assert oracle.normwise(self.moments[1].cpu(), state["exp_avg_sq"]) < 1e-6


@pytest.mark.parametrize(("weight_decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
def test_adam_in_place_makes_the_steps_of_torch(weight_decay: float, decoupled: bool, device: str) -> None:
    both = Adam(oracle.normal(F, D, seed=2, dtype=torch.float32), device, weight_decay, decoupled)
    for rows in (RAGGED["ragged"], RAGGED["one feature for all"]):
        case = Case(rows, device, torch.float32)
        both.step(None, [RowTerm(case.pattern, case.values, case.x)], case.bag_of_tokens())
    both.check()


def test_adam_adds_the_terms_of_several_batches_and_a_dense_gradient(device: str) -> None:
    cases = [Case(rows, device, torch.float32) for rows in RAGGED.values()]
    terms = [RowTerm(case.pattern, case.values, case.x) for case in cases]
    dense = oracle.normal(F, D, seed=7, dtype=torch.float32).to(device)
    both = Adam(oracle.normal(F, D, seed=2, dtype=torch.float32), device, 0.0, False)
    both.step(dense, terms, dense + torch.stack([case.bag_of_tokens() for case in cases]).sum(0))
    both.step(dense, [], dense)
    both.check()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_adam_takes_parameters_of_any_shape(shape: tuple[int, ...], device: str) -> None:
    both = Adam(oracle.normal(*shape, 1, dtype=torch.float32).view(shape), device, 0.1, True)
    grad = oracle.normal(*shape, 1, seed=4, dtype=torch.float32).view(shape).to(device)
    for _ in range(2):
        both.step(grad, [], grad)
    both.check()


def test_every_result_is_the_same_bits_every_time(device: str) -> None:
    case = Case([[(b * 3 + j) % F for j in range(2)] for b in range(9)], device, torch.float32)
    results = [bag_gradients(case.pattern, case.values, case.x, case.table) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
