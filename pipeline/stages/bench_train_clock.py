"""The clock of `clt bench train`."""

import time
from collections.abc import Callable

import torch

from pipeline.errors import UserError
from pipeline.stages.bench_options import BenchTrainOptions, TimedBy


class Clock:
    """wall: seconds that pass. cpu: seconds that this process computes on all of its threads, which other processes on
    the same cores change far less; with one thread on an idle machine it is the same. A GPU is waited for first."""

    def __init__(self, device: torch.device, kind: TimedBy = TimedBy.wall) -> None:
        self._device, self._read = device, time.process_time if kind is TimedBy.cpu else time.perf_counter

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._read()

    def of(self, work: Callable[[], object]) -> float:
        """Seconds of a call."""
        start = self.now()
        work()
        return self.now() - start


def clock(options: BenchTrainOptions, device: torch.device) -> Clock:
    """UserError for the CPU's time of what a GPU does."""
    if options.timed_by is TimedBy.cpu and device.type != "cpu":
        raise UserError(f"bench.timed_by=cpu says nothing about {device}; leave it out")
    return Clock(device, options.timed_by)
