"""The terms of the training loss.

Everywhere: means over tokens, sums over layers, features and dimensions, so that no coefficient depends on the batch
size. x, y are in the transcoder's units (`core/normalize.py`); |W_dec,i| is the L2 norm of feature i's decoder rows,
concatenated over the layers that it writes.

    reconstruction   sum_m w_m mean_n |y^m - y_hat^m|^2                         w_m = 1 unless set
    tanh sparsity    mean_n sum_{l,i} tanh(c |W_dec,i^l| a_i^l)       (Ameisen et al. 2025, "Circuit Tracing")
    L1 sparsity      mean_n sum_{l,i} |W_dec,i^l| a_i^l               (Anthropic, April 2024 update)
    L0 target        (L0 / target - 1)^2,  L0 = mean_n sum_{l,i} 1[h > theta]    (Rajamanoharan et al. 2024)
    pre-activation   mean_n sum_{l,i} relu(-h)                    clt
                     mean_n sum_{l,i} relu(theta - h) |W_dec,i|   january   (Anthropic, January 2025 update)
    AuxK             min(1, n_dead / (d/2)) V |e - e_hat|^2 / |e - mean e|^2   (Gao et al. 2024, arXiv 2406.04093)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.core.sparse import Chosen, Features, n_tokens, of_layer


def reconstruction(y_hat: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error: mean over tokens, sum over layers and dimensions. [B, M, D], [B, M, D], weights [M] -> []"""
    if weights is None:
        total: Tensor = _SquaredError.apply(y_hat, y)
    else:
        total = ((y_hat - y).square() * weights[:, None]).sum()
    return total / y.shape[0]


class _SquaredError(torch.autograd.Function):
    """sum (y_hat - y)^2. What autograd makes of `.square().sum()`, to the bit, in one product in place of a power and
    two: on a CPU each is a pass over fresh memory as large as the batch."""

    @staticmethod
    def forward(ctx: Any, y_hat: Tensor, y: Tensor) -> Tensor:
        error = y_hat - y
        ctx.save_for_backward(error)
        return error.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (error,) = ctx.saved_tensors
        slope = error * (2 * grad)
        wanted, data = ctx.needs_input_grad
        return slope if wanted else None, -slope if data else None


def tanh_sparsity(features: Features, decoder_norms: Tensor, c: float) -> Tensor:
    """sum_{l,i} tanh(c |W_dec,i^l| a_i^l), mean over tokens. The gradient flows through the norms too.

    features [B, L, F] or sparse, decoder_norms [L, F] -> []
    """
    return _over_written(features, decoder_norms, lambda written: torch.tanh(c * written))


def l1_sparsity(features: Features, decoder_norms: Tensor) -> Tensor:
    """sum_{l,i} |W_dec,i^l| a_i^l, mean over tokens. The gradient flows through the norms too.

    features [B, L, F] or sparse, decoder_norms [L, F] -> []
    """
    return _over_written(features, decoder_norms, lambda written: written)


def l0_target(active: Features, target: float, unseen: Tensor | float = 0.0, whole: float | None = None) -> Tensor:
    """(L0 / target - 1)^2. active [B, L, F], or sparse, is 1 where a feature is active (`JumpReLU.active`) -> []

    `unseen` [] is added to the number of active pairs: 0, but it may have a gradient. whole: L0 of the batch of which
    these tokens are a part. The value is then the batch's, and the mean of the parts' gradients is its gradient.
    """
    layers = [active] if isinstance(active, Tensor) else active.values
    own = (torch.stack([layer.sum() for layer in layers]).sum() + unseen) / n_tokens(active) / target
    if whole is None:
        return (own - 1).square()
    miss = whole / target - 1
    return miss**2 + 2 * miss * (own - own.detach())


def pre_activation(pre_acts: Tensor | Sequence[Tensor]) -> Tensor:
    """sum_{l,i} relu(-h), mean over tokens. [B, L, F], or [B, F] for each layer -> []"""
    layers = _layers(pre_acts)
    return torch.stack([(-h).relu().sum() for h in layers]).sum() / layers[0].shape[0]


def pre_activation_january(pre_acts: Tensor | Sequence[Tensor], threshold: Tensor, decoder_norms: Tensor) -> Tensor:
    """sum_{l,i} relu(theta - h) |W_dec,i|, mean over tokens. [B, L, F] or [B, F] a layer, [L, F], [L, F] -> []"""
    layers = _layers(pre_acts)
    each = zip(layers, threshold, decoder_norms, strict=True)
    terms = [((theta - h).relu().sum(dim=0) * norms).sum() for h, theta, norms in each]
    return torch.stack(terms).sum() / layers[0].shape[0]


def aux_k(error: Tensor, error_hat: Tensor, n_dead: int, variance: float, spread: float | None = None) -> Tensor:
    """How badly dead features explain what the live ones leave over, in the units of `reconstruction`, alpha apart.

    error [B, L, D] is y - y_hat without gradient, error_hat [B, L, D] the dead features' share of it without a bias,
    n_dead their number over all layers, variance V = sum_m mean_n |y^m - mean y^m|^2 over the whole cache. spread:
    mean_n |e - mean e|^2 of the batch of which these tokens are a part; the mean of the parts is then the batch's term.
    """
    d_model = error.shape[-1]
    scale = min(1.0, n_dead / (d_model / 2))
    own = (error - error.mean(dim=0)).square().sum() if spread is None else spread * error.shape[0]
    return scale * variance * (error - error_hat).square().sum() / own


def _over_written(features: Features, decoder_norms: Tensor, penalty: Callable[[Tensor], Tensor]) -> Tensor:
    """mean_n sum_{l,i} penalty(|W_dec,i^l| a_i^l), for a penalty that is 0 at 0."""
    terms = [penalty(_written(of_layer(features, i), norms)).sum() for i, norms in enumerate(decoder_norms)]
    return torch.stack(terms).sum() / n_tokens(features)


def _written(one: Tensor | Chosen, norms: Tensor) -> Tensor:
    """|W_dec,i| a_i of a layer: [B, F], or [nnz]."""
    # Not norms[indices], whose gradient sorts before it adds up.
    return norms.index_select(0, one.pattern.indices) * one.values if isinstance(one, Chosen) else norms * one


def _layers(pre_acts: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return pre_acts.unbind(1) if isinstance(pre_acts, Tensor) else pre_acts
