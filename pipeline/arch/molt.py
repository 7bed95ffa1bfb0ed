"""Mixture of linear transforms (Lindsey et al. 2025, "Sparse mixtures of linear transforms", Transformer Circuits).

    a_t = activation(e_t . x^l + b_t)                      the gate of transform t: a feature, e_t its row of W_enc
    y_hat^l = b_dec^l + sum_t a_t U_t V_t x^l              U_t [D, r_t], V_t [r_t, D]

A feature switches a low-rank map of the input on, where a transcoder's feature writes one fixed direction. Each layer
stands alone. Transforms come in groups of equal rank (`arch.ranks`), each group of the same total rank R, so that a
group's count R / r is inversely proportional to its rank, as published: N of rank 512, 2N of 256, ..., 16N of 32.
Features are numbered group by group, in the order of `arch.ranks`.

The sparsity penalty is the published tanh(c |U_t V_t|_F a_t): `decoder_norms` is the Frobenius norm.

Parameters of G groups, per layer: F (D + 1) for the gates, 2 G R D for the transforms, D for b_dec, where F = sum_g R /
r_g. (`offset` is no parameter: it is 0 until the transcoder is folded.)

In memory U^T and V of a layer are tables [G R, D]: the r rows of a transform follow each other, transform by transform.
Then the dense form is two matrix products for all groups, and the sparse form takes the rows of active transforms only:

    p = V x + offset     [rows]             y_hat = b_dec + sum over rows of (a of the row's transform) p U^T[row]

Folding x' = (x - m) / s: V = V' / s, U = S U', and V' x' = V x - V m, so `offset` = -V m (0 unless inputs are centred).

Initial weights are not published. uniform: V from U(+-sqrt(3 / D)), so that rows have length 1 and V x the scale of x's
entries, and U from U(+-1 / sqrt(L D)), the CLT recipe's decoders. data: `start`. Others: `arch/init.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.arch.base import Dims, Transcoder, safe_root
from pipeline.arch.held import Held
from pipeline.arch.options import ArchOptions
from pipeline.arch.rows import Axes, FeatureRows
from pipeline.core.activations import Activation
from pipeline.core.normalize import Scaling
from pipeline.core.sparse import Chosen, Features, Pattern, Sparse, bag, of_layer, row_products
from pipeline.errors import UserError

PER_TRANSFORM = {"U", "V", "offset"}
"""Tensors with as many rows of a transform as its rank; in files with a tensor for each rank."""


class MOLT(Transcoder):
    linear = False
    directions = False
    uses: ClassVar[frozenset[str]] = frozenset({"ranks"})
    axes: ClassVar[Axes] = {**Transcoder.axes, "U": 0, "V": 0, "offset": 1}
    stored_axes: ClassVar[Axes] = {**Transcoder.stored_axes, "U": 1, "V": 1, "offset": 1}

    offset: Tensor
    """[L, G R]"""
    rank: Tensor
    """int64 [F]: rows of each transform."""
    first: Tensor
    """int64 [F]: where they begin."""

    @classmethod
    def check(cls, options: ArchOptions) -> None:
        ranks = options.ranks
        if not ranks or any(rank < 1 for rank in ranks) or len(set(ranks)) != len(ranks):
            raise UserError(f"arch.ranks={ranks} must name at least one rank, each once and above 0, as in [16,8,4]")
        step = cls.multiple(options)
        if options.d_features % step:
            below = options.d_features // step * step
            nearest = " or ".join(str(n) for n in (below, below + step) if n)
            raise UserError(
                f"arch.d_features={options.d_features} transforms do not divide among arch.ranks={ranks}, "
                f"as many {' : '.join(str(n) for n in counts(ranks))}; use {nearest}"
            )

    @classmethod
    def multiple(cls, options: ArchOptions) -> int:
        return sum(counts(options.ranks or [1]))

    def __init__(self, options: ArchOptions, dims: Dims, activation: Activation) -> None:
        super().__init__(options, dims, activation)
        assert options.ranks is not None
        self.ranks = list(options.ranks)
        if max(self.ranks) > dims.d_model:
            raise UserError(f"arch.ranks={self.ranks} must not exceed the model's width {dims.d_model}; lower them")
        self.counts = self._counts_of(options.d_features)
        rank, first = _places(self.ranks, options.d_features)
        n_rows = self.n_rows
        self.U = nn.ParameterList(torch.zeros(n_rows, dims.d_model) for _ in range(dims.n_layers))
        self.V = nn.ParameterList(torch.zeros(n_rows, dims.d_model) for _ in range(dims.n_layers))
        self.register_buffer("offset", torch.zeros(dims.n_layers, n_rows))
        # Follow from the options, so they are in no file.
        self.register_buffer("rank", rank, persistent=False)
        self.register_buffer("first", first, persistent=False)

    @property
    def n_rows(self) -> int:
        """G R: rows of U^T and of V in a layer."""
        return len(self.ranks) * self.counts[0] * self.ranks[0]

    @property
    def W_dec(self) -> list[Tensor]:
        raise UserError("arch=molt has no W_dec: a feature switches a map U V on; read U and V")

    def decode_flops(self, active: Sequence[int]) -> float:
        """Of one token with so many transforms of each layer at work, of mean rank (d_features: dense)."""
        return 4 * self.dims.d_model * sum(active) * self.n_rows / self.d_features

    def targets(self, layer: int) -> range:
        return range(layer, layer + 1)

    def n_tables(self, source: int) -> int:
        return 0

    def tables(self, layer: int) -> Iterator[Tensor]:
        """U^T of the layer [G R, D]: what its transforms write in."""
        return iter([self.U[layer]])

    def readers(self, source: int) -> Iterator[tuple[Tensor, float]]:
        yield self.V[source], (3 / self.dims.d_model) ** 0.5

    def table_rows(self, held: Held) -> Held:
        if held.ids is None:
            return Held(self.n_rows)
        rank, first = _places(self.ranks, held.n)
        return Held(int(rank.sum()), _rows_of(held.ids.cpu(), rank, first)[1])

    def start_tables(self, source: int) -> dict[int, Tensor]:
        return {source: self.U[source]}

    def groups(self, table: Tensor) -> list[Tensor]:
        """U or V of a layer [G R, D] by group of rank: [count, r, D] each, views."""
        sizes = [count * rank for count, rank in zip(self.counts, self.ranks, strict=True)]
        return [part.view(-1, r, self.dims.d_model) for part, r in zip(table.split(sizes), self.ranks, strict=True)]

    def decode(self, features: Features, x: Tensor) -> Tensor:
        """features [B, L, F] or sparse, x [B, L, D] -> y_hat [B, L, D]."""
        return torch.stack([self._transformed(features, i, h) for i, h in enumerate(x.unbind(1))], dim=1) + self.b_dec

    def decode_layer(self, features: Sparse, layer: int, x: Tensor) -> Tensor:
        return self.b_dec[layer] + self._transformed(features, layer, x)

    def write_rows(self, z: Tensor, ids: Tensor, source: int, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        entry, rows = self._rows(ids)
        inner = F.linear(x, self.V[source][rows], self.offset[source][rows])
        yield source, (z[:, entry] * inner) @ self.U[source][rows]

    def decoder_norms(self) -> Tensor:
        """Frobenius norms of the maps U_t V_t, gradient 0 at 0. -> [L, F]"""
        squares = []
        for U, V in zip(self.U, self.V, strict=True):
            # |U V|_F^2 = tr((V V^T) (U^T U)): r x r matrices, never D x D ones.
            grams = [(u @ u.mT) * (v @ v.mT) for u, v in zip(self.groups(U), self.groups(V), strict=True)]
            squares.append(torch.cat([gram.sum(dim=(1, 2)) for gram in grams]))
        return safe_root(torch.stack(squares))

    def start(
        self, layer: int, x: Tensor, y: Tensor, rows: Tensor, generator: torch.Generator, held: Held | None = None
    ) -> None:
        """Begin as a transcoder. x, y [n, D]: a sample of the layer's inputs and targets; rows [F]: the x_t that
        transform t's gate looks for, of the whole transcoder.

        Its first row maps x_t to what the MLP made of it, U V = (y_t - mean y) x_t^T / (|x_t|^2 |x_t - mean x|). The
        others read directions in which inputs vary, x - mean x of other tokens, and write nothing yet (U = 0).
        """
        U, V, held = self.U[layer], self.V[layer], held or Held(self.d_features)
        tables, centred = self.table_rows(held), x - x.mean(dim=0)
        others = torch.randint(x.shape[0], (tables.n,), generator=generator).to(x.device)
        V.copy_(tables.of(F.normalize(centred[others], dim=1)))
        V[self.first] = held.of(F.normalize(x[rows], dim=1))
        lengths = x[rows].norm(dim=1) * centred[rows].norm(dim=1)
        self.b_dec[layer] = y.mean(dim=0)
        U.zero_()
        U[self.first] = held.of((y[rows] - y.mean(dim=0)) / lengths.clamp(min=1e-12)[:, None])

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """In place: W_enc / s, b_enc - W_enc m, V / s, offset - V m (the new W_enc and V), S U, S b_dec + M."""
        scaling = Scaling(*(t.double() for t in scaling))
        for layer, (weight, U, V) in enumerate(zip(self.encoders, self.U, self.V, strict=True)):
            x_mean, x_scale = scaling.x_mean[layer], scaling.x_scale[layer]
            gate, inner = weight.double() / x_scale, V.double() / x_scale
            self.b_enc[layer] = self.b_enc[layer].double() - gate @ x_mean
            self.offset[layer] = self.offset[layer].double() - inner @ x_mean
            weight.copy_(gate)
            V.copy_(inner)
            U.copy_(U.double() * scaling.y_scale[layer])
        self.b_dec.copy_(self.b_dec.double() * scaling.y_scale + scaling.y_mean)

    def feature_rows(self, name: str, d_features: int) -> FeatureRows | None:
        found = super().feature_rows(name, d_features)
        if found is None or name.split(".")[0] not in PER_TRANSFORM:
            return found
        return FeatureRows(found.axis, tuple(zip(self._counts_of(d_features), self.ranks, strict=True)))

    def stored_rows(self, name: str, d_features: int) -> FeatureRows | None:
        found = super().stored_rows(name, d_features)
        kind, _, rank = name.partition(".")
        if found is None or kind not in PER_TRANSFORM:
            return found
        runs = [
            (count, int(own == int(rank))) for own, count in zip(self.ranks, self._counts_of(d_features), strict=True)
        ]
        return FeatureRows(found.axis, tuple(runs))

    def _counts_of(self, d_features: int) -> list[int]:
        """Transforms of each rank, of so many in all."""
        return [d_features // sum(counts(self.ranks)) * n for n in counts(self.ranks)]

    def weights(self) -> dict[str, Tensor]:
        """As they stand in files: W_enc, b_enc, b_dec, and for each group of n transforms of rank r U.{r} and V.{r}
        [L, n, r, D] (row j of a transform in U.{r} is column j of its U_t) and offset.{r} [L, n, r]."""
        U = [self.groups(table) for table in self.U]
        V = [self.groups(table) for table in self.V]
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "b_dec": self.b_dec}
        sizes = [count * rank for count, rank in zip(self.counts, self.ranks, strict=True)]
        for g, (rank, offset) in enumerate(zip(self.ranks, self.offset.split(sizes, dim=1), strict=True)):
            named[f"U.{rank}"] = torch.stack([groups[g] for groups in U])
            named[f"V.{rank}"] = torch.stack([groups[g] for groups in V])
            named[f"offset.{rank}"] = offset.reshape(self.dims.n_layers, -1, rank)
        return named

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.b_enc.copy_(weights["b_enc"])
        self.b_dec.copy_(weights["b_dec"])
        self.offset.copy_(torch.cat([weights[f"offset.{rank}"].flatten(1) for rank in self.ranks], dim=1))
        for layer, weight in enumerate(self.encoders):
            weight.copy_(weights["W_enc"][layer])
            for name, table in (("U", self.U[layer]), ("V", self.V[layer])):
                table.copy_(torch.cat([weights[f"{name}.{rank}"][layer].flatten(0, 1) for rank in self.ranks]))

    def _transformed(self, features: Features, layer: int, x: Tensor) -> Tensor:
        """sum_t a_t U_t V_t x of one layer. x [B, D] -> [B, D]"""
        U, V, offset = self.U[layer], self.V[layer], self.offset[layer]
        one = of_layer(features, layer)
        if isinstance(one, Chosen):
            pattern, values = one
            entry, rows = self._rows(pattern.indices)
            edges = torch.cat([pattern.offsets.new_zeros(1), self.rank[pattern.indices].cumsum(0)])[pattern.offsets]
            active = Pattern(rows, edges, V.shape[0])
            inner = row_products(active, x, V) + offset[rows]
            return bag(active, values[entry] * inner, U)
        inner = F.linear(x, V, offset)
        sizes = [count * rank for count, rank in zip(self.counts, self.ranks, strict=True)]
        gated = [
            (p.unflatten(1, (count, rank)) * a[:, :, None]).flatten(1)
            for p, a, count, rank in zip(
                inner.split(sizes, dim=1),
                one.split(self.counts, dim=1),
                self.counts,
                self.ranks,
                strict=True,
            )
        ]
        return torch.cat(gated, dim=1) @ U

    def _rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The table rows of transforms `ids` [n], in order: (position in `ids` of each row's transform, the row)."""
        return _rows_of(ids, self.rank, self.first)


def _rows_of(ids: Tensor, rank: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """`MOLT._rows` of transforms that have so many rows each and begin there."""
    ranks = rank[ids]
    entry = torch.arange(ids.numel(), device=ids.device).repeat_interleave(ranks)
    begin = ranks.cumsum(0) - ranks
    within = torch.arange(entry.numel(), device=ids.device) - begin[entry]
    return entry, first[ids][entry] + within


def _places(ranks: list[int], d_features: int) -> tuple[Tensor, Tensor]:
    """Of each of so many transforms the rows that it has in a table, and where they begin. -> 2 x int64 [F]"""
    per_rank = counts(ranks)
    times = d_features // sum(per_rank)
    each = [rank for rank, count in zip(ranks, per_rank, strict=True) for _ in range(times * count)]
    first = [end - rank for end, rank in zip(accumulate(each), each, strict=True)]
    return torch.tensor(each), torch.tensor(first)


def counts(ranks: list[int]) -> list[int]:
    """The smallest numbers of transforms that give each rank the same total rank."""
    total = math.lcm(*ranks)
    return [total // rank for rank in ranks]
