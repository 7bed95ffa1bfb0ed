"""Schedules: pure functions of how much of the run is behind us. Nothing here remembers anything."""

import math

from pipeline.core.options import LossOptions, Schedule
from pipeline.train.options import LrSchedule, OptimOptions


def learning_rate(options: OptimOptions, step: int, n_steps: int) -> float:
    """The rate of step `step` of `n_steps`, counted from 0.

    Rises linearly over the first `warmup` of the run, holds, and falls to 0 over the last `decay` of it.
    """
    warmup = options.warmup * n_steps
    rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if options.schedule == LrSchedule.constant or options.decay <= 0:
        return options.lr * rise
    left = min(1.0, (n_steps - step) / (options.decay * n_steps))
    fall = left if options.schedule == LrSchedule.linear else 0.5 - 0.5 * math.cos(math.pi * left)
    return options.lr * rise * fall


def sparsity(options: LossOptions, step: int, n_steps: int) -> float:
    """lambda at step `step`: its full value, or on the way to it over the first `sparsity_ramp` of the run."""
    ramp = options.sparsity_ramp * n_steps
    if options.sparsity_schedule == Schedule.constant or ramp <= 0:
        return options.sparsity
    done = min(1.0, step / ramp)
    if options.sparsity_schedule == Schedule.cosine:
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return options.sparsity * done
