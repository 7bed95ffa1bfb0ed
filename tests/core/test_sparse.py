"""Sparse products and their gradients against double loops, on every shape of emptiness."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.core import sparse
from pipeline.core.sparse import Pattern, Sparse, bag, chosen_features, fixed_k, from_mask, sparsify
from tests import oracle

F, D = 7, 4

RAGGED = {
    "ragged": [[2, 5], [0], [1, 3, 6], [5, 2]],
    "empty rows first, inside and last": [[], [4, 1], [], [], [6], []],
    "one token, no feature": [[]],
    "no feature at all": [[], [], []],
    "every feature": [list(range(F))] * 3,
    "one feature for all": [[3], [3], [3], [3], [3]],
}


def csr(rows: Sequence[Sequence[int]]) -> Pattern:
    offsets = [sum(map(len, rows[:b])) for b in range(len(rows) + 1)]
    return Pattern(torch.tensor([i for row in rows for i in row], dtype=torch.int64), torch.tensor(offsets), F)


def entries(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(b, i) for b, row in enumerate(rows) for i in row]


def bag_by_loops(rows: Sequence[Sequence[int]], values: Tensor, table: Tensor) -> Tensor:
    """y[b] = sum over the entries of token b of value * table row"""
    y = torch.zeros(len(rows), table.shape[1], dtype=table.dtype)
    for (b, i), value in zip(entries(rows), values, strict=True):
        y[b] += value * table[i]
    return y


@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
def test_a_bag_and_its_gradients_equal_the_loops(rows: list[list[int]]) -> None:
    n = len(entries(rows))
    values, table = oracle.normal(n).requires_grad_(), oracle.normal(F, D, seed=2).requires_grad_()
    dy = oracle.normal(len(rows), D, seed=3)
    y = bag(csr(rows), values, table)
    y.backward(dy)
    d_values, d_table = torch.zeros(n, dtype=torch.float64), torch.zeros(F, D, dtype=torch.float64)
    for e, (b, i) in enumerate(entries(rows)):
        for d in range(D):
            d_values[e] += dy[b, d] * table[i, d].detach()
            d_table[i, d] += dy[b, d] * values[e].detach()
    assert values.grad is not None
    assert table.grad is not None
    assert y.shape == dy.shape
    assert oracle.normwise(y.detach(), bag_by_loops(rows, values.detach(), table.detach())) < 1e-12
    assert oracle.normwise(values.grad, d_values) < 1e-12
    assert oracle.normwise(table.grad, d_table) < 1e-12


def test_bags_of_several_sources_and_their_gradients_are_those_of_each_bag() -> None:
    # Source 1 writes both targets and is dense, as a source with many active features is.
    rows = [RAGGED["ragged"], [[1], [], [0, 6], [4]]]
    sparse_parts = [oracle.normal(8, seed=1), oracle.normal(4, F, seed=2), oracle.normal(4, seed=3)]
    tables = [oracle.normal(F, D, seed=seed) for seed in (4, 5, 6, 7)]
    plan = [(0, 0), (1, 0), (1, 1), (2, 1)]
    dy = oracle.normal(4, 2, D, seed=8)

    def run(together: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*sparse_parts, *tables)]
        first, second, third = leaves[:3]
        W = leaves[3:]
        if together:
            features = Sparse([csr(rows[0]), None, csr(rows[1])], [first, second, third])
            y = sparse.bags(features, [(*pair, table) for pair, table in zip(plan, W, strict=True)], 2)
        else:
            y = torch.stack(
                [bag(csr(rows[0]), first, W[0]) + second @ W[1], second @ W[2] + bag(csr(rows[1]), third, W[3])], dim=1
            )
        y.backward(dy)
        return [y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]

    together, apart = run(True), run(False)
    assert len(together) == len(apart) == 8
    assert all(oracle.normwise(a, b) < 1e-12 for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("rows", RAGGED.values(), ids=RAGGED.keys())
def test_chosen_features_and_their_gradients_equal_the_loops(rows: list[list[int]]) -> None:
    x, weight, bias = oracle.normal(len(rows), D), oracle.normal(F, D, seed=2), oracle.normal(F, seed=3)
    h = [float(x[b] @ weight[i] + bias[i]) for b, i in entries(rows)]
    weight.requires_grad_()
    bias.requires_grad_()
    values = torch.tensor(h, dtype=torch.float64).relu()
    g = oracle.normal(len(h), seed=4)
    chosen = chosen_features(csr(rows), values, x, weight, bias)
    chosen.backward(g)
    d_weight, d_bias = torch.zeros(F, D, dtype=torch.float64), torch.zeros(F, dtype=torch.float64)
    for e, (b, i) in enumerate(entries(rows)):
        if h[e] > 0:
            d_weight[i] += g[e] * x[b]
            d_bias[i] += g[e]
    assert weight.grad is not None
    assert bias.grad is not None
    assert torch.equal(chosen, values)
    assert oracle.normwise(weight.grad, d_weight) < 1e-12
    assert oracle.normwise(bias.grad, d_bias) < 1e-12


def test_a_bag_passes_a_numeric_gradient_check() -> None:
    pattern = csr(RAGGED["ragged"])
    values, table = oracle.normal(8).requires_grad_(), oracle.normal(F, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, t: bag(pattern, v, t).sin(), (values, table))


def test_chosen_features_pass_a_numeric_gradient_check() -> None:
    rows = RAGGED["ragged"]
    pattern, x = csr(rows), oracle.normal(len(rows), D)
    bias = torch.full((F,), 20.0, dtype=torch.float64, requires_grad=True)  # every pair far above 0

    def features(weight: Tensor, bias: Tensor) -> Tensor:
        h = torch.nn.functional.linear(x, weight, bias).detach()
        return chosen_features(pattern, h[pattern.tokens, pattern.indices], x, weight, bias)

    assert torch.autograd.gradcheck(features, (oracle.normal(F, D).requires_grad_(), bias))


def test_padding_adds_nothing_even_where_its_index_is_active() -> None:
    # Token 0: feature 0 is active and two entries are padding (index 0, value 0); token 1: padding alone.
    pattern = fixed_k(torch.tensor([[0, 4, 0, 0], [0, 0, 0, 0]]), F)
    values = torch.tensor([1.5, 2.5, 0, 0, 0, 0, 0, 0], dtype=torch.float64, requires_grad=True)
    table = oracle.normal(F, D).requires_grad_()
    dense = Sparse([pattern], [values]).dense()
    assert dense.tolist() == [[[1.5, 0, 0, 0, 2.5, 0, 0]], [[0.0] * F]]
    y, dy = bag(pattern, values, table), oracle.normal(2, D, seed=3)
    assert oracle.normwise(y.detach(), (dense[:, 0] @ table).detach()) < 1e-12
    y.backward(dy)
    assert table.grad is not None
    assert oracle.normwise(table.grad, dense[:, 0].detach().T @ dy) < 1e-12


def test_padding_gets_no_encoder_gradient() -> None:
    pattern = fixed_k(torch.tensor([[4, 0, 0]]), F)
    weight, bias = oracle.normal(F, D).requires_grad_(), oracle.normal(F).requires_grad_()
    x, values = oracle.normal(1, D, seed=3), torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    chosen_features(pattern, values, x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.any(dim=1).nonzero().tolist() == [[4]]
    assert bias.grad.nonzero().tolist() == [[4]]


def test_patterns_name_the_token_of_each_entry() -> None:
    assert csr([[], [4, 1], [], [6], []]).tokens.tolist() == [1, 1, 3]
    assert fixed_k(torch.tensor([[2, 5], [0, 1]]), F).tokens.tolist() == [0, 0, 1, 1]
    assert csr([[], []]).tokens.tolist() == []
    assert csr([[], [4, 1], []]).n_tokens == 3


def test_the_transposed_pattern_lists_each_features_tokens_in_order() -> None:
    pattern = csr([[5, 2], [], [2], [6, 5]])
    order, tokens, offsets = pattern.by_feature
    assert offsets.tolist() == [0, 0, 0, 2, 2, 2, 4, 5]
    assert tokens.tolist() == [0, 2, 0, 3, 3]
    assert pattern.indices[order].tolist() == [2, 2, 5, 5, 6]


def test_a_mask_becomes_the_pattern_of_its_true_entries() -> None:
    mask = torch.zeros(4, F, dtype=torch.bool)
    mask[1, 3] = mask[1, 0] = mask[3, 6] = True
    pattern = from_mask(mask)
    assert pattern.indices.tolist() == [0, 3, 6]
    assert pattern.offsets.tolist() == [0, 0, 2, 2, 3]
    assert pattern.n_features == F


def test_dense_and_sparse_forms_hold_the_same_features() -> None:
    features = oracle.normal(5, 3, F).relu()
    features[2] = 0  # a token with no feature
    features[:, 1] = 0  # a layer with no feature
    form = sparsify(features)
    assert torch.equal(form.dense(), features)
    assert [values.numel() for values in form.values] == [int((features[:, l] > 0).sum()) for l in range(3)]


def test_the_table_gradient_is_the_same_bits_every_time() -> None:
    # Each feature's tokens are summed in order: a resumed run repeats its steps bit for bit.
    pattern = fixed_k(torch.randint(0, F, (300, 5), generator=torch.Generator().manual_seed(0)), F)
    values, dy = oracle.normal(1500, dtype=torch.float32), oracle.normal(300, D, dtype=torch.float32)
    grads = []
    for _ in range(3):
        table = torch.ones(F, D, requires_grad=True)
        sparse.bag(pattern, values, table).backward(dy)
        grads.append(table.grad)
    assert grads[0] is not None
    assert all(torch.equal(grads[0], grad) for grad in grads[1:] if grad is not None)
