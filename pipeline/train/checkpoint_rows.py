"""Which part of a checkpoint's tensors a rank holds, writes and reads.

    by features     weights, moments, counters: the rows of the rank's features; of moments of 8 bits the codes by rows
                    and the scales by the blocks of these rows
    of all          biases of outputs, step counters, averages, what codes stand for: the first feature rank writes them
    of each         random generators, forms of the sparse step: every rank its own

Data ranks hold the same but for the random numbers and forms, so that each writes some of the tensors.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.rows import FeatureRows, by_feature
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import Shard
from pipeline.dist.sharded import ONCE
from pipeline.errors import UserError
from pipeline.train.eight_bit import BLOCK, in_tables
from pipeline.train.row_files import WORLD, Held, Stored, shared_out

MODEL, OPTIMIZER, STATE = "model", "optimizer", "state"
"""Stems of a checkpoint's files."""

OF_EACH_RANK = {"activation.form", "torch_rng", "cuda_rng"}

COUNTERS = "tokens_since_fired"


class Layout:
    """Of the transcoder of one rank, which holds the features of `shard`."""

    def __init__(self, model: Transcoder, mesh: Mesh, shard: Shard) -> None:
        assert shard.n == model.d_features, "the transcoder holds other features than its shard"
        self.model, self.mesh, self.shard = model, mesh, shard
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def held(self, stem: str, name: str, tensor: Tensor) -> Held:
        """A tensor of this rank with its place in the whole."""
        if name in OF_EACH_RANK:
            return Held(tensor, each=WORLD, number=self.mesh.world.rank)
        return Held(tensor, *(self._rows(stem, name, tensor.shape) or ()))

    def mine(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> set[tuple[str, str]]:
        """Which tensors, by stem and name, this rank writes of those that it holds."""
        held = {(stem, name): self.held(stem, name, t) for stem, named in tensors.items() for name, t in named.items()}
        return set(shared_out(held, self.mesh))

    def read(self, stored: Stored, stem: str, name: str) -> Tensor:
        """This rank's part of a stored tensor."""
        each = stored.each(name)
        if each is not None:
            same = stored.ranks == (self.mesh.features.size, self.mesh.data.size)
            number = self.mesh.world.rank if same and each == WORLD else 0
            own = stored.own(name, number)
            assert own is not None, f"{name} of rank {number} is missing"
            return own
        if stem == MODEL and name in ONCE and self.mesh.features.rank > 0:  # added once: reconstructions are summed
            return torch.zeros_like(self.model.state_dict()[name])
        rows = None if name in OF_EACH_RANK else self._rows(stem, name, stored.shape(name))
        return stored.read(name) if rows is None else stored.read(name, rows.axis, rows.ranges)

    def has(self, name: str) -> bool:
        """Whether this rank's optimiser knows of the parameter in "what/parameter"."""
        return self.mesh.features.rank == 0 or name.split("/", 1)[1] not in ONCE

    def _rows(self, stem: str, name: str, shape: tuple[int, ...]) -> "Rows | None":
        """What this rank has of a tensor of this shape, here or in the whole; None where it has no features."""
        if stem == STATE:
            return self._of(by_feature(self.shard.d_features)) if name == COUNTERS else None
        if stem == MODEL:
            return self._of(self.model.feature_rows(name, self.shard.d_features))
        what, parameter = name.split("/", 1)
        if what.startswith("group."):
            return None
        rows = self._of(self.model.feature_rows(parameter, self.shard.d_features))
        _, _, part = what.partition(".")
        if part == "scale" and rows is not None and in_tables(parameter):
            return rows.in_blocks(self.shapes[parameter][1])
        # A step counter is one number, whatever the parameter.
        return rows if len(shape) == len(self.shapes[parameter]) and part in ("", "codes") else None

    def _of(self, rows: FeatureRows | None) -> "Rows | None":
        return None if rows is None else Rows(rows.axis, tuple(rows.of(self.shard.ranges)), rows.length)


class Rows(NamedTuple):
    """Of a tensor."""

    axis: int
    ranges: tuple[range, ...]
    length: int
    """Of the axis in the whole."""

    def in_blocks(self, width: int) -> "Rows":
        """The blocks of these rows of a table so wide, laid flat."""
        edges = [(one.start * width, one.stop * width) for one in self.ranges]
        assert not any(start % BLOCK or stop % BLOCK for start, stop in edges), "rows end inside a block"
        blocks = tuple(range(start // BLOCK, stop // BLOCK) for start, stop in edges)
        return Rows(0, blocks, self.length * width // BLOCK)


def check_ranks(stored: Stored, layout: Layout, of: object) -> None:
    """UserError for moments of 8 bits that older versions wrote and several feature ranks cannot share."""
    if layout.mesh.features.size == 1:
        return
    for name in stored.names():
        what, parameter = name.split("/", 1)
        if "." not in what or what.startswith("group."):
            continue
        by_rows = in_tables(parameter) or layout.model.feature_axis(parameter) is None
        if stored.each(name) is not None or not by_rows:
            raise UserError(
                f"{of} is of an older version, with moments of 8 bits of {parameter} that {layout.mesh.features.size} "
                "feature ranks cannot share; go on with one process or dist=ddp"
            )


class Parts(Mapping[str, Tensor]):
    """This rank's part of a stem, each tensor read when it is asked for."""

    def __init__(self, stored: Stored, stem: str, layout: Layout) -> None:
        self._stored, self._stem, self._layout = stored, stem, layout
        self._names = [name for name in stored.names() if stem != OPTIMIZER or layout.has(name)]

    def __getitem__(self, name: str) -> Tensor:
        return self._layout.read(self._stored, self._stem, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
