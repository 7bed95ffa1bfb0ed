"""Choosing features when they, or the tokens that compete, lie on several ranks: exactly what one process would choose.

P feature ranks, L layers, B tokens of a rank, F_max features of the rank that holds most, v bytes of a number (8 of
float64, else 4). What a step sends, in the words of `dist/wire.py`:

    topk       one gather over the feature ranks, of B sum_l min(k_l, F_max) (v + 4) bytes: each rank's best pairs of
               (compared value, int32 feature) of each token and layer, from which every rank sees which of its own stay
    batchtopk, batchtopk_across
               the n-th largest value by its bits, from the highest: a sum over all ranks of R x 2,048 int64 for each 11
               of the bits (3 of float32, 6 of float64), R the rows that compete: L, or 1 across layers. Where values at
               the cut are equal, as many sums more as the positions in the batch have elevens of bits. With more than
               one data rank a gather of 8 bytes over those before it, since k goes by the tokens of all.
    aux_k      a gather over the feature ranks of S int64, S feature spaces, the dead features of each; then one of B
               sum_s min(d/2, n_s) (v + 4) bytes, n_s the dead features of the rank with most of them, over those spaces
               s that have more than d/2 on all ranks
    groupmax, relu, jumprelu    nothing

Only the feature ranks talk where all data ranks look at the same tokens (`Peers.same_tokens`).

Ties: to the lowest feature among those of a token, else to the lowest (token, [layer,] feature), where the tokens of a
data rank follow those of the rank before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pipeline.arch.held import Held
from pipeline.core import activations, products
from pipeline.core.activations import Activation
from pipeline.core.options import ActivationOptions
from pipeline.core.peers import ALONE, Found, Largest, Peers, Row
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import Shard

DIGIT = 11
"""Bits of a number that are looked at in one pass."""


def rule(options: ActivationOptions, n_layers: int, shards: Sequence[Shard], mesh: Mesh) -> Activation:
    """The activation named in the options, for the features of this rank. n_layers: feature spaces; shards: what each
    feature rank holds. UserError as `core/activations.build`, of the whole."""
    return activations.build(options, n_layers, shards[mesh.features.rank].n, peers(shards, mesh))


def peers(shards: Sequence[Shard], mesh: Mesh) -> Peers:
    """Whom the features and tokens of this rank compete with. shards: what each feature rank holds."""
    return ALONE if mesh.world.size == 1 else Others(shards, mesh)


def held(shards: Sequence[Shard], mesh: Mesh) -> Held:
    """The features of this rank, for `arch/init.initialise`. shards: what each feature rank holds."""
    features, shard = mesh.features, shards[mesh.features.rank]
    if features.size == 1:
        return Held(shard.d_features)
    return Held(shard.d_features, shard.ids(), lambda part: features.sum(part.contiguous(), "init"))


class Candidates(NamedTuple):
    """Of a row what may be among the n largest of all ranks."""

    positions: Tensor
    """In the part that is here, laid flat, ascending. int64 [m]"""
    values: Tensor
    """The features there. [m]"""
    keys: Tensor
    """What they are compared by, as integers in the same order. [m]"""
    guess: float


class Batch(NamedTuple):
    """The tokens that compete, and which of them are here."""

    first: int
    n_tokens: int
    shape: torch.Size
    """Of the part of a row that is here. [b, ..., f]"""

    def end(self, d_features: int) -> int:
        """How many pairs a row has of all tokens and features."""
        return self.n_tokens * self.shape[1:-1].numel() * d_features


class Others(Peers):
    """The other ranks of a mesh. All of them make the same calls in the same order."""

    def __init__(self, shards: Sequence[Shard], mesh: Mesh) -> None:
        assert len(shards) == mesh.features.size
        self.mesh, self.d_features = mesh, shards[0].d_features
        self.most = max(shard.n for shard in shards)
        self._ids = shards[mesh.features.rank].ids()
        self._same = False

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """A copy of a model has the same peers; what connects to them cannot be copied."""
        return self

    def whole(self, d_features: int) -> int:
        assert d_features == self._ids.numel()
        return self.d_features

    @contextmanager
    def same_tokens(self) -> Iterator[None]:
        before, self._same = self._same, True
        try:
            yield
        finally:
            self._same = before

    def best(self, layers: Iterable[Found], k: Sequence[int]) -> Iterator[tuple[Found, Tensor | None]]:
        if self.mesh.features.size == 1:
            yield from super().best(layers, k)
            return
        held = list(layers)
        ids = [self._numbers(found.indices) for found in held]
        masks = self._among(held, ids, [min(n, self.most) for n in k], k, "topk")
        yield from zip(held, masks, strict=True)

    def strongest(self, layers: Iterable[tuple[Tensor, Tensor]], k: int) -> Iterator[Tensor]:
        features = self.mesh.features
        if features.size == 1:
            yield from super().strongest(layers, k)
            return
        held = list(layers)
        own = torch.tensor([ids.numel() for _, ids in held], device=features.device)
        n_dead = features.gather(own, "aux_k")
        crowded = [s for s, n in enumerate(n_dead.sum(dim=0).tolist()) if n > k]
        most = n_dead.amax(dim=0).tolist()
        found = {}
        for s in crowded:
            z, ids = held[s]
            n = min(k, ids.numel())
            values, indices = products.topk(z.detach(), n) if n else (z.detach(), z.long())
            found[s] = Found(values, indices, values), self._numbers(ids[indices])
        pairs, widths = list(found.values()), [min(k, most[s]) for s in crowded]
        masks = self._among([one for one, _ in pairs], [ids for _, ids in pairs], widths, [k] * len(pairs), "aux_k")
        kept = dict(zip(crowded, masks, strict=True))
        for s, (z, _) in enumerate(held):
            if s in kept:
                indices = found[s][0].indices
                z = torch.zeros_like(z).scatter_add(1, indices, z.gather(1, indices) * kept[s])
            yield z

    def largest(self, rows: Iterable[Row], k: Sequence[int], guesses: Iterable[float]) -> Iterator[Largest]:
        group = self.mesh.features if self._same else self.mesh.world
        if group.size == 1:
            yield from super().largest(rows, k, guesses)
            return
        own: list[Candidates] = []
        n: list[int] = []
        batch = Batch(0, 0, torch.Size())
        for row, per_token, guess in zip(rows, k, guesses, strict=True):
            if not own:
                batch = self._batch(row.compared.shape)
            n.append(per_token * batch.n_tokens)
            own.append(_candidates(row, n[-1], guess))

        def total(counts: Tensor) -> Tensor:
            return group.sum(counts, "batchtopk")

        keys = [one.keys for one in own]
        cut, left, equal = nth_largest(keys, n, 8 * keys[0].element_size(), total)
        kept = [key >= edge for key, edge in zip(keys, cut, strict=True)]
        crowded = [there > taken for there, taken in zip(equal, left, strict=True)]
        if any(crowded):
            # From the end, so that the first position is the largest number.
            places = [batch.end(self.d_features) - self._places(one.positions, batch) for one in own]
            tied = [
                place[key == edge] if tight else place[:0]
                for place, key, edge, tight in zip(places, keys, cut, crowded, strict=True)
            ]
            last, _, _ = nth_largest(tied, left, batch.end(self.d_features).bit_length(), total)
            for mask, place, key, edge, tight, bound in zip(kept, places, keys, cut, crowded, last, strict=True):
                if tight:
                    mask &= (key > edge) | (place >= bound)
        for one, mask, edge, there in zip(own, kept, cut, equal, strict=True):
            smallest = torch.tensor(edge, dtype=one.keys.dtype).view(_FLOATS[one.keys.dtype]) if there else None
            yield Largest(one.positions[mask], one.values[mask], smallest, one.guess)

    def _batch(self, shape: torch.Size) -> Batch:
        """The batch that a row [b, ..., f] is a part of."""
        if self._same or self.mesh.data.size == 1:
            return Batch(0, shape[0], shape)
        sizes = self.mesh.data.sizes(shape[0], "batchtopk tokens")
        return Batch(sum(sizes[: self.mesh.data.rank]), sum(sizes), shape)

    def _places(self, positions: Tensor, batch: Batch) -> Tensor:
        """Positions in the whole batch [B, ..., F] laid flat of those in the part of it that is here."""
        here = batch.shape[-1]
        rows = positions // here + batch.first * batch.shape[1:-1].numel()
        return rows * self.d_features + self._numbers(positions % here)

    def _numbers(self, indices: Tensor) -> Tensor:
        """Numbers of features among all, from those among the ones here."""
        if self._ids.device != indices.device:
            self._ids = self._ids.to(indices.device)
        return self._ids[indices]

    def _among(
        self, layers: Sequence[Found], ids: Sequence[Tensor], widths: Sequence[int], k: Sequence[int], what: str
    ) -> list[Tensor]:
        """Of each layer's best pairs [B, n] which are among the k best of all ranks and above 0. ids: their numbers
        among all features; widths: as many pairs a token of each layer as any rank has. -> bool [B, n] each"""
        if not layers:
            return []
        found = layers[0].compared
        dtype = found.dtype if found.dtype in (torch.float32, torch.float64) else torch.float32
        values = torch.cat([_padded(one.compared.to(dtype), n) for one, n in zip(layers, widths, strict=True)], dim=1)
        numbers = torch.cat([_padded(one.int(), n) for one, n in zip(ids, widths, strict=True)], dim=1)
        # One tensor of int32 words for both, so that it is one gather.
        said = torch.cat([values.view(torch.int32), numbers], dim=1)
        heard = self.mesh.features.gather(said, what)
        n_words = said.shape[1] - numbers.shape[1]
        all_values = heard[..., :n_words].contiguous().view(dtype).split(list(widths), dim=2)
        all_numbers = heard[..., n_words:].split(list(widths), dim=2)
        rank = self.mesh.features.rank
        return [
            _best_of(values, numbers, rank, n)[:, : one.compared.shape[1]]
            for one, values, numbers, n in zip(layers, all_values, all_numbers, k, strict=True)
        ]


def nth_largest(
    keys: Sequence[Tensor], n: Sequence[int], bits: int, total: Callable[[Tensor], Tensor]
) -> tuple[list[int], list[int], list[int]]:
    """Of each row of numbers in [0, 2^bits), which lie on several ranks, the n-th largest (the smallest where there are
    fewer); how many equal to it are among the n largest; and how many equal to it there are at all, 0 in an empty row.

    total: the sum of a tensor over the ranks. It is called once for each 11 bits, with int64 [rows, 2048].
    """
    size = 1 << DIGIT
    inside, cut = list(keys), [0 for _ in keys]
    left, equal = list(n), [0 for _ in keys]
    for shift in range(DIGIT * ((bits - 1) // DIGIT), -1, -DIGIT):
        digits = [(key >> shift) & (size - 1) for key in inside]
        counts = total(torch.stack([digit.bincount(minlength=size) for digit in digits]))
        from_top = counts.flip(1).cumsum(dim=1)
        # Fewer than n in all: the last of them is looked for. Later on there are as many as are left, or more.
        wanted = torch.tensor(left, device=counts.device).minimum(from_top[:, -1]).clamp(min=1)
        place = (from_top < wanted[:, None]).sum(dim=1).clamp(max=size - 1)
        here = counts.flip(1).gather(1, place[:, None]).squeeze(1)
        above = from_top.gather(1, place[:, None]).squeeze(1) - here
        left, equal = (wanted - above).tolist(), here.tolist()
        taken = (size - 1 - place).tolist()
        cut = [edge << DIGIT | digit for edge, digit in zip(cut, taken, strict=True)]
        inside = [key[digit == one] for key, digit, one in zip(inside, digits, taken, strict=True)]
    return cut, left, equal


_FLOATS = {torch.int32: torch.float32, torch.int64: torch.float64}


def _candidates(row: Row, n: int, guess: float) -> Candidates:
    """What is among the n largest of all is so of those here: ties fall alike, since positions ascend alike."""
    flat = row.compared.reshape(-1)
    positions, smallest = products.largest(flat, max(1, min(n, flat.numel())), guess)
    # Bits of floats above 0 are in the order of the floats.
    keys = flat[positions]
    keys = keys.view(torch.int64) if keys.dtype == torch.float64 else keys.float().view(torch.int32)
    return Candidates(
        positions, row.values.reshape(-1)[positions], keys, float(smallest) if positions.numel() == n else 0.0
    )


def _padded(rows: Tensor, width: int) -> Tensor:
    """Rows made as wide with zeros. [B, n] -> [B, width]"""
    return rows if rows.shape[1] == width else torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def _best_of(values: Tensor, numbers: Tensor, rank: int, k: int) -> Tensor:
    """Which of this rank's pairs are among the k best of all ranks' and above 0. 2 x [P, B, n] -> bool [B, n]

    A NaN counts as the largest, so that the loss shows it.
    """
    own = values[rank]
    kept = ~(own <= 0)
    flat = values.transpose(0, 1).flatten(1)
    if flat.shape[1] <= k:
        return kept
    cut = flat.topk(k, dim=1).values[:, -1:]
    kept &= ~(own < cut)
    tight = ((~(flat < cut)).sum(dim=1) > k).nonzero().squeeze(1)
    if tight.numel():
        row, edge, ids = flat[tight], cut[tight], numbers.transpose(0, 1).flatten(1)[tight].long()
        left = k - (~(row <= edge)).sum(dim=1, keepdim=True)
        last = torch.where(row == edge, ids, torch.iinfo(torch.int64).max).sort(dim=1).values
        bound = last.gather(1, (left - 1).clamp(min=0))
        kept[tight] &= (own[tight] != edge) | (numbers[rank][tight] <= bound)
    return kept
