"""When a layer's features are few enough for the sparse step.

A dense product costs the same however many features are active; a sparse one grows with them. A gate (relu, jumprelu)
has no fixed number, so each layer is measured at each step, and changes its form with hysteresis: sparse layers become
dense above one share of active pairs, dense ones sparse below a lower one, so that a layer near the limit does not
alternate. Both forms compute the same gradients.

Measured on a CPU (256 tokens, 3,072 features, 1,536 outputs; decode, value and weight gradients): the two cost the
same at a share of 16 % against products in float32, at 2.7 % against products in bfloat16.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """Shares of a layer's (token, feature) pairs."""

    below: float
    """A dense layer becomes sparse at this share or less."""
    above: float
    """A sparse layer becomes dense above this share."""


FLOAT32 = Limits(0.12, 0.16)
"""Against dense products in float32 on a CPU."""

FAST = Limits(0.02, 0.027)
"""Against dense products in bfloat16, and on CUDA, where they run on matrix units."""

ALWAYS = Limits(1.0, 1.0)


def limits(like: Tensor) -> Limits:
    """The limits for the device and type of the weights."""
    slow = like.device.type == "cpu" and like.dtype in {torch.float32, torch.float64}
    return FLOAT32 if slow else FAST
