"""Proportional-integral control: the coefficient of the sparsity penalty that brings L0 to a target.

After every step, with the L0 of its batch and goal = log target:

    l     <-  l + (log L0 - l) / SMOOTH                          log L0 without most of a batch's noise
    aim   <-  goal + (1 - 1/left) max(min(aim, l) - goal, 0)     left: steps that the ramp of the aim has left
    I     <-  I + K_I clip(l - aim, -1, 1)                       K_I = min(TRAVEL / n_steps, FASTEST)
    log lambda = I + clip(K_P (l - aim), -SWING, SWING)          K_P = PROPORTIONAL

Three things make it land where an integral alone did not. Features that a penalty silenced come back slowly, so L0 is
led down to its target over the first half of the run: `aim` falls from L0 as it is, log-linearly, and faster only
where L0 falls by itself; and lambda begins far below where it will end. log L0 changes at a rate that log lambda sets,
so that an integral alone overshoots: lambda has to answer the error itself too. And the reconstruction error, and with
it the lambda that holds an L0, falls for as long as the run lasts, so control ends with the run and no earlier: the
falling learning rate takes its effect away by itself.

What is summed is bounded, which is its anti-windup: it stands still at the bound and leaves it with the first error of
the other sign.
"""

import math
from dataclasses import dataclass

from pipeline.core.options import LossOptions

LOWEST, HIGHEST = math.log(1e-6), math.log(1e4)
"""Bounds of log lambda: on a reconstruction error that is summed over layers and dimensions, less than the first costs
nothing, more than the second leaves no feature."""

START = 0.05
"""Taken for loss.sparsity where that is 0."""

BELOW = 50.0
"""How far below loss.sparsity, as a factor, lambda begins: rising takes some steps, undoing an overshoot most of a run."""

RAMP = 0.5
"""Share of the run in which L0 is led to its target."""

SMOOTH = 3.0
"""Steps of the running mean of log L0. More of them would delay the answer, and their number may not grow with the run:
how fast features follow is a matter of steps."""

TRAVEL = 200.0
"""Sum of the integral's gains of a run: an error of 1 %, held for half of the run, moves lambda by a factor e."""

FASTEST = 0.3
"""The integral's gain at most: short runs would steer faster than features follow."""

PROPORTIONAL = 20.0
"""K_P: L0 5 % too high makes lambda 2.7 times as large. On the built-in world log L0 moves by about .006 a step for
each unit of log lambda, so that the proportional part alone has a time constant of 8 steps."""

SWING = 4.0
"""The proportional part at most: a factor of 55 in lambda."""


@dataclass(frozen=True)
class Steering:
    """The controller's state: what the next step needs, all of it in checkpoints."""

    log_lambda: float
    """Of the next step."""

    integral: float
    """I, the slow part of log_lambda."""

    log_l0: float = math.nan
    """l; NaN before the first step."""

    log_aim: float = math.nan
    """NaN before the first step."""


def first(options: LossOptions) -> Steering:
    """Before the first step."""
    start = _bounded(math.log((options.sparsity or START) / BELOW))
    return Steering(start, start)


def steered(now: Steering, l0: float, target: float, step: int, n_steps: int) -> Steering:
    """After step `step` of `n_steps`, counted from 0, whose batch had `l0` active features a token."""
    # A batch without any active feature is no more than far below the target.
    measured, goal = math.log(max(l0, 1e-3)), math.log(target)
    begins = math.isnan(now.log_l0)
    log_l0 = measured if begins else now.log_l0 + (measured - now.log_l0) / min(step + 1, SMOOTH)
    above = max((log_l0 if begins else min(now.log_aim, log_l0)) - goal, 0.0)
    left = RAMP * n_steps - step
    log_aim = goal + (1 - 1 / left) * above if left > 1 else goal
    error = log_l0 - log_aim
    gain = min(FASTEST, TRAVEL / n_steps)
    integral = _bounded(now.integral + gain * min(max(error, -1.0), 1.0))
    swing = min(max(PROPORTIONAL * error, -SWING), SWING)
    return Steering(_bounded(integral + swing), integral, log_l0, log_aim)


def _bounded(log_lambda: float) -> float:
    return min(max(log_lambda, LOWEST), HIGHEST)
