"""What a trainer reads at a time: a shard, the pieces of files that it is made of, and batches taken from them.

A shard of a cache is one chunk. A shard of a merged cache (`merged.py`) has a piece of each of its parts, each with the
codes of its own part.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.codecs import Int8


class Piece(NamedTuple):
    """Rows that follow each other in a chunk."""

    part: int
    chunk: int
    start: int
    """First of the rows, in the chunk."""
    n_rows: int
    first: int
    """Number of that row in the cache."""


class Shard(NamedTuple):
    """Rows that are read together, and handed out before those of another shard."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def n_rows(self) -> int:
        """Rows that hold tokens. The last file is padded with zero rows, which nothing hands out."""
        return sum(piece.n_rows for piece in self.pieces)

    @property
    def chunk(self) -> int:
        """Of a shard that is one chunk."""
        (piece,) = self.pieces
        return piece.chunk

    @property
    def first(self) -> int:
        """First row of a shard that is one chunk."""
        (piece,) = self.pieces
        return piece.first

    def rows(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers in the cache of rows of this shard, [k] in [0, n_rows)."""
        ends = np.cumsum([piece.n_rows for piece in self.pieces])
        offsets = np.array([piece.first + piece.n_rows for piece in self.pieces]) - ends
        return index + offsets[np.searchsorted(ends, index, side="right")]


class Source(NamedTuple):
    """Rows of a shard, as they are stored."""

    rows: NDArray[Any]
    """uint16 or int8 [n, L, D]"""
    code: Int8 | None
    """What int8 numbers stand for."""


def take(sources: list[Source], index: NDArray[np.int64], out: Tensor, scratch: NDArray[Any]) -> None:
    """out[i] = row index[i] of the sources, one after the other, decoded. index [k]; out bfloat16 [k, L, D]; scratch:
    of the stored type, for k rows or more, where there are codes or several sources."""
    if len(sources) == 1:
        (source,) = sources
        if source.code is None:
            _take(source.rows, index, out.view(torch.uint16).numpy())
        else:
            _take(source.rows, index, scratch[: len(index)])
            source.code.decode(torch.from_numpy(scratch[: len(index)]), out)
        return
    ends = np.cumsum([len(source.rows) for source in sources])
    which = np.searchsorted(ends, index, side="right")
    for number, (rows, code) in enumerate(sources):
        where = np.flatnonzero(which == number)
        taken = scratch[: len(where)]
        _take(rows, index[where] - (ends[number] - len(rows)), taken)
        if code is None:
            out.view(torch.uint16).numpy()[where] = taken
        else:
            decoded = torch.empty((len(where), *out.shape[1:]), dtype=torch.bfloat16)
            out[torch.from_numpy(where)] = code.decode(torch.from_numpy(taken), decoded)


def _take(rows: NDArray[Any], index: NDArray[np.int64], out: NDArray[Any]) -> None:
    """out = rows[index]. `clip` because numpy goes through a copy of `out` otherwise; the index is in range."""
    np.take(rows, index, axis=0, out=out, mode="clip")
