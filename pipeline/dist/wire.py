"""What ranks say to each other: collectives, each counted.

Bytes are those that a rank sends when a collective over P ranks runs as a ring, which is what NCCL does with large
tensors. n: bytes of the tensor that a rank hands in.

    sum, largest, smallest      2 n (P - 1) / P      (rounded down)
    gather                      n (P - 1)
    share                       n (P - 1) / P        (rounded down)

gloo, on CPUs, takes other ways for small ones; the count is of the algorithm, so that a plan can be held against it.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from pipeline.errors import LostPeers

GONE = re.compile(r"peer|connection|timed? ?out|broken pipe|socket", re.IGNORECASE)
"""What gloo's errors, which have no type of their own, say when another rank is gone or does not come."""


CPU = torch.device("cpu")


class Op(StrEnum):
    reduce = "reduce"
    gather = "gather"
    share = "share"


def sent_bytes(op: Op, n: int, size: int) -> int:
    """Bytes that a rank sends in one collective of `size` ranks to which it hands n bytes."""
    if op is Op.reduce:
        return 2 * n * (size - 1) // size
    return n * (size - 1) if op is Op.gather else n * (size - 1) // size


@dataclass
class Count:
    calls: int = 0
    sent: int = 0
    """Bytes that this rank sent (`sent_bytes`)."""


@dataclass
class Wire:
    """The counts of a rank, by what was said."""

    counts: dict[str, Count] = field(default_factory=dict)

    def note(self, what: str, op: Op, n: int, size: int) -> None:
        count = self.counts.setdefault(what, Count())
        count.calls += 1
        count.sent += sent_bytes(op, n, size)

    @contextmanager
    def counting(self) -> Iterator[dict[str, Count]]:
        """What is counted inside, from 0; counts outside know nothing of it."""
        before, self.counts = self.counts, {}
        try:
            yield self.counts
        finally:
            self.counts = before


@contextmanager
def meeting(what: str) -> Iterator[None]:
    """While ranks wait for each other. Raises LostPeers where one of them does not come."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, td.DistError) or GONE.search(text)):
            raise
        # "[/gloo/pair.cc:537] Read error [127.0.0.1]:38295: Connection reset by peer. This is typically ..."
        cause = re.sub(r"\[\S*\.cc:\d+\] ", "", text.split(". This is typically")[0].split("\n")[0])
        raise LostPeers(f"{what}: {cause}") from error


class Group:
    """Ranks along one axis. A group of one is the identity and calls nothing.

    All ranks of a group make the same calls in the same order. Tensors lie on the mesh's device and are contiguous.
    Every call raises LostPeers where another rank is gone, or has not come in the time of the mesh.
    """

    def __init__(
        self,
        size: int,
        rank: int,
        wire: Wire,
        process_group: "td.ProcessGroup | None" = None,
        device: torch.device = CPU,
    ) -> None:
        assert size == 1 or process_group is not None
        self.size, self.rank, self.wire, self.device = size, rank, wire, device
        self._group = process_group

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over the ranks, in place. -> `tensor`"""
        return self._reduce(tensor, what, td.ReduceOp.SUM)

    def largest(self, tensor: Tensor, what: str) -> Tensor:
        """The largest of the ranks, entry by entry, in place. -> `tensor`"""
        return self._reduce(tensor, what, td.ReduceOp.MAX)

    def smallest(self, tensor: Tensor, what: str) -> Tensor:
        """The smallest of the ranks, entry by entry, in place. -> `tensor`"""
        return self._reduce(tensor, what, td.ReduceOp.MIN)

    def gather(self, tensor: Tensor, what: str) -> Tensor:
        """Every rank's tensor, which all have the same shape. [...] -> [size, ...]"""
        if self.size == 1:
            return tensor[None]
        self.wire.note(what, Op.gather, tensor.nbytes, self.size)
        found = tensor.new_empty(self.size, *tensor.shape)
        with meeting(what):
            td.all_gather(list(found), tensor.contiguous(), group=self._group)
        return found

    def gather_ragged(self, tensor: Tensor, what: str, sizes: list[int] | None = None) -> list[Tensor]:
        """Every rank's tensor, whose first axes may differ. sizes: of those, where they are known; they are asked for
        otherwise (8 bytes each). On the wire each is as long as the longest."""
        if self.size == 1:
            return [tensor]
        if sizes is None:
            sizes = self.sizes(tensor.shape[0], what)
        longest = max(sizes)
        padded = tensor
        if tensor.shape[0] < longest:
            padded = tensor.new_zeros(longest, *tensor.shape[1:])
            padded[: tensor.shape[0]] = tensor
        found = self.gather(padded, what)
        return [found[rank, :n] for rank, n in enumerate(sizes)]

    def sizes(self, n: int, what: str) -> list[int]:
        """Every rank's number."""
        own = torch.tensor([n], dtype=torch.int64, device=self.device)
        found: list[int] = self.gather(own, what).flatten().tolist()
        return found

    def share(self, plain: Any, what: str) -> Any:
        """What rank 0 says: numbers, texts, lists and dicts. The others' argument counts for nothing."""
        if self.size == 1:
            return plain
        data = json.dumps(plain).encode() if self.rank == 0 else b""
        n = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        self._broadcast(n, what)
        text = torch.zeros(int(n), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._broadcast(text, what)
        return json.loads(bytes(text.cpu().numpy()))

    def barrier(self) -> None:
        """Until every rank has come here."""
        if self.size > 1:
            with meeting("barrier"):
                td.barrier(group=self._group)

    def _reduce(self, tensor: Tensor, what: str, op: "td.ReduceOp.RedOpType") -> Tensor:
        if self.size > 1:
            assert tensor.is_contiguous()
            self.wire.note(what, Op.reduce, tensor.nbytes, self.size)
            with meeting(what):
                td.all_reduce(tensor, op, group=self._group)
        return tensor

    def _broadcast(self, tensor: Tensor, what: str) -> None:
        self.wire.note(what, Op.share, tensor.nbytes, self.size)
        with meeting(what):
            td.broadcast(tensor, group=self._group, group_src=0)
