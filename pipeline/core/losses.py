"""The terms of the training loss.

Everywhere: means over tokens, sums over layers, features and dimensions, so that no coefficient depends on the batch
size. x, y are in the transcoder's units (`core/normalize.py`); |W_dec,i| is the L2 norm of feature i's decoder rows,
concatenated over the layers that it writes.

    reconstruction   sum_m mean_n |y^m - y_hat^m|^2
    tanh sparsity    lambda mean_n sum_{l,i} tanh(c |W_dec,i^l| a_i^l)       (Ameisen et al. 2025, "Circuit Tracing")
    pre-activation   mean_n sum_{l,i} relu(-h)                    clt
                     mean_n sum_{l,i} relu(theta - h) |W_dec,i|   january   (Anthropic, January 2025 update)
    AuxK             alpha min(1, n_dead / (d/2)) V |e - e_hat|^2 / |e - mean e|^2   (Gao et al. 2024, arXiv 2406.04093)
"""

import torch
from torch import Tensor

from pipeline.core.sparse import Features, Sparse


def reconstruction(y_hat: Tensor, y: Tensor) -> Tensor:
    """Squared error: mean over tokens, sum over layers and dimensions. [B, L, D], [B, L, D] -> []"""
    return (y_hat - y).square().sum() / y.shape[0]


def tanh_sparsity(features: Features, decoder_norms: Tensor, c: float) -> Tensor:
    """sum_{l,i} tanh(c |W_dec,i^l| a_i^l), mean over tokens. The gradient flows through the norms too.

    features [B, L, F] or sparse, decoder_norms [L, F] -> []
    """
    if isinstance(features, Sparse):
        pairs = zip(features.patterns, features.values, decoder_norms, strict=True)
        terms = [torch.tanh(c * norms[pattern.indices] * values).sum() for pattern, values, norms in pairs]
        return torch.stack(terms).sum() / features.patterns[0].n_tokens
    return torch.tanh(c * decoder_norms * features).sum() / features.shape[0]


def pre_activation(pre_acts: Tensor) -> Tensor:
    """sum_{l,i} relu(-h), mean over tokens. [B, L, F] -> []"""
    return (-pre_acts).relu().sum() / pre_acts.shape[0]


def pre_activation_january(pre_acts: Tensor, threshold: Tensor, decoder_norms: Tensor) -> Tensor:
    """sum_{l,i} relu(theta - h) |W_dec,i|, mean over tokens. [B, L, F], [L, F], [L, F] -> []"""
    return ((threshold - pre_acts).relu() * decoder_norms).sum() / pre_acts.shape[0]


def aux_k(error: Tensor, error_hat: Tensor, n_dead: int, variance: float) -> Tensor:
    """How badly dead features explain what the live ones leave over, in the units of `reconstruction`, alpha apart.

    error [B, L, D] is y - y_hat without gradient, error_hat [B, L, D] the dead features' share of it without a bias,
    n_dead their number over all layers, variance V = sum_m mean_n |y^m - mean y^m|^2 over the whole cache.
    """
    d_model = error.shape[-1]
    scale = min(1.0, n_dead / (d_model / 2))
    spread = (error - error.mean(dim=0)).square().sum()
    return scale * variance * (error - error_hat).square().sum() / spread
