"""Weights of 16 bits while a run trains.

With `train.weights=bfloat16` the encoder and decoder tables are bfloat16 and there is no float32 copy: 2 bytes a
weight, 2 a gradient, and with the 8-bit moments of the one optimiser that takes them 2 more, in place of 16.
Pre-activations and features are bfloat16 too; reconstructions are summed, and losses computed, in float32. Biases,
thresholds and skip paths stay float32: they are few.

A step is far smaller than what bfloat16 resolves (1/256 of a weight), so that rounding to the nearest would lose it:
the optimiser rounds up or down at random, by the distance to either, which is right on average.

The finished weights are float32 again, before thresholds are calibrated, with the values that training ended with.
"""

import torch

from pipeline.arch.base import Transcoder
from pipeline.errors import UserError
from pipeline.train.eight_bit import BLOCK
from pipeline.train.optim import OPTIMISERS
from pipeline.train.options import Precision

TABLES = {"encoders", "decoders"}
"""What becomes bfloat16, by the first part of its name."""

LEFT_OUT = ("tied", "molt")
"""Architectures that mix tables with scales or transforms."""


def check(weights: Precision, optim: str, model: Transcoder) -> None:
    """UserError where bfloat16 weights would lose what training does to them. `model` may lie on the meta device."""
    if weights == Precision.float32:
        return
    if not OPTIMISERS[optim].rounds:
        able = ", ".join(f"optim={name}" for name, entry in OPTIMISERS.items() if entry.rounds)
        raise UserError(
            f"train.weights=bfloat16 needs an optimiser that rounds at random, which optim={optim} does not; use {able}"
        )
    if model.options.name in LEFT_OUT:
        raise UserError(f"train.weights=bfloat16 cannot be had with arch={model.options.name}; use float32")
    odd = [table.numel() for table in _tables(model) if table.numel() % BLOCK]
    if odd:  # their moments would be bfloat16, which the second moment cannot follow
        raise UserError(
            f"train.weights=bfloat16 needs tables that divide into blocks of {BLOCK} numbers, for moments of 8 bits, "
            f"and one has {odd[0]}; change arch.d_features or use float32"
        )


def store(model: Transcoder, weights: Precision) -> None:
    """Round the tables in place to what they are trained in."""
    if weights == Precision.bfloat16:
        for table in _tables(model):
            table.data = table.data.bfloat16()


def restore(model: Transcoder) -> None:
    """The tables as float32."""
    for table in _tables(model):
        if table.dtype == torch.bfloat16:
            table.data = table.data.float()
            table.grad = None


def weight_bytes(model: Transcoder, weights: Precision) -> int:
    """Of a model's parameters while they are trained, whose shapes alone are read."""
    half = sum(table.numel() for table in _tables(model)) if weights == Precision.bfloat16 else 0
    return 4 * model.n_parameters - 2 * half


def _tables(model: Transcoder) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.split(".")[0] in TABLES]
