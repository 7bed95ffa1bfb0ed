"""Which features a rank holds: the same ones of every layer, in a few ranges of their global numbers.

most           one block each, of sizes that differ by one at most
matryoshka     a block of each segment between two of the usual prefixes, so that a prefix is spread over all ranks
molt           a block of each group of equal rank, in whole multiples of the smallest mixture
groupmax       blocks of whole groups, so that every rank chooses among its own
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch import matryoshka, molt
from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions
from pipeline.errors import UserError


class Shard(NamedTuple):
    ranges: tuple[range, ...]
    """Of global feature numbers, ascending."""
    d_features: int
    """Features of a layer, over all ranks."""

    @property
    def n(self) -> int:
        """Features of a layer that the rank holds."""
        return sum(map(len, self.ranges))

    @property
    def is_whole(self) -> bool:
        return self.n == self.d_features

    def ids(self) -> Tensor:
        """Global numbers of the features held, ascending. -> int64 [n]"""
        return torch.cat([torch.arange(one.start, one.stop) for one in self.ranges])

    def below(self, m: int) -> int:
        """How many of the features held have a number below m."""
        return sum(len(range(one.start, max(one.start, min(m, one.stop)))) for one in self.ranges)


def whole(d_features: int) -> Shard:
    """What one rank holds that is alone."""
    return Shard((range(d_features),), d_features)


def shards(arch: ArchOptions, activation: ActivationOptions, n_layers: int, n_ranks: int) -> list[Shard]:
    """What each of the ranks holds. n_layers: feature spaces. UserError when they cannot be shared among so many."""
    F = arch.d_features
    if n_ranks == 1:
        return [whole(F)]
    if arch.name == "molt":
        assert arch.ranks is not None
        counts = molt.counts(arch.ranks)
        times = F // sum(counts)
        if activation.name == "groupmax":
            raise UserError("activation=groupmax cannot be sharded with arch=molt; use topk, or dist=ddp")
        _enough(times, n_ranks, f"arch.d_features={F} are {times} mixtures of {sum(counts)} transforms")
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + times * count)
        units = counts
    elif activation.name == "groupmax":
        per_layer = activation.k_per_layer or [activation.k or 1] * n_layers
        unit = math.lcm(*(F // k for k in per_layer))
        if arch.name == "matryoshka":
            raise UserError("activation=groupmax cannot be sharded with arch=matryoshka; use topk, or dist=ddp")
        _enough(F // unit, n_ranks, f"activation=groupmax has {F // unit} groups that are whole in every layer")
        bounds, units = [0, F], [unit]
    else:
        bounds = [0, *matryoshka.usual_sizes(arch)] if arch.name == "matryoshka" else [0, F]
        units = [1] * (len(bounds) - 1)
        _enough(F, n_ranks, f"arch.d_features={F}")
    blocks = [_blocks(a, b, unit, n_ranks) for (a, b), unit in zip(pairwise(bounds), units, strict=True)]
    found = [Shard(tuple(one[rank] for one in blocks if len(one[rank])), F) for rank in range(n_ranks)]
    if not all(shard.n for shard in found):
        raise UserError(f"arch.prefixes are too close for dist.features={n_ranks} ranks; use fewer ranks or prefixes")
    return found


def _enough(n: int, n_ranks: int, what: str) -> None:
    if n < n_ranks:
        raise UserError(f"{what}: not enough for dist.features={n_ranks} ranks; use fewer ranks or more features")


def _blocks(start: int, stop: int, unit: int, n: int) -> Sequence[range]:
    """[start, stop) in n blocks of whole units, the larger ones first."""
    units = (stop - start) // unit
    ends = [start + unit * (units // n * i + min(i, units % n)) for i in range(n + 1)]
    return [range(a, b) for a, b in pairwise(ends)]
