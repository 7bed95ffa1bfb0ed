"""Initial weights, from a seed and, for `data`, a sample of normalised inputs and targets. The generator is one of the
CPU whatever the model's device, so that a seed means the same everywhere.

            encoder                   decoder                        b_enc               b_dec
    uniform U(+-1/sqrt F)             U(+-1/sqrt(L d))               0                   0
    data    directions of inputs,     own layer: those tokens'       centres the inputs  mean target
            drawn apart               targets; later layers: 0

`data`: with u_i the direction of the drawn input x_i - mean x, feature i starts at h_i = u_i . (x - mean x), so that it
looks for inputs like x_i, and it writes what the MLP made of x_i: W_dec,i = g (y_i - mean y) / |x_i - mean x|, g the
number for each layer that fits the sample best. Drawing apart (each next row is the input that is least like the rows
before) spreads features over rare inputs too, and leaves fewer of them dead.

A rule that does not choose how many features fire (ReLU, JumpReLU) gets a bias for each feature in place of the
centring one, such that it fires on the share `FIRING / F` of the sample, or another that is asked for.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Transcoder
from pipeline.core.activations import JumpReLU

FIRING = 32
"""Active features of a token and layer at the start of a ReLU or JumpReLU run: enough to learn from, few enough that
the penalty does not first have to silence half of them."""

BLOCK = 1024
"""Features whose pre-activations on the whole sample are in memory at once."""


@torch.no_grad()
def uniform(model: Transcoder, generator: torch.Generator) -> None:
    """The bounds of the CLT recipe; biases stay 0."""
    n_layers, d_model = model.dims
    for layer, weight in enumerate(model.encoders):
        _draw_uniform(weight, model.d_features**-0.5, generator)
        for table in model.tables(layer):
            _draw_uniform(table, (n_layers * d_model) ** -0.5, generator)


@torch.no_grad()
def from_data(model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator, firing: float = FIRING) -> None:
    """x, y [n, L, D]: a sample in the transcoder's units, n at least d_features. firing: active features of a token and
    layer to begin with, for a rule that does not choose them."""
    for layer, weight in enumerate(model.encoders):
        inputs, outputs = x[:, layer].float(), y[:, layer].float()
        centred = inputs - inputs.mean(dim=0)
        rows = draw_apart(F.normalize(centred, dim=1), model.d_features, generator)
        weight.copy_(F.normalize(centred[rows], dim=1))
        model.b_enc[layer] = -weight @ inputs.mean(dim=0)
        if not model.activation.chooses:
            model.b_enc[layer] = _firing_bias(model, inputs, layer, firing)
        model.b_dec[layer] = outputs.mean(dim=0)
        own = next(model.tables(layer))
        own.copy_((outputs[rows] - outputs.mean(dim=0)) / centred[rows].norm(dim=1, keepdim=True))
    _fit_gain(model, x, y)


def draw_apart(directions: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Indices of n rows of `directions` [N, D] (unit length), each far from those drawn before.

    Greedy in rounds: a round draws rows at random with probability proportional to (1 - c)^2, c the largest cosine with
    any row drawn so far (k-means++ on the sphere), 32 of them before c is brought up to date.
    """
    total = directions.shape[0]
    chosen = torch.randint(total, (1,), generator=generator)
    nearest = directions @ directions[chosen[0]]
    while chosen.numel() < n:
        weight = (1 - nearest).clamp(min=1e-6).square().cpu()
        weight[chosen] = 0
        new = torch.multinomial(weight, min(32, n - chosen.numel()), generator=generator)
        nearest = torch.maximum(nearest, (directions @ directions[new].T).amax(dim=1))
        chosen = torch.cat([chosen, new])
    return chosen


def _draw_uniform(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).uniform_(-bound, bound, generator=generator))


def _firing_bias(model: Transcoder, inputs: Tensor, layer: int, firing: float) -> Tensor:
    """Biases with which each feature exceeds its threshold on the share firing / F of the inputs [n, D]. -> [F]"""
    share = min(0.5, firing / model.d_features)
    rank = max(1, round(share * inputs.shape[0]))
    blocks = model.encoders[layer].split(BLOCK)
    reached = torch.cat([(inputs @ block.T).topk(rank, dim=0).values[-1] for block in blocks])
    theta = model.activation.threshold[layer] if isinstance(model.activation, JumpReLU) else 0.0
    return theta - reached


def _fit_gain(model: Transcoder, x: Tensor, y: Tensor) -> None:
    """Scale each layer's own decoder by the least-squares factor of its reconstruction on the sample."""
    n = min(x.shape[0], 1024)
    training = model.training
    # BatchTopK remembers thresholds of what it sees in training; this sample is none of it.
    y_hat = model.eval()(x[:n].float()).y_hat - model.b_dec
    model.train(training)
    y = y[:n] - model.b_dec
    gain = (y_hat * y).sum(dim=(0, 2)) / y_hat.square().sum(dim=(0, 2)).clamp(min=1e-12)
    for layer, factor in enumerate(gain):
        next(model.tables(layer)).mul_(factor)
