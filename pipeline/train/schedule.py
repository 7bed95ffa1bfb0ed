"""Schedules: pure functions of how much of the run is behind us. Nothing here remembers anything."""

import math

from pipeline.core.options import Ramp, Shape
from pipeline.errors import UserError
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


def coefficient(value: float, ramp: Ramp, step: int, n_steps: int) -> float:
    """A loss coefficient at step `step`: its full value, or on the way to it (`core/options.py`: Ramp)."""
    delay = ramp.delay if ramp.shape == Shape.delayed else 0.0
    length = ramp.length * (1 - delay) * n_steps
    if ramp.shape == Shape.constant or length <= 0:
        return value if step >= delay * n_steps else 0.0
    done = min(1.0, max(0.0, step - delay * n_steps) / length)
    if ramp.shape == Shape.cosine:
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return value * done


def check(ramp: Ramp, key: str) -> None:
    """UserError for shares that make no sense; `key` is the setting's name."""
    if not 0 <= ramp.length <= 1:
        raise UserError(f"{key}.length={ramp.length} is a share of the run and must lie in [0, 1]")
    if not 0 <= ramp.delay < 1:
        raise UserError(f"{key}.delay={ramp.delay} must lie in [0, 1): at 1 the term would never begin")
    if ramp.delay > 0 and ramp.shape != Shape.delayed:
        raise UserError(f"{key}.delay={ramp.delay} has no meaning for {key}.shape={ramp.shape}; use shape=delayed")
