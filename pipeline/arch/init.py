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

A crosscoder writes all layers from the start, and `transposed` means all of its slots side by side, n = L d. A table
that is shared starts as that of its own layer. With tie=target feature i of every layer looks for the same token, which
is what its one decoder row writes.

A mixture of linear transforms has maps U V of the input in place of decoder rows: U stands in the decoder's column of
the table, and rows of V have length 1 on average, from U(+-sqrt(3/d)) or in the span of the inputs. For `data` and
`random_rows` see `start` in `arch/molt.py`. `transposed` is refused.

Biases (`arch.init_firing=p`): a rule that does not choose how many features fire (ReLU, JumpReLU) gets a bias for each
feature, in place of the one above, such that it fires on the share p of the sample (January update: p = 10,000/m). It
goes with each of the above. Null is `firing`/F for `data` and `random_rows`, and the table's bias for the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Transcoder
from pipeline.arch.held import Held
from pipeline.arch.init_random import active_subspace, transposed, uniform, zero_decoder
from pipeline.arch.init_rows import FIRING, firing_bias, from_data
from pipeline.arch.options import ArchOptions, Init
from pipeline.core.activations import ACTIVATIONS
from pipeline.errors import UserError


class Start(NamedTuple):
    """How one name of `arch.init` fills a transcoder."""

    fill: Callable[[Transcoder, Tensor, Tensor, torch.Generator, float, Held], None]
    """(model, x, y, generator, firing, held), x and y [n, L, D] the sample; the weights of the model are 0."""
    draws_rows: bool = False
    """Whether each feature takes a row of the sample of its own, so that there must be as many."""
    needs_sample: bool = True
    """Whether it looks at the sample; if not, x and y may be empty unless `arch.init_firing` is set."""
    needs_directions: bool = False
    """Whether it reads the rows that features write, so that there must be such."""


def check(options: ArchOptions, activation: str, n_rows: int) -> None:
    """UserError for initialisation options that contradict each other, the activation or the cache's `n_rows`."""
    table.check(options)
    start = INITS[options.init]
    if start.needs_directions and not table.ARCHS[options.name].directions:
        raise UserError(
            f"arch.init={options.init} copies decoder rows, which arch={options.name} has not; "
            "use arch.init=data or uniform"
        )
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
        if activation in ACTIVATIONS and ACTIVATIONS[activation].chooses:
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
def initialise(
    model: Transcoder,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    firing: float = FIRING,
    held: Held | None = None,
) -> None:
    """Fill a fresh transcoder as `arch.init` says. x, y [n, L, D]: a sample in the transcoder's units. firing: active
    features of a token and source to begin with, for rules that do not choose them, where `arch.init_firing` is null
    and the start draws rows.

    held: the features that the model has of a larger one, whose rows are made, bit for bit, and whose biases b_dec are.
    The gain of `data` and `random_rows` alone is the whole's to rounding, since `held.total` adds up what the parts
    write. Every part must be given the same sample and seed; a table of the whole is in memory at a time.
    """
    held = held or Held(model.d_features)
    INITS[model.options.init].fill(model, x, y, generator, firing, held)
    share = model.options.init_firing
    if share is not None and not INITS[model.options.init].draws_rows:
        for source, read in enumerate(model.inputs(x.float())):
            model.b_enc[source] = firing_bias(model, read, source, share, held)


INITS: dict[str, Start] = {
    Init.data: Start(from_data, draws_rows=True),
    Init.random_rows: Start(from_data, draws_rows=True),
    Init.uniform: Start(lambda model, x, y, g, _, held: uniform(model, g, held), needs_sample=False),
    Init.transposed: Start(
        lambda model, x, y, g, _, held: transposed(model, g, held), needs_sample=False, needs_directions=True
    ),
    Init.zero_decoder: Start(lambda model, x, y, g, _, held: zero_decoder(model, x, y, g, held)),
    Init.active_subspace: Start(lambda model, x, y, g, _, held: active_subspace(model, x, y, g, held)),
}
