"""Integral control: the coefficient of the sparsity penalty that brings L0 to a target.

    log lambda  <-  log lambda + gain * clip(log(L0 / target), -1, 1)

after every step, with the L0 of its batch. What is summed is the controller's only state, so that a bound on it is
its anti-windup: it stands still at the bound and leaves it with the first error of the other sign. The last tenth of
the run keeps lambda as it is, so that the weights settle under one loss.
"""

import math

from pipeline.core.options import LossOptions

LOWEST, HIGHEST = math.log(1e-6), math.log(1e4)
"""Bounds of log lambda: on a reconstruction error that is summed over layers and dimensions, less than the first costs
nothing, more than the second leaves no feature."""

START = 1e-3
"""lambda to begin with where loss.sparsity is 0."""

FROZEN = 0.1
"""Share of the run, at its end, in which lambda stays."""

TRAVEL = 30.0
"""Sum of the gains of a run: an error of a factor e, held for a thirtieth of the run, moves lambda by a factor e."""

FASTEST = 0.1
"""Gain of a step at most: short runs would steer faster than features follow."""


def first(options: LossOptions) -> float:
    """log lambda before the first step."""
    return min(max(math.log(options.sparsity or START), LOWEST), HIGHEST)


def steered(log_lambda: float, l0: float, target: float, step: int, n_steps: int) -> float:
    """log lambda after step `step` of `n_steps`, counted from 0, whose batch had `l0` active features a token."""
    if step >= (1 - FROZEN) * n_steps:
        return log_lambda
    gain = min(FASTEST, TRAVEL / n_steps)
    # A batch without any active feature is no more than far below the target.
    error = min(max(math.log(max(l0, 1e-3) / target), -1.0), 1.0)
    return min(max(log_lambda + gain * error, LOWEST), HIGHEST)
