"""Adam in one pass over weights and moments, which takes its gradient as terms (`core/deferred.py`) and writes none.

    g = grad + sum over terms of bag_of_tokens(term)
    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    W = W - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

with g + weight_decay W in place of g, or W (1 - lr weight_decay) in place of W first where decoupled, as AdamW has it.
24 bytes a parameter (`by_feature.py`), 28 where there is a dense gradient too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.deferred import RowTerm
from pipeline.core.pattern import Pattern
from pipeline.core.triton_kernels import by_feature


def adam(
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    grad: Tensor | None,
    terms: Sequence[RowTerm],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One step of torch.optim.Adam (of AdamW where `decoupled`) in place; `step` counts from 1.

    weight, moments and grad of one shape [F, ...], contiguous, in float32.
    """
    shape = weight.shape if weight.dim() == 2 else (1, weight.numel())
    held = [t.view(shape) for t in (weight, *moments)]
    dense = None if grad is None else grad.view(shape)
    assert all(t.dtype == torch.float32 for t in held)
    (beta1, beta2), shrink, decay = betas, 1.0, weight_decay
    if decoupled:
        shrink, decay = 1 - lr * weight_decay, 0.0
    # Computed here: 1 - beta2 in float32 would be wrong in its fifth digit.
    rate, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, rate, root, eps, shrink, decay)
    pattern, weights, rows = joined(terms) if terms else _nothing(held[0])
    by_feature.run(
        pattern, weights, rows, table=held[0], update=by_feature.Update(held[1], held[2], dense, numbers)
    )  # fmt: skip


def joined(terms: Sequence[RowTerm]) -> RowTerm:
    """Terms of one gradient as one, of their batches laid end to end."""
    if len(terms) == 1:
        return terms[0]
    patterns = [term.pattern for term in terms]
    offsets, shift = [], 0
    for pattern in patterns:
        offsets.append(pattern.offsets[:-1] + shift)
        shift += pattern.indices.numel()
    offsets.append(torch.full_like(patterns[0].offsets[:1], shift))
    indices = torch.cat([pattern.indices for pattern in patterns])
    whole = Pattern(indices, torch.cat(offsets), patterns[0].n_features)
    return RowTerm(whole, torch.cat([term.weights for term in terms]), torch.cat([term.rows for term in terms]))


def _nothing(weight: Tensor) -> RowTerm:
    """A gradient of no token. [F, D]"""
    indices = torch.zeros(0, dtype=torch.int64, device=weight.device)
    return RowTerm(Pattern(indices, indices.new_zeros(1), weight.shape[0]), weight.new_zeros(0), weight[:0])
