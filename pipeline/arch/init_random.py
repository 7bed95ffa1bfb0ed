"""Features that begin at random (`arch.init=uniform`, `transposed`, `zero_decoder` and `active_subspace`).

The formulas and their sources stand in `arch/init.py`.
"""

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.held import Held

VARIANCE = 0.99
"""What `arch.init_variance=null` keeps: the share that the paper speaks of."""


@torch.no_grad()
def uniform(model: Transcoder, generator: torch.Generator, held: Held | None = None) -> None:
    """The bounds of the CLT recipe; biases stay 0."""
    held = held or Held(model.d_features)
    rows, (n_layers, d_model) = model.table_rows(held), model.dims
    for source, weight in enumerate(model.encoders):
        _draw_uniform(weight, held.n**-0.5, generator, held)
        for table in model.tables(source):
            _draw_uniform(table, (n_layers * d_model) ** -0.5, generator, rows)
        for reader, bound in model.readers(source):
            _draw_uniform(reader, bound, generator, rows)


@torch.no_grad()
def transposed(model: Transcoder, generator: torch.Generator, held: Held | None = None) -> None:
    """Decoders as in the January update, encoders the transposes of their own slots; biases stay 0."""
    held = held or Held(model.d_features)
    for source in range(model.n_sources):
        for table in model.tables(source):
            _draw_uniform(table, (len(model.targets(source)) * model.dims.d_model) ** -0.5, generator, held)
    for source, weight in enumerate(model.encoders):
        own = torch.cat([model.table(source, layer) for layer in model.reads(source)], dim=1)
        weight.copy_(own * (model.width() / held.n))


@torch.no_grad()
def zero_decoder(model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator, held: Held | None = None) -> None:
    """Encoders as `uniform`, decoders 0, biases at the means. x, y [n, L, D]"""
    held = held or Held(model.d_features)
    for source, weight in enumerate(model.encoders):
        _draw_uniform(weight, held.n**-0.5, generator, held)
        for reader, bound in model.readers(source):
            _draw_uniform(reader, bound, generator, model.table_rows(held))
    _centre(model, x, y, held)


@torch.no_grad()
def active_subspace(
    model: Transcoder, x: Tensor, y: Tensor, generator: torch.Generator, held: Held | None = None
) -> None:
    """Rows in the spans of the first principal components, biases at the means. x, y [n, L, D]"""
    held = held or Held(model.d_features)
    rows, (n_layers, d_model) = model.table_rows(held), model.dims
    share = model.options.init_variance or VARIANCE
    read = [components(part, share) for part in x.unbind(1)]
    written = [components(part, share) for part in y.unbind(1)]
    for source, weight in enumerate(model.encoders):
        bound = held.n**-0.5
        blocks = weight.split(d_model, dim=1)
        for layer, block in zip(model.reads(source), blocks, strict=True):
            _draw_in(block, read[layer], bound, generator, held)
        for reader, bound in model.readers(source):
            _draw_in(reader, read[model.reads(source).start], bound, generator, rows)
        tables, targets = list(model.tables(source)), model.targets(source)
        # A table that writes several layers is drawn for its own.
        pairs = zip(targets, tables, strict=True) if len(tables) == len(targets) else model.start_tables(source).items()
        for target, table in pairs:
            _draw_in(table, written[target], (n_layers * d_model) ** -0.5, generator, rows)
    _centre(model, x, y, held)


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


def _draw_uniform(weight: Tensor, bound: float, generator: torch.Generator, held: Held) -> None:
    whole = torch.empty(held.n, *weight.shape[1:], dtype=weight.dtype)
    weight.copy_(held.of(whole.uniform_(-bound, bound, generator=generator)))


def _draw_in(weight: Tensor, basis: Tensor, bound: float, generator: torch.Generator, held: Held) -> None:
    """Rows of `weight` [F, D] in the span of `basis` [r, D], with the mean square length of rows from U(+-bound)."""
    r, d_model = basis.shape
    wider = bound * (d_model / r) ** 0.5
    drawn = torch.empty(held.n, r, dtype=torch.float64).uniform_(-wider, wider, generator=generator)
    weight.copy_(held.of(drawn.to(basis.device) @ basis))


def _centre(model: Transcoder, x: Tensor, y: Tensor, held: Held) -> None:
    """b_enc = -W_enc mean x, b_dec = mean y."""
    for source, read in enumerate(model.inputs(x.float())):
        model.b_enc[source] = held.of(-held.spread(model.encoders[source]) @ read.mean(dim=0))
    model.b_dec.copy_(y.float().mean(dim=0))
