"""Which features are active for which token."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


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
        if self.indices.device.type == "cpu" and self.n_features <= 1 << 16:
            # NumPy sorts numbers of 16 bits by their digits: a fifth of the time.
            order = torch.from_numpy(self.indices.numpy().astype("uint16").argsort(kind="stable"))
            features = self.indices.index_select(0, order)
        else:
            features, order = torch.sort(self.indices, stable=True)
        edges = torch.arange(self.n_features + 1, device=features.device)
        return order, self.tokens.index_select(0, order), torch.searchsorted(features, edges)


class Gated(NamedTuple):
    """The pairs that `core/products.gate` finds."""

    n_active: int
    n_beyond: int
    active: Pattern | None
    values: Tensor
    """The pre-activations at `active`. [nnz]"""

    beyond: Pattern | None


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
    return from_positions(positions(mask), mask.shape)


def from_positions(flat: Tensor, shape: torch.Size) -> Pattern:
    """The pattern of the pairs at these positions of a tensor [B, F] laid flat, ascending. [nnz] -> Pattern"""
    n_tokens, n_features = shape
    tokens = flat // n_features
    return from_pairs(tokens, flat - tokens * n_features, n_tokens, n_features)


def positions(mask: Tensor) -> Tensor:
    """Where a mask [B, F] is set, laid flat, ascending. [nnz]"""
    flat = mask.flatten()
    if flat.device.type == "cpu":
        # NumPy's skips whole words: 13 times as fast as torch's at a density of 1 %.
        return torch.from_numpy(flat.numpy().nonzero()[0])
    return flat.nonzero().squeeze(1)
