"""What is summed over tokens about each feature, in memory that does not grow with their number.

    count, total, lowest, highest    active tokens, the sum of activations, and their range
    tops      of each context the highest activation, and of these the `top` highest
    sample    activations whose keys, hashes of (token, feature), are the `sample` lowest: a uniform sample of the
              active tokens, which is all of them up to that number

The result depends on neither the size of the blocks nor on where a run was stopped.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

LARGEST = np.uint64(2**64 - 1)
NO_COLUMNS: dict[str, np.dtype[np.generic]] = {}


class Active(NamedTuple):
    """The active pairs of a block, ordered by feature, then by token."""

    feature: NDArray[np.int64]
    """[nnz], its place among the features that are described."""
    row: NDArray[np.int64]
    """[nnz], of the whole text."""
    value: NDArray[np.float32]
    """[nnz], above 0"""


def pairs(activations: Tensor, first_feature: int, first_row: int) -> Active:
    """[n_rows, n] dense activations of features first_feature and following"""
    by_feature = activations.T.contiguous()
    feature, row = by_feature.nonzero(as_tuple=True)
    value = by_feature[feature, row].float().cpu().numpy()
    return Active(feature.cpu().numpy() + first_feature, row.cpu().numpy() + first_row, value)


class Smallest:
    """Of entries that come in any number, those with the k smallest keys of each group; earlier ones where keys are
    equal. Entries wait until as many have come as are kept, so that sorting costs little for each."""

    def __init__(self, n_groups: int, k: int, **columns: type[np.generic]) -> None:
        """columns: what an entry carries beside its group and key."""
        self.k = k
        dtypes = {"group": np.int32, "key": np.uint64, **columns}
        self._kept = {name: np.empty(0, dtype) for name, dtype in dtypes.items()}
        self._waiting: list[dict[str, NDArray[np.generic]]] = []
        self._limit = np.full(n_groups, LARGEST)
        """Keys from here on are none of the smallest."""

    def add(self, group: NDArray[np.int64], key: NDArray[np.uint64], **columns: NDArray[np.generic]) -> None:
        if self.k == 0:
            return
        among = key < self._limit[group]
        new = {"group": group, "key": key, **columns}
        self._waiting.append({name: new[name][among].astype(kept.dtype) for name, kept in self._kept.items()})
        if sum(len(entries["key"]) for entries in self._waiting) > max(1 << 16, len(self._kept["key"])):
            self._settle()

    def entries(self) -> dict[str, NDArray[np.generic]]:
        """Those that are kept, by group, then by key: group, key and the columns."""
        self._settle()
        return self._kept

    def restore(self, entries: dict[str, NDArray[np.generic]]) -> None:
        """Go on from what `entries` gave."""
        assert entries.keys() == self._kept.keys()
        self._waiting = [entries]
        self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        parts = [self._kept, *self._waiting]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in self._kept}
        order = np.lexsort((joined["key"], joined["group"]))
        group = joined["group"][order]
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        sizes = np.diff(starts, append=len(group))
        rank = np.arange(len(group)) - np.repeat(starts, sizes)
        self._kept = {name: column[order[rank < self.k]] for name, column in joined.items()}
        last = order[rank == self.k - 1]
        self._limit[joined["group"][last]] = joined["key"][last]
        self._waiting = []


class Sums:
    """Of n features over contexts of `length` rows. `identity` [n]: a number of each feature of its own, so that its
    sample is the same whatever other features are described."""

    def __init__(self, identity: NDArray[np.int64], length: int, top: int, sample: int, seed: int) -> None:
        n = len(identity)
        self._identity, self._length, self._seed = identity, length, seed
        self.count = np.zeros(n, np.int64)
        self.total = np.zeros(n, np.float64)
        self.lowest = np.full(n, np.inf, np.float32)
        self.highest = np.zeros(n, np.float32)
        self.tops = Smallest(n, top, row=np.int64, value=np.float32)
        self.sample = Smallest(n, sample, row=np.int64, value=np.float32)

    def add(self, active: Active) -> None:
        """The pairs of the next block, whose contexts are whole, for some of the features."""
        feature, row, value = active
        if not len(feature):
            return
        n = len(self.count)
        self.count += np.bincount(feature, minlength=n)
        self.total += np.bincount(feature, value.astype(np.float64), minlength=n)
        starts = np.flatnonzero(np.diff(feature, prepend=-1))
        here = feature[starts]
        self.lowest[here] = np.minimum(self.lowest[here], np.minimum.reduceat(value, starts))
        self.highest[here] = np.maximum(self.highest[here], np.maximum.reduceat(value, starts))
        self.sample.add(feature, hashes(row, self._identity[feature], self._seed), row=row, value=value)
        peaks = peak_of_each(feature, row // self._length, value)
        # The order of positive floats is that of their bits.
        bits = value[peaks].view(np.uint32).astype(np.uint64)
        context = (row[peaks] // self._length).astype(np.uint64)
        key = ((np.uint64(2**32 - 1) - bits) << np.uint64(32)) | context
        self.tops.add(feature[peaks], key, row=row[peaks], value=value[peaks])

    def state(self) -> dict[str, NDArray[np.generic]]:
        """All of it, as arrays."""
        found: dict[str, NDArray[np.generic]] = {
            "count": self.count, "total": self.total, "lowest": self.lowest, "highest": self.highest,
        }  # fmt: skip
        for name, kept in (("tops", self.tops), ("sample", self.sample)):
            found |= {f"{name}.{column}": values for column, values in kept.entries().items()}
        return found

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Go on from what `state` gave."""
        for name in ("count", "total", "lowest", "highest"):
            getattr(self, name)[:] = state[name]
        for name, kept in (("tops", self.tops), ("sample", self.sample)):
            start = f"{name}."
            kept.restore({key.removeprefix(start): v for key, v in state.items() if key.startswith(start)})


def peak_of_each(
    feature: NDArray[np.int64], context: NDArray[np.int64], value: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Where the highest value of each (feature, context) stands, the first of equal ones. Entries are ordered by
    feature, then context. -> [number of such pairs]"""
    new = np.flatnonzero((np.diff(feature, prepend=-1) != 0) | (np.diff(context, prepend=-1) != 0))
    highest = np.maximum.reduceat(value, new)
    pair = np.repeat(np.arange(len(new)), np.diff(new, append=len(value)))
    at = np.flatnonzero(value == highest[pair])
    return at[np.flatnonzero(np.diff(pair[at], prepend=-1))]


def hashes(row: NDArray[np.int64], identity: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """64-bit numbers that look random: SplitMix64's finaliser (Steele et al. 2014) of each pair. [n], [n] -> [n]"""
    x = row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += identity.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    x += np.uint64(seed % 2**64) * np.uint64(0xA0761D6478BD642F)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
