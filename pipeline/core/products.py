"""The four operations of the sparse step, without gradients, for each kind of device.

    bag             y[b] = sum over active i of values[b, i] * W[i]
    row_products    p[b, i] = x[b] . W[i] at the active pairs (b, i) alone
    bag_of_tokens   dW[i] = sum over tokens b with i active of weights[b, i] * rows[b]
    topk            the k largest of relu(h) of each row, ties to the lowest index

All are exact. Each exists in torch, which runs everywhere and is what runs unless `using` says otherwise. `compiled`
is C++ for float32 on a CPU (`core/native.py`), `triton` for CUDA (`core/triton_kernels.py`); tensors of another device
or type take torch's way there too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.pattern import Pattern

_SUM = 0
"""torch's number for mode="sum"."""


def bag(pattern: Pattern, values: Tensor, table: Tensor) -> Tensor:
    """Sum of the active features' rows, weighted. values [nnz], table [F, D] -> [B, D]"""
    return F.embedding_bag(
        pattern.indices,
        table.detach(),
        pattern.offsets,
        mode="sum",
        per_sample_weights=values.detach(),
        include_last_offset=True,
    )


def row_products(pattern: Pattern, x: Tensor, table: Tensor) -> Tensor:
    """x[b] . table[i] at the pattern's pairs (b, i). x [B, D], table [F, D] -> [nnz]"""
    # The gradient of a bag's weights is this product, and torch has a kernel for it that gathers no rows.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), table, pattern.indices, pattern.offsets, pattern.tokens, _SUM
    )


def bag_of_tokens(pattern: Pattern, weights: Tensor, rows: Tensor) -> Tensor:
    """For each feature the weighted sum of its tokens' rows. weights [nnz], rows [B, D] -> [F, D]"""
    # torch's own gradient of a bag's table scatters into a dense table row by row, several times slower on a CPU.
    order, tokens, offsets = pattern.by_feature
    return F.embedding_bag(
        tokens, rows.contiguous(), offsets, mode="sum", per_sample_weights=weights[order], include_last_offset=True
    )


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(pre_acts) of each row, descending, ties to the lowest index.

    [..., F] -> values [..., k], indices [..., k]; where fewer than k are above 0 the rest are 0 at some index.
    """
    n_features = pre_acts.shape[-1]
    extra = min(k + 1, n_features)
    values, indices = pre_acts.topk(extra, dim=-1)
    if extra > k:
        # topk orders equal values as it likes; only a tie across the cut can change the choice.
        tied = (values[..., k - 1] == values[..., k]) & (values[..., k] > 0)
        if tied.any():
            again = pre_acts[tied].sort(dim=-1, descending=True, stable=True)
            indices[tied] = again.indices[..., :extra]
    return values[..., :k].relu(), indices[..., :k]
