"""How long a step of a rank takes, from what it computes, reads and sends, at given rates. Arithmetic on paper.

    product     FLOPs of its dense products / gemm
    gather      bytes of decoder and encoder rows that its active pairs read / gather
    memory      bytes of its weights, moments and dense gradients, read and written once / memory
                (times `times_floor`, where it was measured how many of these floors a step takes)
    link, net   bytes that it sends / the slowest link between the ranks of that axis, and `latency` for each collective

Nothing is taken to overlap: the sum is the time, and the largest part is what bounds it. Left out: reading the batch,
selecting, the losses, and what ranks wait for each other.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.dist.plan import Axis, Grid, Talk


class Rates(NamedTuple):
    """Of a rank's device and of the links between ranks. FLOPs and bytes a second, latency in seconds."""

    gemm: float
    gather: float
    memory: float
    link: float
    """Between ranks of a machine."""
    net: float
    """Between machines, for each rank."""
    latency: float
    """Of a collective, whatever its size."""
    ranks_per_machine: int
    times_floor: float = 1.0


class Work(NamedTuple):
    """Of a rank in a step."""

    flops: float
    gathered_bytes: float
    parameter_bytes: float


class Seconds(NamedTuple):
    product: float
    gather: float
    memory: float
    link: float
    net: float

    @property
    def step(self) -> float:
        return sum(self)

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self._fields, key=lambda name: float(getattr(self, name)))


def crosses(axis: Axis, grid: Grid, per_machine: int) -> bool:
    """Whether ranks of an axis sit in several machines. Feature ranks are neighbours, data ranks lie a row apart."""
    return (grid.features if axis is Axis.features else grid.world) > per_machine


def seconds(work: Work, talks: Iterable[Talk], grid: Grid, rates: Rates) -> Seconds:
    """Of a step."""
    link = net = 0.0
    for talk in talks:
        count = talk.counted(grid)
        if crosses(talk.axis, grid, rates.ranks_per_machine):
            net += count.sent / rates.net + count.calls * rates.latency
        else:
            link += count.sent / rates.link + count.calls * rates.latency
    floors = rates.times_floor
    return Seconds(
        floors * work.flops / rates.gemm,
        floors * work.gathered_bytes / rates.gather,
        floors * work.parameter_bytes / rates.memory,
        link,
        net,
    )
