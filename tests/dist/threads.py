"""Ranks for a test as threads of this process: what they say to each other goes through memory, so that a mesh costs
nothing. `tests/dist/processes.py` has real ones."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.dist.mesh import Mesh
from pipeline.dist.wire import Group, Op, Wire

T = TypeVar("T")


class Room:
    """Where the ranks of a group meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.said: list[Any] = [None for _ in range(size)]


class Member(Group):
    """A group whose collectives are counted like those of the real one."""

    def __init__(self, room: Room, rank: int, wire: Wire) -> None:
        super().__init__(1, rank, wire)
        self.size, self.room = len(room.said), room

    def exchange(self, tensor: Tensor) -> list[Tensor]:
        self.room.said[self.rank] = tensor.clone()
        self.room.barrier.wait()
        heard = list(self.room.said)
        self.room.barrier.wait()
        assert all(one.dtype == tensor.dtype for one in heard)
        return heard

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        if self.size > 1:
            self.wire.note(what, Op.gather, tensor.nbytes, self.size)
        return torch.stack(self.exchange(tensor))

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        if self.size > 1:
            self.wire.note(what, Op.reduce, tensor.nbytes, self.size)
        return tensor.copy_(torch.stack(self.exchange(tensor)).sum(dim=0))


def run(n_features: int, n_data: int, work: Callable[[Mesh], T]) -> list[T]:
    """work(mesh) of each rank of the grid, in the order of ranks. The first failure is raised."""
    world = Room(n_features * n_data)
    rows, columns = [Room(n_features) for _ in range(n_data)], [Room(n_data) for _ in range(n_features)]
    rooms = [world, *rows, *columns]

    def one(rank: int) -> T:
        d, f = divmod(rank, n_features)
        wire = Wire()
        try:
            return work(Mesh(Member(rows[d], f, wire), Member(columns[f], d, wire), Member(world, rank, wire)))
        except BaseException:
            for room in rooms:
                room.barrier.abort()
            raise

    with ThreadPoolExecutor(n_features * n_data) as pool:
        futures = [pool.submit(one, rank) for rank in range(n_features * n_data)]
        failures = [error for future in futures if (error := future.exception()) is not None]
        # A rank whose partner failed says so too; the cause is what is wanted.
        for error in sorted(failures, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
