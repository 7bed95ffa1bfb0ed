"""Norms of feature rows, whose gradient can be kept as terms.

norm_i = sqrt(sum over tables |W_i|^2)          dW_i = g_i W_i / norm_i, and 0 where the norm is 0
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.core import deferred
from pipeline.core.pattern import fixed_k


def row_norms(tables: Sequence[Tensor]) -> Tensor:
    """L2 norm of each feature's rows in all tables together. [F, D] each -> [F]"""
    return _RowNorms.apply(*tables)


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tables: Tensor) -> Tensor:
        squares = torch.stack([torch.linalg.vector_norm(table, dim=1).square() for table in tables])
        norms = squares.sum(dim=0).sqrt()
        ctx.save_for_backward(norms, *tables)
        # A node must not hold another one's output but by saving it; a leaf is none.
        ctx.leaves = [table if deferred.wanted(table) else None for table in tables]
        return norms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norms, *tables = ctx.saved_tensors
        slope = torch.where(norms > 0, grad / norms, 0.0)
        grads: list[Tensor | None] = []
        for table, leaf, needed in zip(tables, ctx.leaves, ctx.needs_input_grad, strict=True):
            if leaf is None:
                grads.append(table * slope[:, None] if needed else None)
            else:
                # Every row as its own only token: slope_i W_i is a term like any other.
                itself = fixed_k(torch.arange(len(slope), device=slope.device)[:, None], len(slope))
                deferred.append(leaf, deferred.RowTerm(itself, slope, table))
                grads.append(None)
        return tuple(grads)
