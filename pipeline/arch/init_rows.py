"""Features that begin as rows of a sample (`arch.init=data` and `random_rows`), and biases for a firing rate.

The formulas stand in `arch/init.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Transcoder
from pipeline.arch.molt import MOLT
from pipeline.arch.options import Tie
from pipeline.arch.tied import Tied
from pipeline.core.activations import JumpReLU
from pipeline.core.sparse import Features

FIRING = 32
"""Active features of a token and layer at the start of a ReLU or JumpReLU run: enough to learn from, few enough that
the penalty does not first have to silence half of them."""

BLOCK = 1024
"""Features whose pre-activations on the whole sample are in memory at once."""


@torch.no_grad()
def from_data(
    model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator, firing: float = FIRING, apart: bool = True
) -> None:
    """x, y [n, L, D]: a sample in the transcoder's units, n at least d_features. firing: active features of a token and
    source to begin with, for a rule that does not choose them. `apart`: `draw_apart`."""
    share = model.options.init_firing or min(0.5, firing / model.d_features)
    inputs = model.inputs(x.float())
    every = _draw_shared(inputs, model.d_features, apart, generator) if _tied_to(model, Tie.target) else None
    for source, read in enumerate(inputs):
        weight, centred = model.encoders[source], read - read.mean(dim=0)
        rows = _draw(F.normalize(centred, dim=1), model.d_features, apart, generator) if every is None else every
        weight.copy_(F.normalize(centred[rows], dim=1))
        model.b_enc[source] = -weight @ read.mean(dim=0)
        if not model.activation.chooses:
            model.b_enc[source] = firing_bias(model, read, source, share)
        if isinstance(model, MOLT):
            model.start(source, read, y[:, source].float(), rows, generator)
            continue
        for target, table in model.start_tables(source).items():
            outputs = y[:, target].float()
            table.copy_((outputs[rows] - outputs.mean(dim=0)) / centred[rows].norm(dim=1, keepdim=True))
            model.b_dec[target] = outputs.mean(dim=0)
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


def firing_bias(model: Transcoder, inputs: Tensor, source: int, share: float) -> Tensor:
    """Biases with which each feature exceeds its threshold on this share of the inputs [n, width]. -> [F]"""
    rank = max(1, round(share * inputs.shape[0]))
    blocks = model.encoders[source].split(BLOCK)
    reached = torch.cat([(inputs @ block.T).topk(rank, dim=0).values[-1] for block in blocks])
    theta = model.activation.threshold[source] if isinstance(model.activation, JumpReLU) else 0.0
    return theta - reached


def _draw(directions: Tensor, n: int, apart: bool, generator: torch.Generator) -> Tensor:
    if apart:
        return draw_apart(directions, n, generator)
    return torch.randperm(directions.shape[0], generator=generator)[:n]


def _draw_shared(inputs: Sequence[Tensor], n: int, apart: bool, generator: torch.Generator) -> Tensor:
    """Rows for all sources at once: what they read, each in its own direction, side by side."""
    directions = [F.normalize(read - read.mean(dim=0), dim=1) for read in inputs]
    return _draw(F.normalize(torch.cat(directions, dim=1), dim=1), n, apart, generator)


def _fit_gain(model: Transcoder, x: Tensor, y: Tensor) -> None:
    """Scale the tables that were filled by the least-squares factors of the reconstruction on the sample: each target
    has one, except where a table writes several targets; then the factors of all tables are found together."""
    n = min(x.shape[0], 1024)
    training = model.training
    # BatchTopK remembers thresholds of what it sees in training; this sample is none of it.
    out = model.eval()(x[:n].float())
    model.train(training)
    y_hat, y = out.y_hat - model.b_dec, y[:n] - model.b_dec
    if _tied_to(model, Tie.source):
        gain = _joint_gain(model, out.features, y)
    else:
        gain = (y_hat * y).sum(dim=(0, 2)) / y_hat.square().sum(dim=(0, 2)).clamp(min=1e-12)
    for source in range(model.n_sources):
        for target, table in model.start_tables(source).items():
            table.mul_(gain[target])


def _joint_gain(model: Transcoder, features: Features, y: Tensor) -> Tensor:
    """The factors g of the sources for which sum_l g_l (what source l writes) is nearest to y [n, L, D]. -> [L]"""
    parts = torch.zeros(model.n_sources, *y.shape, dtype=torch.float64, device=y.device)
    for source in range(model.n_sources):
        for target in model.targets(source):
            parts[source, :, target] = model.write(features, source, target).double()
    flat = parts.flatten(1)
    gram = flat @ flat.T
    gram.diagonal().clamp_(min=1e-12)
    return torch.linalg.lstsq(gram, flat @ y.double().flatten()).solution.to(y.dtype)


def _tied_to(model: Transcoder, tie: Tie) -> bool:
    return isinstance(model, Tied) and model.options.tie == tie
