"""A transcoder whose encoder and decoder tables stay in their files, so that it may be larger than memory.

    encoding     a source at a time, and of that at most PIECE_BYTES of rows
    decoding     the rows of the features that are active in the batch, one table at a time
    in memory    biases, thresholds, W_skip, and a tied transcoder's scales and offsets

Rows are read each time they are needed: what is kept between two readings is the operating system's page cache, so that
a transcoder a little larger than memory is not read anew each time. Results are those of the same transcoder in memory:
to the bit for the same sparse features on the same kind of device where a source's encoder fits in one piece, to the
rounding of float32 where it takes several.

A class for each architecture is made of two: `OnDisk`, which says where rows come from, and the architecture, which
says what is done with them. The tables' parameters are there in shape and type alone (on the device "meta").
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Encoded, Transcoder
from pipeline.arch.rows import axis_of
from pipeline.core.activations import Choosing
from pipeline.core.norms import row_norms
from pipeline.core.sparse import Chosen, Pattern, bag

PIECE_BYTES = 1 << 28
"""Of rows that are read at once where a whole table is wanted: 65,536 rows of width 1,024."""


class Rows(Protocol):
    """What reads the tensors of `Transcoder.weights` from where they lie."""

    def pick(self, name: str, axis: int, rows: Tensor | range, at: int | None = None) -> Tensor:
        """These entries of a tensor's axis 0 or 1 (int64 [n], or a range), in this order; with `at` one entry of the
        other of the two, which is no axis of the result then. On the CPU, as they are stored."""


class OnDisk(Transcoder):
    """To be read from only: nothing here trains, and the parameters of the tables hold no numbers."""

    tables_on: ClassVar[str | None] = "meta"
    in_memory: ClassVar[bool] = False

    rows: Rows

    _norms: Tensor | None = None

    def encoder_rows(self, source: int, ids: Tensor | None = None) -> Tensor:
        return self._encoder(source, range(self.d_features) if ids is None else ids)

    def kept_rows(self, source: int, slot: int, ids: Tensor | None = None) -> Tensor:
        return self._read(*self.stored_table(source, slot), range(self.d_features) if ids is None else ids)

    def encode_layer(self, x: Tensor, layer: int, out: Tensor | None = None) -> Tensor:
        assert out is None, "training keeps its tables in memory"
        bias = self.b_enc[layer]
        parts = [
            F.linear(x, self._encoder(layer, rows), bias[rows.start : rows.stop]) for rows in self._pieces(self.width())
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def activate(self, x: Tensor, need_pre_acts: bool) -> Encoded:
        """Sparse, unless the pre-activations are asked for: those of one source are in memory at a time."""
        if self.activation.chooses or need_pre_acts or not self.activation.per_token:
            return super().activate(x, need_pre_acts)
        return Encoded(None, self.all_features(x))

    def product(self, features: Tensor | Chosen, source: int, slot: int) -> Tensor:
        if isinstance(features, Tensor):
            return super().product(features, source, slot)
        ids, pattern = among_active(features.pattern)
        return bag(pattern, features.values, self.kept_rows(source, slot, ids))

    def decoder_norms(self) -> Tensor:
        """Read once: they do not change."""
        if self._norms is None or self._norms.dtype != self.b_dec.dtype:
            self._norms = torch.stack([torch.cat(list(self._source_norms(i))) for i in range(self.n_sources)])
        return self._norms.to(self.b_dec.device)

    def rank_norms(self) -> Tensor | None:
        # A finished run's rule has the norms of training, and reading all rows for others would be for nothing.
        fixed = self.activation.fixed_norms if isinstance(self.activation, Choosing) else None
        return super().rank_norms() if fixed is None else fixed

    def _source_norms(self, source: int) -> Iterator[Tensor]:
        targets = self.targets(source)
        for rows in self._pieces(self.dims.d_model * len(targets)):
            ids = torch.arange(rows.start, rows.stop, device=self.b_dec.device)
            yield row_norms([self.table(source, target, ids) for target in targets])

    def _pieces(self, width: int) -> Iterator[range]:
        """All features in ranges, of whose rows of that width one takes PIECE_BYTES at the most."""
        # In multiples of what products are computed in: then they round alike, as a rule.
        step = max(64, PIECE_BYTES // (4 * width) // 64 * 64)
        return (range(a, min(a + step, self.d_features)) for a in range(0, self.d_features, step))

    def _encoder(self, source: int, rows: Tensor | range) -> Tensor:
        return self.encoder_from(self._read(*self.stored_encoder(source), rows))

    def _read(self, name: str, at: int | None, rows: Tensor | range) -> Tensor:
        axis = axis_of(self.stored_axes, name)
        assert axis is not None
        found = self.rows.pick(name, axis, rows if isinstance(rows, range) else rows.cpu(), at)
        return found.to(self.b_dec.device).to(self.encoders[0].dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OnDisk":
        """To another device or type: tables have a type alone."""

        def moved(tensor: Tensor) -> Tensor:
            if not tensor.is_meta:
                return fn(tensor)
            return torch.empty_like(tensor, dtype=fn(torch.empty(0, dtype=tensor.dtype)).dtype)

        moved_module: OnDisk = super()._apply(moved, recurse)
        return moved_module


def on_disk(architecture: type[Transcoder]) -> type[OnDisk]:
    """The architecture with its tables on disk; `rows` is to be set. It must have rows of W_dec (`directions`)."""
    assert architecture.directions
    return type(f"{architecture.__name__}OnDisk", (OnDisk, architecture), {})


def among_active(pattern: Pattern) -> tuple[Tensor, Pattern]:
    """The features that are active at any token, ascending [n], and the pattern with their numbers among those."""
    used = torch.zeros(pattern.n_features, dtype=torch.bool, device=pattern.indices.device)
    used[pattern.indices] = True
    ids, number = used.nonzero().squeeze(1), used.cumsum(0) - 1
    return ids, Pattern(number[pattern.indices], pattern.offsets, len(ids))
