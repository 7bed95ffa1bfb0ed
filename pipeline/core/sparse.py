"""Sparse features and the products with them.

A token activates a few of a layer's F features, so nothing below does arithmetic on the others:

    forward         y[b] = sum over active i of a[b, i] * W[i]           a bag of rows of W for each token
    gradient of a   da[b, i] = dy[b] . W[i]                               the active pairs only
    gradient of W   dW[i] = sum over tokens b with i active of a[b, i] * dy[b]      a bag of rows of dy for each feature

The first two are `embedding_bag` and its own backward. The third is written here as an `embedding_bag` over the
transposed pattern: torch's own weight gradient scatters into a dense table row by row, several times slower on a CPU.
The dense products in `tests/oracle.py` are the reference.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Pattern:
    """Which features of one layer are active for which token: CSR by token.

    indices [nnz] int64, the active features of token 0, then of token 1, ...; offsets [B + 1] int64, where each token's
    begin. An entry may be padding: its value is 0 then, so that a fixed number a token fits the same form.
    """

    def __init__(self, indices: Tensor, offsets: Tensor, n_features: int) -> None:
        self.indices, self.offsets, self.n_features = indices, offsets, n_features

    @property
    def n_tokens(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each entry. [nnz]"""
        ids = torch.arange(self.n_tokens, device=self.indices.device)
        return ids.repeat_interleave(self.offsets.diff(), output_size=self.indices.numel())

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transposed pattern: (order [nnz] that sorts entries by feature, their tokens [nnz], offsets [F + 1])."""
        features, order = torch.sort(self.indices, stable=True)
        edges = torch.arange(self.n_features + 1, device=features.device)
        return order, self.tokens[order], torch.searchsorted(features, edges)


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


_SUM = 0
"""torch's number for mode="sum"."""

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


def fixed_k(indices: Tensor, n_features: int) -> Pattern:
    """A pattern with K entries a token. [B, K] -> Pattern"""
    n, k = indices.shape
    return Pattern(indices.reshape(-1), torch.arange(0, n * k + 1, k, device=indices.device), n_features)


def from_pairs(tokens: Tensor, indices: Tensor, n_tokens: int, n_features: int) -> Pattern:
    """The pattern of (token, feature) pairs in ascending order. [nnz], [nnz] -> Pattern"""
    edges = torch.arange(n_tokens + 1, device=tokens.device)
    return Pattern(indices, torch.searchsorted(tokens, edges), n_features)


def from_mask(mask: Tensor) -> Pattern:
    """The pattern of a boolean [B, F]."""
    n_features, flat = mask.shape[1], _positions(mask)
    tokens = flat // n_features
    return from_pairs(tokens, flat - tokens * n_features, *mask.shape)


def _positions(mask: Tensor) -> Tensor:
    """Where a mask [B, F] is set, laid flat, ascending. [nnz]"""
    flat = mask.flatten()
    if flat.device.type == "cpu":
        # NumPy's skips whole words: 13 times as fast as torch's at a density of 1 %.
        return torch.from_numpy(flat.numpy().nonzero()[0])
    return flat.nonzero().squeeze(1)


def sparsify(features: Tensor) -> Sparse:
    """The sparse form of dense features. [B, L, F] -> Sparse"""
    patterns = [from_mask(layer > 0) for layer in features.unbind(1)]
    return Sparse(patterns, [features[:, i][p.tokens, p.indices] for i, p in enumerate(patterns)])


def bag(pattern: Pattern, values: Tensor, table: Tensor) -> Tensor:
    """Sum of the active features' rows, weighted. values [nnz], table [F, D] -> [B, D]

    Differentiable in both; the gradient of `table` is exact and sums each feature's tokens in order.
    """
    rows = F.embedding_bag(
        pattern.indices,
        table.detach(),
        pattern.offsets,
        mode="sum",
        per_sample_weights=values,
        include_last_offset=True,
    )
    return _TableGradient.apply(rows, table, pattern, values.detach())


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


def _bag_of_tokens(pattern: Pattern, weights: Tensor, table: Tensor) -> Tensor:
    """For each feature the weighted sum of its tokens' rows. weights [nnz], table [B, D] -> [F, D]"""
    order, tokens, offsets = pattern.by_feature
    return F.embedding_bag(
        tokens, table, offsets, mode="sum", per_sample_weights=weights[order], include_last_offset=True
    )


def _scatter(pattern: Pattern, values: Tensor) -> Tensor:
    dense = values.new_zeros(pattern.n_tokens, pattern.n_features)
    # Padding entries repeat index 0 with value 0, so they are added, not assigned.
    return dense.index_put((pattern.tokens, pattern.indices), values, accumulate=True)


class _TableGradient(torch.autograd.Function):
    """Passes `rows` through and gives `table` its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, pattern: Pattern, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        ctx.pattern = pattern
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (values,) = ctx.saved_tensors
        table_grad = _bag_of_tokens(ctx.pattern, values, grad.contiguous()) if ctx.needs_input_grad[1] else None
        return grad, table_grad, None, None


class _RowProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x)
        ctx.pattern = pattern
        # The gradient of a bag's weights is this product, and torch has a kernel for it that gathers no rows. Called by
        # its name, since autograd would first compute the bag, and there is no autograd under inference_mode.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, table, pattern.indices, pattern.offsets, pattern.tokens, _SUM
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _bag_of_tokens(ctx.pattern, grad.contiguous(), x), None, None


class _EncoderGradient(torch.autograd.Function):
    """Passes the chosen features through and gives the encoder its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, values: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        grad = grad * (values > 0)
        weight_grad = _bag_of_tokens(pattern, grad, x)
        bias_grad = grad.new_zeros(pattern.n_features).index_add(0, pattern.indices, grad)
        return weight_grad, bias_grad, None, None, None
