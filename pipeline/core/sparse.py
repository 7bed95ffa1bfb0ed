"""Sparse features and the products with them.

A token activates a few of a layer's F features, so nothing below does arithmetic on the others:

    forward         y[b] = sum over active i of a[b, i] * W[i]           a bag of rows of W for each token
    gradient of a   da[b, i] = dy[b] . W[i]                               the active pairs only
    gradient of W   dW[i] = sum over tokens b with i active of a[b, i] * dy[b]      a bag of rows of dy for each feature

The products themselves are in `core/products.py`, which has them for each kind of device; here they get their
gradients. A parameter that asks for it gets its gradient as terms (`core/deferred.py`) in place of a dense one. The
dense products in `tests/oracle.py` are the reference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.core import deferred, products
from pipeline.core.pattern import Pattern, fixed_k, from_mask, from_pairs

__all__ = [
    "Chosen",
    "Features",
    "Pattern",
    "Sparse",
    "bag",
    "bags",
    "chosen_features",
    "fixed_k",
    "from_mask",
    "from_pairs",
    "n_tokens",
    "of_layer",
    "row_products",
    "sparsify",
]


class Chosen(NamedTuple):
    """One layer's features in sparse form: values [nnz] at the pairs of the pattern."""

    pattern: Pattern
    values: Tensor


class Sparse(NamedTuple):
    """Features of all layers, each in its own form: `patterns[l]` and `values[l]` [nnz_l], or None and [B, F]."""

    patterns: Sequence[Pattern | None]
    values: Sequence[Tensor]

    def dense(self) -> Tensor:
        """[B, L, F]"""
        layers = [of_layer(self, layer) for layer in range(len(self.values))]
        return torch.stack([_scatter(*one) if isinstance(one, Chosen) else one for one in layers], dim=1)


Features = Tensor | Sparse
"""[B, L, F], or the same layer by layer, in sparse form where few are active."""


def of_layer(features: Features, layer: int) -> Tensor | Chosen:
    """One layer's features: [B, F], or in sparse form."""
    if isinstance(features, Tensor):
        return features[:, layer]
    pattern, values = features.patterns[layer], features.values[layer]
    return values if pattern is None else Chosen(pattern, values)


def n_tokens(features: Features) -> int:
    """B"""
    one = of_layer(features, 0)
    return one.pattern.n_tokens if isinstance(one, Chosen) else one.shape[0]


Write = tuple[int, int, Tensor]
"""(source, target, table [F, D])"""


def sparsify(features: Tensor) -> Sparse:
    """The sparse form of dense features. [B, L, F] -> Sparse"""
    patterns = [from_mask(layer > 0) for layer in features.unbind(1)]
    return Sparse(patterns, [features[:, i][p.tokens, p.indices] for i, p in enumerate(patterns)])


def bag(pattern: Pattern, values: Tensor, table: Tensor) -> Tensor:
    """Sum of the active features' rows, weighted. values [nnz], table [F, D] -> [B, D]

    Differentiable in both; the gradient of `table` is exact and sums each feature's tokens in order.
    """
    return _Bag.apply(values, table, pattern)


def bags(features: Sparse, writes: Sequence[Write], n_targets: int) -> Tensor:
    """What all sources write to all targets: `bag` for each of `writes`, summed by target. -> [B, n_targets, D]

    One node for the lot: nothing of size [B, D] is kept or added for each pair of source and target.
    """
    plan = [(source, target) for source, target, _ in writes]
    tables = [table for _, _, table in writes]
    return _Bags.apply(features.patterns, plan, n_targets, *features.values, *tables)


def row_products(pattern: Pattern, x: Tensor, table: Tensor) -> Tensor:
    """x[b] . table[i] at the pattern's pairs (b, i) alone. x [B, D], table [F, D] -> [nnz]

    Differentiable in `table`. No gradient flows to x, which is data.
    """
    return _RowProducts.apply(table, x, pattern)


