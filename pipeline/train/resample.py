"""Resampling dead features (Bricken et al. 2023, "Towards Monosemanticity", adapted).

At stated steps each dead feature begins again at a token of the batch that is reconstructed badly, drawn without
replacement within a layer, with probability proportional to its squared loss:

    encoder   direction of the token's input about the batch's mean, as long as a living feature's row is on average
    bias      centres the input; for ReLU and JumpReLU such that the feature fires on the share FIRING / F of the batch
    decoder   SHARE of the token's residual error in each layer that the feature writes, over its pre-activation there
    moments   0, in every parameter's rows of that feature

Theirs are a sample of inputs, unit decoder rows and encoder rows at .2 of the living; ours is the batch of the step,
so that the result is a function of the checkpoint, and the share is taken in the decoder, since TopK features have to
win a comparison of pre-activations.

Where features lie on several ranks, tokens are drawn for the dead ones of all, and each rank restarts its own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Transcoder
from pipeline.arch.init_rows import FIRING
from pipeline.core.activations import JumpReLU
from pipeline.dist import sharded
from pipeline.dist.sharded import Ranks
from pipeline.train.optimisers import forget

SHARE = 0.2
"""How much of its token's error a resampled feature explains: several of a token's features may begin at once."""


@torch.no_grad()
def resample(
    model: Transcoder,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    error: Tensor,
    dead: Tensor,
    generator: torch.Generator,
    ranks: Ranks | None = None,
) -> Tensor:
    """Restart dead features in place. x, error = y - y_hat [B, L, D], dead bool [L, F] -> those restarted, [L, F].

    No more of a layer than the batch has tokens. `generator` is one of the CPU. With `ranks` x and error are of the
    tokens of all, model and dead of the features that are here.
    """
    ranks = ranks or sharded.alone(model)
    restarted, dead = torch.zeros_like(dead), ranks.of_all(dead)
    weight = error.double().square().sum(dim=(1, 2)).square().cpu()
    for layer in range(model.n_sources):
        ids = dead[layer].nonzero().squeeze(1)[: int((weight > 0).sum())]
        if ids.numel():
            tokens = torch.multinomial(weight, ids.numel(), generator=generator).to(x.device)
            here, which = ranks.places(ids)
            length = _length(model, layer, here, x, ranks)
            _restart(model, x[:, layer], error, layer, here, tokens[which], length, ranks.whole.d_features)
            restarted[layer, here] = True
    _forget(model, optimizer, restarted)
    return restarted


def _length(model: Transcoder, layer: int, ids: Tensor, x: Tensor, ranks: Ranks) -> Tensor:
    """The mean length of the encoder rows of all features but these; 1 where there are no others. -> []"""
    living = torch.ones(model.d_features, dtype=torch.bool, device=x.device).index_fill(0, ids, False)
    lengths = model.encoders[layer][living].norm(dim=1).to(x.dtype)
    if ranks.splits:
        total, n = ranks.mesh.features.sum(torch.stack([lengths.sum(), living.sum().to(x.dtype)]), "resample")
        return total / n if n else torch.ones_like(total)
    return lengths.mean() if living.any() else x.new_ones(())


def _restart(
    model: Transcoder,
    x: Tensor,
    error: Tensor,
    layer: int,
    ids: Tensor,
    tokens: Tensor,
    length: Tensor,
    d_features: int,
) -> None:
    weight, mean = model.encoders[layer], x.mean(dim=0)
    rows = F.normalize(x[tokens] - mean, dim=1) * length
    at_token = (rows * (x[tokens] - mean)).sum(dim=1)
    bias, theta = -rows @ mean, torch.zeros_like(at_token)
    if not model.activation.chooses:
        if isinstance(model.activation, JumpReLU):
            theta = model.activation.threshold[layer, ids]
        rank = max(1, round(min(0.5, FIRING / d_features) * x.shape[0]))
        reached = ((x - mean) @ rows.T).topk(rank, dim=0).values[-1]
        # The feature's own token is among those that it fires on.
        bias = bias + theta - torch.minimum(reached, at_token / 2)
    weight[ids] = rows.to(weight.dtype)
    model.b_enc[layer, ids] = bias
    value = (x[tokens] * rows).sum(dim=1) + bias
    for target, table in zip(model.targets(layer), model.tables(layer), strict=True):
        table[ids] = (SHARE * error[tokens, target] / value.clamp(min=1e-6)[:, None]).to(table.dtype)


def _forget(model: Transcoder, optimizer: torch.optim.Optimizer, restarted: Tensor) -> None:
    """Zero the optimiser's moments of the features: [L, F] parameters, and each layer's tables."""
    by_layer = [(model.b_enc, restarted)]
    if isinstance(model.activation, JumpReLU):
        by_layer.append((model.activation.log_threshold, restarted))
    for layer in range(model.n_sources):
        by_layer += [(table, restarted[layer]) for table in (model.encoders[layer], *model.tables(layer))]
    for parameter, rows in by_layer:
        forget(optimizer, parameter, rows)
