"""Which features of a whole transcoder a model has, where the others lie elsewhere."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


def _as_it_is(part: Tensor) -> Tensor:
    return part


class Held(NamedTuple):
    """Some of n rows. Without `ids` all of them, and everything below is the identity."""

    n: int
    """Rows of the whole: features of a layer, or what stands for them in a table."""
    ids: Tensor | None = None
    """Those that are here, ascending. int64 [n_here]"""
    total: Callable[[Tensor], Tensor] = _as_it_is
    """The sum of a tensor over all who hold features, on each of them."""

    def of(self, whole: Tensor) -> Tensor:
        """The rows that are here. [n, ...] -> [n_here, ...]"""
        return whole if self.ids is None else whole[self.ids.to(whole.device)]

    def spread(self, rows: Tensor) -> Tensor:
        """What is here at its place in the whole, 0 elsewhere: products with it round as those with the whole do, which
        those with fewer rows need not. [n_here, ...] -> [n, ...]"""
        if self.ids is None:
            return rows
        return rows.new_zeros(self.n, *rows.shape[1:]).index_copy_(0, self.ids.to(rows.device), rows)

    def blocks(self, size: int) -> Iterator[tuple[slice, "Held"]]:
        """The whole cut in blocks of this many rows: of each that has any here, which of those here they are, and where
        in the block."""
        for start in range(0, self.n, size):
            stop = min(start + size, self.n)
            if self.ids is None:
                yield slice(start, stop), Held(stop - start)
                continue
            low, high = torch.searchsorted(self.ids, torch.tensor([start, stop], device=self.ids.device)).tolist()
            if low < high:
                yield slice(low, high), Held(stop - start, self.ids[low:high] - start)
