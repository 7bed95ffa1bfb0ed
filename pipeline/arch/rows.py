"""Where in a transcoder's tensors its features lie, so that a part of the features is a part of each tensor.

Each tensor is known by the first part of its name, those of the activation rule by `activation.` and theirs; None
where it has no features and all parts share it. A feature is one entry of the axis, or several that follow each other
(a transform of MOLT in its tables), or none (in what another group of transforms has).
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

Axes = dict[str, int | None]

ACTIVATION: Axes = {
    "activation.log_threshold": 1,
    "activation.threshold": 1,
    "activation.fixed_norms": 1,
    "activation.form": None,
    "activation.threshold_ema": None,
    "activation.ema_weight": None,
}
"""Of the rules' parameters and buffers."""


class FeatureRows(NamedTuple):
    """The axis of one tensor that has the features."""

    axis: int
    runs: tuple[tuple[int, int], ...]
    """(features, entries that each of them has), by feature."""

    @property
    def length(self) -> int:
        """Entries of the axis in the whole tensor."""
        return sum(count * each for count, each in self.runs)

    def of(self, features: Iterable[range]) -> list[range]:
        """The entries of these features, in order; what follows each other is one range."""
        found: list[range] = []
        for part in features:
            for first, entry, (count, each) in zip(self._firsts(), self._entries(), self.runs, strict=False):
                start, stop = max(part.start, first), min(part.stop, first + count)
                if start < stop and each:
                    found.append(range(entry + (start - first) * each, entry + (stop - first) * each))
        return joined(found)

    def _firsts(self) -> list[int]:
        return [0, *accumulate(count for count, _ in self.runs)]

    def _entries(self) -> list[int]:
        return [0, *accumulate(count * each for count, each in self.runs)]


def by_feature(d_features: int) -> FeatureRows:
    """Of a tensor [S, F], which has one entry of each feature in each space."""
    return FeatureRows(1, ((d_features, 1),))


def joined(ranges: Sequence[range]) -> list[range]:
    """The same entries in the same order, in as few ranges as can be; none of them empty."""
    found: list[range] = []
    for one in ranges:
        if found and found[-1].stop == one.start and len(one):
            found[-1] = range(found[-1].start, one.stop)
        elif len(one):
            found.append(one)
    return found


def axis_of(axes: Axes, name: str) -> int | None:
    """KeyError for a tensor that nothing is said of: it would be taken for one that all parts share."""
    return (axes | ACTIVATION)[name if name.startswith("activation.") else name.split(".")[0]]