def chosen_features(pattern: Pattern, values: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The features of the chosen pairs, differentiable in the encoder without keeping the other pre-activations.

    values [nnz] = relu(x weight^T + bias) at the pattern's pairs, computed before without gradient; x [B, D], weight
    [F, D], bias [F] -> [nnz]. No gradient flows to x, which is data, nor through a pair whose value is 0.
    """
    return _EncoderGradient.apply(weight, bias, values, x, pattern)


def _scatter(pattern: Pattern, values: Tensor) -> Tensor:
    dense = values.new_zeros(pattern.n_tokens, pattern.n_features)
    # Padding entries repeat index 0 with value 0, so they are added, not assigned.
    return dense.index_put((pattern.tokens, pattern.indices), values, accumulate=True)


class _Bag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, table)
        ctx.table, ctx.pattern = _leaf(table), pattern
        return products.bag(pattern, values, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, table = ctx.saved_tensors
        values_grad = products.row_products(ctx.pattern, grad, table) if ctx.needs_input_grad[0] else None
        table_grad = _table_grad(ctx.table, ctx.pattern, values, grad) if ctx.needs_input_grad[1] else None
        return values_grad, table_grad, None


class _Bags(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, patterns: Sequence[Pattern | None], plan: list[tuple[int, int]], n_targets: int, *tensors: Tensor
    ) -> Tensor:
        values, tables = tensors[: len(patterns)], tensors[len(patterns) :]
        ctx.save_for_backward(*tensors)
        ctx.patterns, ctx.plan, ctx.leaves = patterns, plan, [_leaf(table) for table in tables]
        n_tokens = values[0].shape[0] if patterns[0] is None else patterns[0].n_tokens
        # Sums are float32 where tables are bfloat16.
        dtype = torch.promote_types(tables[0].dtype, torch.float32)
        out = tables[0].new_empty(n_tokens, n_targets, tables[0].shape[1], dtype=dtype)
        begun = set()
        for (source, target), table in zip(plan, tables, strict=True):
            _write(patterns[source], values[source], table, out[:, target], target in begun)
            begun.add(target)
        assert len(begun) == n_targets, "every target is written"
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        patterns: Sequence[Pattern | None] = ctx.patterns
        n = len(patterns)
        values, tables = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        values_needed, tables_needed = ctx.needs_input_grad[3 : 3 + n], ctx.needs_input_grad[3 + n :]
        # Copied once for each target, not once for each table that writes it.
        by_target = [rows.to(tables[0].dtype).contiguous() for rows in grad.unbind(1)]
        values_grads: list[Tensor | None] = [None for _ in patterns]
        table_grads: list[Tensor | None] = [None for _ in tables]
        for i, (source, target) in enumerate(ctx.plan):
            pattern, rows, so_far = patterns[source], by_target[target], values_grads[source]
            if values_needed[source]:
                values_grads[source] = _read(pattern, rows, tables[i], so_far)
            if tables_needed[i] and pattern is None:
                table_grads[i] = values[source].T @ rows
            elif tables_needed[i] and pattern is not None:
                table_grads[i] = _table_grad(ctx.leaves[i], pattern, values[source], rows)
        return None, None, None, *values_grads, *table_grads


def _write(pattern: Pattern | None, values: Tensor, table: Tensor, out: Tensor, add: bool) -> None:
    """A layer's part of what is written to one target, in `out` or added to it; without a pattern values are [B, F]."""
    if pattern is not None:
        products.bag(pattern, values, table, out, add)
    elif add:
        out += values @ table
    elif out.dtype != table.dtype:
        out.copy_(values @ table)
    else:
        torch.matmul(values, table, out=out)


def _read(pattern: Pattern | None, rows: Tensor, table: Tensor, so_far: Tensor | None) -> Tensor:
    """The gradient of the values of `_write`, with what other targets gave."""
    if pattern is not None:
        return products.row_products(pattern, rows, table, so_far, add=so_far is not None)
    return rows @ table.T if so_far is None else so_far.addmm_(rows, table.T)


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x)
        ctx.table, ctx.pattern = _leaf(table), pattern
        return products.row_products(pattern, x, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        return _table_grad(ctx.table, ctx.pattern, grad.contiguous(), x), None, None


class _EncoderGradient(torch.autograd.Function):
    """Passes the chosen features through and gives the encoder its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, values: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.table, ctx.pattern = _leaf(weight), pattern
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad = grad * (values > 0)
        weight_grad = _table_grad(ctx.table, pattern, grad, x) if ctx.needs_input_grad[0] else None
        bias_grad = grad.new_zeros(pattern.n_features).index_add(0, pattern.indices, grad)
        return weight_grad, bias_grad, None, None, None


def _leaf(table: Tensor) -> Tensor | None:
    """The parameter itself where its gradient may be kept as terms; a node must not hold another one's output."""
    return table if deferred.wanted(table) else None


def _table_grad(leaf: Tensor | None, pattern: Pattern, weights: Tensor, rows: Tensor) -> Tensor | None:
    """The gradient of a table, or None once its term is kept."""
    if leaf is None:
        return products.bag_of_tokens(pattern, weights, rows)
    deferred.append(leaf, deferred.RowTerm(pattern, weights, rows))
    return None
