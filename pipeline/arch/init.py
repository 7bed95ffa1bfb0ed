"""Initial weights, from a seed and a sample of normalised inputs and targets. The generator is one of the CPU whatever
the model's device, so that a seed means the same everywhere. F features a layer, d the width, L layers, M_l the number
of layers that layer l writes, mean x and mean y those of the sample.

                     encoder                        decoder                                   b_enc           b_dec
    data             directions of inputs, drawn    own layer: those tokens' targets;         -W_enc mean x   mean y
                     apart                          later layers: 0
    random_rows      directions of inputs, drawn    the same                                  -W_enc mean x   mean y
                     plainly
    uniform          U(+-1/sqrt F)                  U(+-1/sqrt(L d))                          0               0
    transposed       own slot of W_dec, times d/F   U(+-1/sqrt(M_l d))                        0               0
    zero_decoder     U(+-1/sqrt F)                  0                                         -W_enc mean x   mean y
    active_subspace  as uniform, but in the span    as uniform, but in the span of the        -W_enc mean x   mean y
                     of the inputs' first           targets' first components, each
                     principal components           target layer its own

`data`, `random_rows`: with u_i the direction of the drawn input x_i - mean x, feature i starts at h_i = u_i . (x - mean
x), so that it looks for inputs like x_i, and it writes what the MLP made of x_i: W_dec,i = g (y_i - mean y) / |x_i -
mean x|, g the number for each layer that fits the sample best. Drawing apart (each next row is the input that is least
like the rows before) spreads features over rare inputs too, and leaves fewer of them dead.

`uniform`: the bounds of the CLT recipe (Ameisen et al. 2025, "Circuit Tracing", methods).

`transposed`: Anthropic's January 2025 update (transformer-circuits.pub/2025/january-update, with its erratum): W_dec ~
U(+-1/sqrt n), W_enc = W_dec^T n/m, n the width and m the number of features. A cross-layer decoder has a slot for each
target and the encoder reads one layer only: it is the transpose of the slot that writes the layer that it reads. The
rows of all slots together are then as long as one row of the update's (M_l = 1 is the update to the letter).

`zero_decoder`: the run begins at the mean target, FVU 1, and decoders learn first (EleutherAI's sparsify does this for
transcoders).

`active_subspace`: Wang et al. 2025, "Attention Layers Add Into Low-Dimensional Residual Subspaces" (arXiv 2508.16929):
activations fill a part of the space only, and features outside of it never fire. The part is the span of the first
principal components that keep `arch.init_variance` of the sample's variance; rows are as long as those of `uniform`.

Biases (`arch.init_firing=p`): a rule that does not choose how many features fire (ReLU, JumpReLU) gets a bias for each
feature, in place of the one above, such that it fires on the share p of the sample (January update: p = 10,000/m). It
goes with each of the above. Null is `FIRING`/F for `data` and `random_rows`, and the table's bias for the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Transcoder
from pipeline.arch.options import ArchOptions, Init
from pipeline.core.activations import ACTIVATIONS, JumpReLU
from pipeline.errors import UserError

FIRING = 32
"""Active features of a token and layer at the start of a ReLU or JumpReLU run: enough to learn from, few enough that
the penalty does not first have to silence half of them."""

VARIANCE = 0.99
"""What `arch.init_variance=null` keeps: the share that the paper speaks of."""

BLOCK = 1024
"""Features whose pre-activations on the whole sample are in memory at once."""


class Start(NamedTuple):
    """How one name of `arch.init` fills a transcoder."""

    fill: Callable[[Transcoder, Tensor, Tensor, torch.Generator], None]
    """(model, x, y, generator), x and y [n, L, D] the sample; the weights of the model are 0."""
    draws_rows: bool = False
    """Whether each feature takes a row of the sample of its own, so that there must be as many."""
    needs_sample: bool = True
    """Whether it looks at the sample; if not, x and y may be empty unless `arch.init_firing` is set."""


def check(options: ArchOptions, activation: str, n_rows: int) -> None:
    """UserError for initialisation options that contradict each other, the activation or the cache's `n_rows`."""
    start = INITS[options.init]
    if start.draws_rows and n_rows < options.d_features:
        raise UserError(
            f"arch.init={options.init} draws {options.d_features} different rows, the cache has {n_rows}; "
            "use arch.init=uniform or a larger dataset.n_tokens"
        )
    if options.init_variance is not None:
        if options.init != Init.active_subspace:
            raise UserError(
                f"arch.init_variance has no meaning for arch.init={options.init}; "
                "leave it out or use arch.init=active_subspace"
            )
        if not 0 < options.init_variance <= 1:
            raise UserError(f"arch.init_variance={options.init_variance} is a share and must lie in (0, 1]")
    if options.init_firing is not None:
        if ACTIVATIONS[activation].chooses:
            raise UserError(
                f"arch.init_firing has no meaning for activation={activation}, which chooses how many features fire; "
                "leave it out"
            )
        if not 0 < options.init_firing <= 0.5:
            raise UserError(f"arch.init_firing={options.init_firing} is a share of tokens and must lie in (0, 0.5]")


def needs_sample(options: ArchOptions) -> bool:
    """Whether `initialise` looks at x and y."""
    return INITS[options.init].needs_sample or options.init_firing is not None


