"""TopK's and BatchTopK's choices by the kernels, against sorting in plain Python."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.core import products
from pipeline.core.triton_kernels import largest, selection, topk
from tests import oracle

FLOATS = [torch.float32, torch.float64, torch.bfloat16]


def expected_rows(h: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The chosen (index, value) of each row, ascending."""
    rows: list[list[tuple[int, float]]] = [[] for _ in h]
    for b, _, i in sorted(oracle.top_k(h[:, None].double(), k)):
        rows[b].append((i, float(h[b, i])))
    return rows


def chosen_rows(h: Tensor, k: int, device: str) -> list[list[tuple[int, float]]]:
    values, indices = topk(h.to(device), k)
    assert values.shape == indices.shape == (*h.shape[:-1], k)
    assert values.dtype == h.dtype
    rows = []
    for pairs in (list(zip(i, v, strict=True)) for i, v in zip(indices.tolist(), values.tolist(), strict=True)):
        chosen = [pair for pair in pairs if pair[1] != 0]
        assert pairs[len(chosen) :] == [(0, 0.0)] * (k - len(chosen))  # padding stands last, at index 0
        rows.append(chosen)
    return rows


def whole(*shape: int, seed: int = 3) -> Tensor:
    """Integers in which most cuts fall on ties."""
    return torch.randint(-4, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(params=["rows at once", "by groups"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by groups":
        monkeypatch.setattr(selection, "WHOLE", 4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_k_largest_of_each_row_are_chosen(dtype: torch.dtype, device: str) -> None:
    h = oracle.normal(2, 23, dtype=torch.float32).to(dtype)
    assert chosen_rows(h, 3, device) == expected_rows(h, 3)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("n_features", "k"), [(5, 5), (19, 4), (33, 6)])
def test_ties_across_the_cut_go_to_the_lowest_index(n_features: int, k: int, device: str) -> None:
    h = whole(2, n_features, seed=n_features)
    assert chosen_rows(h, k, device) == expected_rows(h, k)


@pytest.mark.usefixtures("way")
def test_nothing_is_chosen_that_is_not_above_0_and_the_rest_is_padding(device: str) -> None:
    h = torch.full((3, 21), -1.5)
    h[1] = 0
    h[1, 17] = 2.0
    h[2, 20] = 1e-45  # the smallest number above 0
    assert chosen_rows(h, 4, device) == [[], [(17, 2.0)], [(20, float(h[2, 20]))]]


def test_a_chosen_group_may_hold_many_of_the_largest(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WHOLE", 4)
    h = torch.zeros(2, 40)
    h[0, 8:12] = torch.tensor([4.0, 6.0, 5.0, 7.0])  # four in one group of four
    h[1, ::4] = 1.0  # one in each, all equal
    assert chosen_rows(h, 4, device) == [[(8, 4.0), (9, 6.0), (10, 5.0), (11, 7.0)], [(i, 1.0) for i in (0, 4, 8, 12)]]


def test_infinity_and_what_is_no_number_come_first(device: str) -> None:
    h = torch.tensor([[1.0, -math.inf, math.nan, 3.0, math.inf]])
    values, indices = topk(h.to(device), 2)
    assert indices.tolist() == [[2, 4]]
    assert math.isnan(values[0, 0])


def test_rows_may_be_of_several_axes_and_apart_in_memory(device: str) -> None:
    h = oracle.normal(2, 2, 18, dtype=torch.float32)[..., ::2]
    values, indices = topk(h.to(device), 2)
    for b in range(2):
        got = [list(zip(i, v, strict=True)) for i, v in zip(indices[b].tolist(), values[b].tolist(), strict=True)]
        assert got == expected_rows(h[b], 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "n"), [(9, 4), (7, 7), (200, 3), (333, 5)])
def test_the_largest_of_all_are_those_of_the_reference(size: int, n: int, dtype: torch.dtype, device: str) -> None:
    for flat in (oracle.normal(size).to(dtype), whole(size).to(dtype), -torch.ones(size, dtype=dtype)):
        positions, smallest = largest(flat.to(device), n)
        expected, cut = products.largest(flat.relu(), n, 0.0)
        assert positions.tolist() == expected.tolist()
        assert smallest.item() == cut.item()


def test_the_largest_lie_in_many_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "TILE", 32)
    monkeypatch.setattr(selection, "GROUP", 4)
    for flat, n in ((whole(141), 10), (oracle.normal(141), 40), (torch.ones(70), 9)):
        positions, _ = largest(flat.to(device), n)
        assert positions.tolist() == products.largest(flat.relu(), n, 0.0)[0].tolist()


def test_of_numbers_that_differ_in_their_last_bit_alone_the_larger_is_chosen(device: str) -> None:
    h = torch.full((1, 12), 1.0)
    h[0, 7] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert topk(h.to(device), 1)[1].tolist() == [[7]]
    assert largest(h[0].to(device), 1)[0].tolist() == [7]


@pytest.mark.parametrize("n", [0, 3])
def test_no_value_at_all(n: int, device: str) -> None:
    positions, smallest = largest(torch.zeros(0, device=device), n)
    assert positions.tolist() == []
    assert smallest.item() == 0
    assert topk(torch.zeros(0, 5, device=device), 2)[0].shape == (0, 2)
