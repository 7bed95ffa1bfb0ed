"""Work in pieces that know nothing of each other, divided over ranks: batches of an evaluation, features that are
described.

The pieces are those of one process, whatever the number of ranks. Each rank takes some of them, and what comes of them
is put together in their order, so that the result is that of one process: to the bit where a number comes from one
piece or is a sum of whole numbers, to the last digits of float64 where ranks add to the same sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.dist import mesh
from pipeline.dist.mesh import Mesh
from pipeline.dist.options import PATIENCE_S, DistOptions
from pipeline.dist.share import Share
from pipeline.dist.wire import Group, Wire
from pipeline.errors import UserError
from pipeline.ranks import world

ALONE = Group(1, 0, Wire())
"""One process."""

BYTES_AT_ONCE = 1 << 26
"""Of sums that are gathered."""


@contextmanager
def ranks() -> Iterator[Group]:
    """The ranks that were started, which talk through the CPU wherever they compute."""
    with mesh.started(DistOptions("ddp", features=1, data=None, timeout_s=PATIENCE_S), torch.device("cpu")) as started:
        yield started.world


@contextmanager
def grid(options: DistOptions, device: torch.device) -> Iterator[Mesh]:
    """The same where ranks may share features too: those that do talk where they compute, on `device` (`own_device`).
    UserError as `mesh.grid`."""
    if options.world is not None:
        raise UserError(f"dist.world={options.world} is for plans of training; leave it out, or use clt plan")
    with mesh.started(options, device, on_cpu=True) as started:
        yield started


def own_device(asked: str) -> str:
    """auto, cpu, cuda or cuda:N -> the same, but that each rank of a machine has a GPU of its own as far as there are
    some."""
    if asked not in ("auto", "cuda") or world() == 1 or not torch.cuda.is_available():
        return asked
    return str(mesh.local_device(torch.device("cuda")))


def mine(n: int, group: Group) -> range:
    """The pieces of n that this rank does: one after the other, ranks in their order."""
    return Share(group.rank, group.size).part(n)


def added(sums: Tensor, group: Group, what: str) -> Tensor:
    """What each rank summed, added in the order of the ranks and in place. Any shape, on the CPU. -> `sums`"""
    if group.size == 1:
        return sums
    flat = sums.view(-1)
    for part in flat.split(max(1, BYTES_AT_ONCE // (group.size * sums.element_size()))):
        every = group.gather(part, what)
        part.copy_(every[0])
        for other in every[1:]:
            part += other
    return sums