@torch.no_grad()
def initialise(model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """Fill a fresh transcoder as `arch.init` says. x, y [n, L, D]: a sample in the transcoder's units."""
    INITS[model.options.init].fill(model, x, y, generator)
    share = model.options.init_firing
    if share is not None and not INITS[model.options.init].draws_rows:
        for layer in range(len(model.encoders)):
            model.b_enc[layer] = firing_bias(model, x[:, layer].float(), layer, share)


@torch.no_grad()
def uniform(model: Transcoder, generator: torch.Generator) -> None:
    """The bounds of the CLT recipe; biases stay 0."""
    n_layers, d_model = model.dims
    for layer, weight in enumerate(model.encoders):
        _draw_uniform(weight, model.d_features**-0.5, generator)
        for table in model.tables(layer):
            _draw_uniform(table, (n_layers * d_model) ** -0.5, generator)


@torch.no_grad()
def transposed(model: Transcoder, generator: torch.Generator) -> None:
    """Decoders as in the January update, encoders the transposes of their own slots; biases stay 0."""
    d_model = model.dims.d_model
    for layer, weight in enumerate(model.encoders):
        tables = list(model.tables(layer))
        for table in tables:
            _draw_uniform(table, (len(tables) * d_model) ** -0.5, generator)
        own = tables[model.targets(layer).index(layer)]
        weight.copy_(own * (d_model / model.d_features))


@torch.no_grad()
def zero_decoder(model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """Encoders as `uniform`, decoders 0, biases at the means. x, y [n, L, D]"""
    for weight in model.encoders:
        _draw_uniform(weight, model.d_features**-0.5, generator)
    _centre(model, x, y)


@torch.no_grad()
def active_subspace(model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """Rows in the spans of the first principal components, biases at the means. x, y [n, L, D]"""
    n_layers, d_model = model.dims
    share = model.options.init_variance or VARIANCE
    written = [components(part, share) for part in y.unbind(1)]
    for layer, weight in enumerate(model.encoders):
        _draw_in(weight, components(x[:, layer], share), model.d_features**-0.5, generator)
        for target, table in zip(model.targets(layer), model.tables(layer), strict=True):
            _draw_in(table, written[target], (n_layers * d_model) ** -0.5, generator)
    _centre(model, x, y)


@torch.no_grad()
def from_data(model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator, apart: bool = True) -> None:
    """x, y [n, L, D]: a sample in the transcoder's units, n at least d_features."""
    share = model.options.init_firing or min(0.5, FIRING / model.d_features)
    for layer, weight in enumerate(model.encoders):
        inputs, outputs = x[:, layer].float(), y[:, layer].float()
        centred = inputs - inputs.mean(dim=0)
        if apart:
            rows = draw_apart(F.normalize(centred, dim=1), model.d_features, generator)
        else:
            rows = torch.randperm(x.shape[0], generator=generator)[: model.d_features]
        weight.copy_(F.normalize(centred[rows], dim=1))
        model.b_enc[layer] = -weight @ inputs.mean(dim=0)
        if not model.activation.chooses:
            model.b_enc[layer] = firing_bias(model, inputs, layer, share)
        model.b_dec[layer] = outputs.mean(dim=0)
        own = next(model.tables(layer))
        own.copy_((outputs[rows] - outputs.mean(dim=0)) / centred[rows].norm(dim=1, keepdim=True))
    _fit_gain(model, x, y)


INITS: dict[str, Start] = {
    Init.data: Start(from_data, draws_rows=True),
    Init.random_rows: Start(lambda model, x, y, g: from_data(model, x, y, g, apart=False), draws_rows=True),
    Init.uniform: Start(lambda model, x, y, g: uniform(model, g), needs_sample=False),
    Init.transposed: Start(lambda model, x, y, g: transposed(model, g), needs_sample=False),
    Init.zero_decoder: Start(zero_decoder),
    Init.active_subspace: Start(active_subspace),
}


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


def components(values: Tensor, share: float) -> Tensor:
    """The first principal components of `values` [n, D] about their mean that keep `share` of the variance. -> [r, D]

    Orthonormal rows, r >= 1 the least number that is enough.
    """
    centred = values.double() - values.double().mean(dim=0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred)
    kept = variances.clamp(min=0).flip(0).cumsum(0)
    # The last sum rounds to less than itself now and then; share = 1 keeps all that varies.
    r = min(int((kept < share * kept[-1] * (1 - 1e-12)).sum()) + 1, values.shape[1])
    return vectors.flip(1)[:, :r].T.contiguous()


def firing_bias(model: Transcoder, inputs: Tensor, layer: int, share: float) -> Tensor:
    """Biases with which each feature exceeds its threshold on this share of the inputs [n, D]. -> [F]"""
    rank = max(1, round(share * inputs.shape[0]))
    blocks = model.encoders[layer].split(BLOCK)
    reached = torch.cat([(inputs @ block.T).topk(rank, dim=0).values[-1] for block in blocks])
    theta = model.activation.threshold[layer] if isinstance(model.activation, JumpReLU) else 0.0
    return theta - reached


def _draw_uniform(weight: Tensor, bound: float, generator: torch.Generator) -> None:
    weight.copy_(torch.empty(weight.shape, dtype=weight.dtype).uniform_(-bound, bound, generator=generator))


def _draw_in(weight: Tensor, basis: Tensor, bound: float, generator: torch.Generator) -> None:
    """Rows of `weight` [F, D] in the span of `basis` [r, D], with the mean square length of rows from U(+-bound)."""
    r, d_model = basis.shape
    wider = bound * (d_model / r) ** 0.5
    drawn = torch.empty(weight.shape[0], r, dtype=torch.float64).uniform_(-wider, wider, generator=generator)
    weight.copy_(drawn.to(basis.device) @ basis)


def _centre(model: Transcoder, x: Tensor, y: Tensor) -> None:
    """b_enc = -W_enc mean x, b_dec = mean y."""
    for layer, weight in enumerate(model.encoders):
        model.b_enc[layer] = -weight @ x[:, layer].float().mean(dim=0)
    model.b_dec.copy_(y.float().mean(dim=0))


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
