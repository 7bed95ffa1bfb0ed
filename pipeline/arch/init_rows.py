"""Features that begin as rows of a sample (`arch.init=data` and `random_rows`), and biases for a firing rate.

The formulas stand in `arch/init.py`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pipeline.arch.base import Transcoder
from pipeline.arch.held import Held
from pipeline.arch.molt import MOLT
from pipeline.arch.options import Init, Tie
from pipeline.arch.tied import Tied
from pipeline.core.activations import JumpReLU
from pipeline.core.sparse import Features, Sparse

FIRING = 32
"""Active features of a token and layer at the start of a ReLU or JumpReLU run: enough to learn from, few enough that
the penalty does not first have to silence half of them."""

BLOCK = 1024
"""Features whose pre-activations on the whole sample are in memory at once."""


@torch.no_grad()
def from_data(
    model: Transcoder, x: Tensor, y: Tensor, generator: Generator, firing: float = FIRING, held: Held | None = None
) -> None:
    """x, y [n, L, D]: a sample in the transcoder's units, n at least the features of the whole. firing: active features
    of a token and source to begin with, for a rule that does not choose them. Rows are drawn by `draw_apart`, but for
    `arch.init=random_rows`."""
    held, apart = held or Held(model.d_features), model.options.init != Init.random_rows
    share = model.options.init_firing or min(0.5, firing / held.n)
    inputs = model.inputs(x.float())
    every = _draw_shared(inputs, held.n, apart, generator) if _tied_to(model, Tie.target) else None
    for source, read in enumerate(inputs):
        weight, centred = model.encoders[source], read - read.mean(dim=0)
        rows = _draw(F.normalize(centred, dim=1), held.n, apart, generator) if every is None else every
        weight.copy_(held.of(F.normalize(centred[rows], dim=1)))
        model.b_enc[source] = held.of(-held.spread(weight) @ read.mean(dim=0))
        if not model.activation.chooses:
            model.b_enc[source] = firing_bias(model, read, source, share, held)
        if isinstance(model, MOLT):
            model.start(source, read, y[:, source].float(), rows, generator, held)
            continue
        for target, table in model.start_tables(source).items():
            outputs = y[:, target].float()
            table.copy_(held.of((outputs[rows] - outputs.mean(dim=0)) / centred[rows].norm(dim=1, keepdim=True)))
            model.b_dec[target] = outputs.mean(dim=0)
    _fit_gain(model, x, y, held)


def draw_apart(directions: Tensor, n: int, generator: Generator) -> Tensor:
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


def firing_bias(model: Transcoder, inputs: Tensor, source: int, share: float, held: Held | None = None) -> Tensor:
    """Biases with which each feature exceeds its threshold on this share of the inputs [n, width]. -> [F]"""
    rank, weight = max(1, round(share * inputs.shape[0])), model.encoders[source]
    blocks = ((weight[here], block) for here, block in (held or Held(model.d_features)).blocks(BLOCK))
    reached = torch.cat(
        [block.of((inputs @ block.spread(rows).T).topk(rank, dim=0).values[-1]) for rows, block in blocks]
    )
    theta = model.activation.threshold[source] if isinstance(model.activation, JumpReLU) else 0.0
    return theta - reached


def _draw(directions: Tensor, n: int, apart: bool, generator: Generator) -> Tensor:
    if apart:
        return draw_apart(directions, n, generator)
    return torch.randperm(directions.shape[0], generator=generator)[:n]


def _draw_shared(inputs: Sequence[Tensor], n: int, apart: bool, generator: Generator) -> Tensor:
    """Rows for all sources at once: what they read, each in its own direction, side by side."""
    directions = [F.normalize(read - read.mean(dim=0), dim=1) for read in inputs]
    return _draw(F.normalize(torch.cat(directions, dim=1), dim=1), n, apart, generator)


def _fit_gain(model: Transcoder, x: Tensor, y: Tensor, held: Held) -> None:
    """Scale the tables that were filled by the least-squares factors of the reconstruction on the sample: each target
    has one, except where a table writes several targets; then the factors of all tables are found together."""
    n = min(x.shape[0], 1024)
    training = model.training
    # BatchTopK remembers thresholds of what it sees in training; this sample is none of it.
    model.eval()
    x, y = x[:n].to(model.b_dec), y[:n] - model.b_dec
    features = _features(model, x, held)
    model.train(training)
    if _tied_to(model, Tie.source):
        gain = _joint_gain(model, features, y, held)
    else:
        y_hat = held.total(model.decode(features, x) - model.b_dec)
        gain = (y_hat * y).sum(dim=(0, 2)) / y_hat.square().sum(dim=(0, 2)).clamp(min=1e-12)
    for source in range(model.n_sources):
        for target, table in model.start_tables(source).items():
            table.mul_(gain[target])


def _features(model: Transcoder, x: Tensor, held: Held) -> Features:
    """What is here of the features that the whole has on x [n, L, D], which everyone looks at.

    Products are those of the whole: a firing rate puts a threshold at a token, whose side is a matter of rounding.
    """
    rule = model.activation

    def pre_acts() -> Iterator[Tensor]:
        for source, read in enumerate(model.inputs(x)):
            weight, bias = model.encoders[source], model.b_enc[source]
            whole = F.linear(read, held.spread(weight), held.spread(bias.to(weight.dtype)))
            yield whole if held.ids is None else whole[:, held.ids.to(whole.device)]

    with rule.peers.same_tokens():
        if not rule.chooses:
            return rule(torch.stack(list(pre_acts()), dim=1), model.rank_norms())
        chosen = list(rule.choose(pre_acts(), model.rank_norms()))
    return Sparse([pattern for pattern, _ in chosen], [values for _, values in chosen])


def _joint_gain(model: Transcoder, features: Features, y: Tensor, held: Held) -> Tensor:
    """The factors g of the sources for which sum_l g_l (what source l writes) is nearest to y [n, L, D]. -> [L]"""
    parts = torch.zeros(model.n_sources, *y.shape, dtype=torch.float64, device=y.device)
    for source in range(model.n_sources):
        for target in model.targets(source):
            parts[source, :, target] = model.write(features, source, target).double()
    flat = held.total(parts).flatten(1)
    gram = flat @ flat.T
    gram.diagonal().clamp_(min=1e-12)
    return torch.linalg.lstsq(gram, flat @ y.double().flatten()).solution.to(y.dtype)


def _tied_to(model: Transcoder, tie: Tie) -> bool:
    return isinstance(model, Tied) and model.options.tie == tie
