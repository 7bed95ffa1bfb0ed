"""What a transcoder costs in arithmetic.

Convention: a multiply-add is 2 floating-point operations (FLOPs), and only products with weights count. Left out are
biases, the selection of TopK rules (which is bound by memory), normalisation, the losses and the optimiser (about 12
operations a parameter and step, whatever the batch).

    encode          2 F D for each layer that a feature reads: dense, since every pre-activation decides
    decode          2 A D for each (source, target) pair, A = F dense, A = K active features sparse; a skip path 2 D D
    step, dense     2 encode + 3 decode: forward, and the gradients of the weights and of the features
    step, sparse    encode + 3 decode at A = K, and the encoder's gradient at the K chosen rows; with a loss that reads
                    every pre-activation the encoder's gradient is dense: 2 encode + 3 decode at A = K
    step of a gate  counted as dense, which is the most that it can be (`core/density.py`)

Inputs are data and get no gradient, so the encoder has one product backward where the decoder has two.
"""

from statistics import fmean
from typing import NamedTuple

from pipeline.arch.base import Transcoder
from pipeline.core.activations import Choosing


class Flops(NamedTuple):
    """Of one token."""

    encode: float
    decode_dense: float
    decode_sparse: float | None
    """None where the activation does not fix how many features are active."""
    step: float
    """Forward and backward, on the path that training takes."""


def flops(model: Transcoder, needs_pre_acts: bool) -> Flops:
    """needs_pre_acts: whether a loss reads every pre-activation, so that the encoder's gradient is dense."""
    n_layers, d_model = model.dims
    encode = 2.0 * n_layers * d_model * model.d_features
    dense = model.decode_flops([model.d_features] * model.n_sources)
    if not isinstance(model.activation, Choosing):
        return Flops(encode, dense, None, 2 * encode + 3 * dense)
    k = model.activation.k
    sparse = model.decode_flops(k)
    if needs_pre_acts:
        return Flops(encode, dense, sparse, 2 * encode + 3 * sparse)
    return Flops(encode, dense, sparse, encode * (1 + fmean(k) / model.d_features) + 3 * sparse)
