"""The kernels at shapes of real work, compiled, against dense products in float64 and sorting."""

import pytest
import torch
from torch import Tensor

from pipeline.core import products
from pipeline.core.deferred import RowTerm
from pipeline.core.pattern import Pattern, fixed_k
from pipeline.core.triton_kernels import adam, bag, bag_gradients, bag_of_tokens, largest, row_products, topk
from tests import oracle

pytestmark = pytest.mark.gpu

B, F, D, K = 1024, 12_288, 700, 32


@pytest.fixture(scope="module")
def h() -> Tensor:
    """Rounded to sixteenths, so that most cuts fall on ties."""
    torch.manual_seed(0)
    return (torch.randn(B, F, device="cuda") * 16).round() / 16


@pytest.fixture(scope="module")
def pattern() -> Pattern:
    """Every third entry is feature 0, which has far more tokens than a chunk."""
    torch.manual_seed(1)
    indices = torch.randint(0, F // 2, (B, K), device="cuda")
    indices[:, ::3] = 0
    return fixed_k(indices, F)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def scattered(pattern: Pattern, values: Tensor) -> Tensor:
    dense = torch.zeros(pattern.n_tokens, F, dtype=torch.float64, device="cuda")
    return dense.index_put_((pattern.tokens, pattern.indices), values.double(), accumulate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 32, 100, 1500])
def test_topk_chooses_what_sorting_chooses(k: int, dtype: torch.dtype, h: Tensor) -> None:
    values, indices = topk(h.to(dtype), k)
    expected, order = h.to(dtype).relu().sort(dim=-1, descending=True, stable=True)
    order = torch.where(expected[:, :k] > 0, order[:, :k], F)
    indices = torch.where(values > 0, indices, F)
    assert torch.equal(indices.sort(dim=-1).values, order.sort(dim=-1).values)
    assert torch.equal(values.sort(dim=-1, descending=True).values, expected[:, :k])


@pytest.mark.parametrize("n", [1, B * 32, B * F // 2, B * F])
def test_the_largest_of_all_are_those_of_the_reference(n: int, h: Tensor) -> None:
    positions, smallest = largest(h.view(-1), n)
    expected, cut = products.largest(h.view(-1).relu(), n, 0.0)
    assert torch.equal(positions, expected)
    assert smallest == cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_the_dense_ones(dtype: torch.dtype, pattern: Pattern) -> None:
    values, x, table = normal(B * K, seed=2), normal(B, D, seed=3), normal(F, D, seed=4).to(dtype)
    dense = scattered(pattern, values)
    by_table, by_values = dense.T @ x.double(), (x.double() @ table.double().T)[pattern.tokens, pattern.indices]
    assert oracle.normwise(bag(pattern, values, table), dense @ table.double()) < 1e-6
    assert oracle.normwise(row_products(pattern, x, table), by_values) < 1e-6
    assert oracle.normwise(bag_of_tokens(pattern, values, x), by_table) < 1e-6
    for got, expected in zip(bag_gradients(pattern, values, x, table), (by_values, by_table), strict=True):
        assert oracle.normwise(got, expected) < 1e-6


def test_adam_in_place_makes_the_steps_of_torch(pattern: Pattern) -> None:
    values, x, table = normal(B * K, seed=2), normal(B, D, seed=3), normal(F, D, seed=4)
    parameter = torch.nn.Parameter(table.double())
    optimiser = torch.optim.Adam([parameter], lr=0.01)
    moments = torch.zeros_like(table), torch.zeros_like(table)
    settings = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
    for step in (1, 2):
        parameter.grad = scattered(pattern, step * values).T @ x.double()
        optimiser.step()
        adam(table, moments, None, [RowTerm(pattern, step * values, x)], step=step, **settings)
    assert oracle.normwise(moments[0], optimiser.state[parameter]["exp_avg"]) < 1e-6
    assert oracle.normwise(moments[1], optimiser.state[parameter]["exp_avg_sq"]) < 1e-6
    assert oracle.normwise(table, parameter) < 1e-6


def test_every_result_is_the_same_bits_every_time(pattern: Pattern) -> None:
    values, x, table = normal(B * K, seed=2), normal(B, D, seed=3), normal(F, D, seed=4)
    results = [[bag(pattern, values, table), *bag_gradients(pattern, values, x, table)] for _ in range(3)]
    assert all(torch.equal(one, other) for other in results[1:] for one, other in zip(results[0], other, strict=True))
