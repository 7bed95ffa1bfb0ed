"""Which contexts show what a feature responds to, and its activations in them.

"Top activations": the contexts with its highest activations, one example each, cut out around the highest. "Quantile
80-100 %" and so on: its active tokens by activation, in equal parts, each shown by tokens of different contexts that
are drawn at random. A draw that is an example among the top ones already is marked as repeated.

A second pass over the tokens gives the activations of whole examples, and the histogram between the lowest and the
highest activation, which were not known before.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.interp.dashboards.feature_options import FeatureOptions
from pipeline.interp.dashboards.feature_sums import Active, Sums
from pipeline.interp.dashboards.feature_text import Block

PERCENTILES = np.arange(1, 101) / 100


class Examples(NamedTuple):
    """Of all features, ordered by feature, then as they are shown."""

    feature: NDArray[np.int64]
    """[E], its place among the features that are described."""
    part: NDArray[np.int64]
    """[E]: 0 for a top activation, 1 for the highest part of the active tokens, 2 for the next one."""
    row: NDArray[np.int64]
    """[E], of the token that it is shown for."""
    repeated: NDArray[np.bool_]
    """[E]"""


def part_name(part: int, quantiles: int) -> str:
    if part == 0:
        return "Top activations"
    return f"Quantile {round(100 * (quantiles - part) / quantiles)}-{round(100 * (quantiles - part + 1) / quantiles)} %"


def choose(sums: Sums, length: int, options: FeatureOptions) -> Examples:
    """length: rows of a context."""
    n = len(sums.count)
    tops, sample = sums.tops.entries(), sums.sample.entries()
    top_starts, starts = (np.searchsorted(kept["group"], np.arange(n + 1)) for kept in (tops, sample))
    feature: list[int] = []
    part: list[int] = []
    row: list[int] = []
    repeated: list[bool] = []
    for i in range(n):
        best = tops["row"][top_starts[i] : top_starts[i + 1]].tolist()
        drawn = slice(starts[i], starts[i + 1])
        parts = [best, *_drawn(sample["row"][drawn], sample["value"][drawn], length, options)]
        shown = set(best)
        for number, rows in enumerate(parts):
            feature += [i] * len(rows)
            part += [number] * len(rows)
            row += rows
            repeated += [number > 0 and one in shown for one in rows]
    of, in_part, at = (np.array(column, dtype=np.int64) for column in (feature, part, row))
    return Examples(of, in_part, at, np.array(repeated, dtype=np.bool_))


def _drawn(
    rows: NDArray[np.generic], values: NDArray[np.generic], length: int, options: FeatureOptions
) -> list[list[int]]:
    """Rows of each part, the highest part first. rows [k] come in the order of their random keys."""
    if not options.quantiles or not options.per_quantile:
        return []
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    part = options.quantiles - rank * options.quantiles // max(1, len(values))
    found: list[list[int]] = []
    for number in range(1, options.quantiles + 1):
        mine = rows[part == number]
        _, first = np.unique(mine // length, return_index=True)
        chosen = mine[np.sort(first)[: options.per_quantile]]
        found.append(chosen.tolist())
    return found


def quantile_values(sums: Sums) -> NDArray[np.float32]:
    """Percentiles 1 to 100 of each feature's activations above 0, of its sample where there are more; the last is the
    highest. [n, 100], NaN where it never fires"""
    sample = sums.sample.entries()
    starts = np.searchsorted(sample["group"], np.arange(len(sums.count) + 1))
    found = np.full((len(sums.count), len(PERCENTILES)), np.nan, dtype=np.float32)
    for i in np.flatnonzero(np.diff(starts)):
        found[i] = np.quantile(sample["value"][starts[i] : starts[i + 1]].astype(np.float64), PERCENTILES)
    fires = sums.count > 0
    found[fires, -1] = sums.highest[fires]
    return found


class Windows:
    """The activations along each example, and the histograms, filled block by block."""

    def __init__(self, examples: Examples, sums: Sums, length: int, n_rows: int, options: FeatureOptions) -> None:
        """length: rows of a context; n_rows: of the whole text, whose last context may be padded."""
        self.examples, self._length = examples, length
        self._context, position = np.divmod(examples.row, length)
        position += 1
        self.start = np.maximum(0, position - options.before)
        """[E], the first position that is shown."""
        last = np.minimum(length, n_rows - self._context * length)
        self.stop = np.minimum(last + 1, position + options.after + 1)
        self.peak = position - self.start
        """[E], of the token that it is shown for, within the example."""
        width = options.before + 1 + options.after
        self.values = np.zeros((len(examples.row), width), dtype=np.float32)
        """[E, W]: 0 behind `stop`, and at position 0, where no feature is read."""
        self.histogram = np.zeros((len(sums.count), options.bins), dtype=np.int64)
        self._low, self._span = sums.lowest, sums.highest - sums.lowest

    @property
    def context(self) -> NDArray[np.int64]:
        """[E]"""
        return self._context

    def add(self, block: Block, activations: Tensor, active: Active, first: int) -> None:
        """A block's activations [n_rows, n] of features `first` and following, dense and as pairs."""
        self._count(active)
        here = (self._context >= block.start) & (self._context < block.stop)
        here &= (self.examples.feature >= first) & (self.examples.feature < first + activations.shape[1])
        mine = np.flatnonzero(here)
        if not len(mine):
            return
        position = self.start[mine, None] + np.arange(self.values.shape[1])
        row = (self._context[mine] - block.start)[:, None] * self._length + position - 1
        inside = (position > 0) & (position < self.stop[mine, None]) & (row < block.n_rows)
        row = np.where(inside, row, 0)
        column = self.examples.feature[mine, None] - first
        found = activations[torch.from_numpy(row), torch.from_numpy(column)].float().cpu().numpy()
        self.values[mine] = np.where(inside, found, 0)

    def _count(self, active: Active) -> None:
        bins = self.histogram.shape[1]
        span = self._span[active.feature]
        share = (active.value - self._low[active.feature]) / np.where(span > 0, span, 1)
        at = active.feature * bins + np.minimum(bins - 1, (share * bins).astype(np.int64))
        self.histogram += np.bincount(at, minlength=self.histogram.size).reshape(self.histogram.shape)

    def state(self) -> dict[str, NDArray[np.generic]]:
        return {"values": self.values, "histogram": self.histogram}

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        self.values[:], self.histogram[:] = state["values"], state["histogram"]
