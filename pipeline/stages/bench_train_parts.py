"""Where the time of a step goes, from steps that are watched and counted in no other figure.

For a few steps the functions below are wrapped by a clock, which waits for a GPU before it looks. What a function takes
that is called by another one is its own, not the other's.

    ours: Trainer.step               dense reference
    data        Inputs               Inputs                   bfloat16 rows to floats, the norm, the units
    encode      encode_layer, _aside encode                   every pre-activation
    select      objective.forward    select                   which are features
    decode      decode               decode
    backward    Tensor.backward      Tensor.backward          all gradients, but for what a fused optimiser takes over
    optimiser   optimizer.step       optimizer.step           with the weight gradients, where they are fused into it
    other       the rest             the rest                 loss, counters, the check that the loss is finite
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pipeline.stages.bench_train_clock import Clock
from pipeline.stages.bench_train_sides import Ours, Reference

PARTS = ("data", "encode", "select", "decode", "backward", "optimiser", "other")
WATCHED = 3
"""Steps that are watched; a part's time is the median."""


class _Watch:
    """A stack of what is going on: the time goes to what lies on top."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._stack: list[str] = []
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._since = 0.0

    def enter(self, part: str) -> None:
        self._settle()
        self._stack.append(part)

    def leave(self, part: str) -> None:
        self._settle()
        assert self._stack.pop() == part

    def _settle(self) -> None:
        now = self._clock.now()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return work(*args, **kwargs)
            finally:
                self.leave(part)

        return wrapped


class _Prepare:
    """Inputs under the clock, which are a tuple and so cannot be wrapped in place."""

    def __init__(self, inputs: Any, watch: _Watch) -> None:
        self._inputs, self._watch = inputs, watch

    def __call__(self, *sites: Any) -> Any:
        return self._watch.timed("data", self._inputs)(*sites)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inputs, name)


def parts(side: Ours | Reference, clock: Clock, n: int = WATCHED) -> dict[str, float]:
    """Seconds of each part of a step, medians over n watched steps."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(n):
        watch = _Watch(clock)
        with _watched(side, watch):
            watch.timed("other", side)()
        for part, seconds in watch.seconds.items():
            found[part].append(seconds)
    return {part: statistics.median(seconds) for part, seconds in found.items()}


@contextmanager
def _watched(side: Ours | Reference, watch: _Watch) -> Iterator[None]:
    owner: Any = side.trainer if isinstance(side, Ours) else side
    model = owner.model
    wrapped = [(model, "encode", "encode"), (model, "select", "select"), (model, "decode", "decode")]
    if isinstance(side, Ours):  # what of the forward pass is neither encoding nor decoding is selection
        forward = (owner.objective, "forward", "select")
        encodes = [(model, name, "encode") for name in ("encode_layer", "encode_aside")]
        wrapped = [*encodes, (model, "decode", "decode"), forward]
    wrapped.append((owner.optimizer, "step", "optimiser"))
    inputs, backward = owner.inputs, Tensor.backward
    try:
        for holder, name, part in wrapped:
            setattr(holder, name, watch.timed(part, getattr(holder, name)))
        owner.inputs = _Prepare(inputs, watch)
        Tensor.backward = watch.timed("backward", backward)  # type: ignore[method-assign]
        yield
    finally:
        owner.inputs, Tensor.backward = inputs, backward  # type: ignore[method-assign]
        for holder, name, _ in wrapped:
            delattr(holder, name)
