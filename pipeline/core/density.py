"""In which form a layer of a gate (relu, jumprelu) takes a training step.

A dense product costs the same however many features are active; a sparse one grows with them. A gate has no fixed
number, so each layer is measured at each step:

    sparse         every pair whose gradient is needed is in a list: the active ones and those in the window
    dense_window   the active pairs are in a list; the window, far larger, gets its gradient from a dense product
    dense          everything is dense

The forms compute the same gradients. They change with hysteresis: a layer leaves a sparse form above one share of
pairs and comes back below a lower one, so that a layer near the limit does not alternate.

Measured on a CPU (256 tokens, 3,072 features, 1,536 outputs; decode, value and weight gradients): sparse and dense cost
the same at a share of 16 % against products in float32, at 2.7 % against products in bfloat16. A pair in the window
costs a third of an active one, and a dense window one of three dense products, so that the same share holds for it.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Form(IntEnum):
    dense = 0
    dense_window = 1
    sparse = 2


class Limits(NamedTuple):
    """Shares of a layer's (token, feature) pairs."""

    below: float
    """A dense layer becomes sparse at this share or less."""
    above: float
    """A sparse layer becomes dense above this share."""

    def hold(self, share: float, was_sparse: bool) -> bool:
        """Whether a layer with such a share of pairs is to be sparse."""
        return share <= (self.above if was_sparse else self.below)


FLOAT32 = Limits(0.12, 0.16)
"""Against dense products in float32 on a CPU."""

FAST = Limits(0.02, 0.027)
"""Against dense products in bfloat16, and on CUDA, where they run on matrix units."""

ALWAYS = Limits(1.0, 1.0)


def limits(like: Tensor) -> Limits:
    """The limits for the device and type of the weights."""
    slow = like.device.type == "cpu" and like.dtype in {torch.float32, torch.float64}
    return FLOAT32 if slow else FAST
