"""Cross-layer transcoder with tied decoders: fewer tables than (layer, target) pairs.

    a^l = activation(W_enc^l x^l + b_enc^l)
    a^{l->m} = s^{l,m} * a^l + o^{l,m} * 1[a^l > 0]      for each feature; s = 1 and o = 0 at first
    tie=source:  y_hat^m = b_dec^m + S^m * sum_{l <= m} W_l a^{l->m}      one table a layer, for every target
    tie=target:  y_hat^m = b_dec^m + W_m sum_{l <= m} a^{l->m}            one table a target, for every source

The idea is that of a feature whose direction stays the same, or of layers that share a code (tied decoders of
github.com/curt-tigges/crosslayer-coding; EleutherAI/sparsify, whose post-encoder factors are s and o here); there is
no paper. `arch.scale` and `arch.offset` say whether s and o are learned, `arch.skip` adds W_skip^m x^m.

S^m [D] is 1 while training. A table that writes several layers cannot take up each target's scale, so folding puts it
there (`y_scale`, saved), and nothing is rounded twice. With an offset the output jumps where a feature sets in:
`linear` is False then, and `W_dec` is the slope.

Parameters: 2 L F D + L F + L D, and L (L + 1) / 2 F for each of s and o, and L D^2 with `skip`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Tie
from pipeline.arch.rows import Axes
from pipeline.core.activations import Activation
from pipeline.core.sparse import Chosen, Features, Pattern, from_pairs, of_layer


class Tied(Transcoder):
    """`scales[l]`, `offsets[l]` [F, L - l]: column j is for target l + j; None where not asked for."""

    uses: ClassVar[frozenset[str]] = frozenset({"tie", "scale", "offset", "skip"})
    axes: ClassVar[Axes] = {**Transcoder.axes, "scales": 0, "offsets": 0, "y_scale": None}
    stored_axes: ClassVar[Axes] = {**Transcoder.stored_axes, "W_tied": 1, "scale": 0, "offset": 0, "y_scale": None}

    y_scale: Tensor

    def __init__(self, options: ArchOptions, dims: Dims, activation: Activation) -> None:
        super().__init__(options, dims, activation)
        sizes = [(options.d_features, len(self.targets(layer))) for layer in range(dims.n_layers)]
        self.scales = nn.ParameterList(torch.ones(size) for size in sizes) if options.scale else None
        self.offsets = nn.ParameterList(torch.zeros(size) for size in sizes) if options.offset else None
        self.linear = not options.offset
        if options.tie == Tie.source:
            self.register_buffer("y_scale", torch.ones(tuple(dims)))

    def targets(self, layer: int) -> range:
        return range(layer, self.dims.n_layers)

    def n_tables(self, source: int) -> int:
        return 1

    def decode_flops(self, active: Sequence[int]) -> float:
        n_layers, d_model = self.dims
        merged = self.options.tie == Tie.target and min(active) == self.d_features
        once = merged or (self.options.tie == Tie.source and not self._n_columns)
        pairs = sum(n * len(self.targets(source)) for source, n in enumerate(active))
        skip = 2 * n_layers * d_model**2 if self.options.skip else 0
        return 2 * d_model * (sum(active) if once else pairs) + (self._n_columns + merged) * pairs + skip

    def table(self, source: int, target: int, ids: Tensor | None = None) -> Tensor:
        """The effective table, without the offset: what a further unit of an active feature writes."""
        table = self.kept_rows(*self.place(source, target), ids)
        if self.scales is not None:
            scale = self.scales[source][:, target - source]
            table = table * (scale if ids is None else scale[ids])[:, None]
        return table * self.y_scale[target] if self.options.tie == Tie.source else table

    def place(self, source: int, target: int) -> tuple[int, int]:
        return source if self.options.tie == Tie.source else target, 0

    def start_tables(self, source: int) -> dict[int, Tensor]:
        return {source: self._shared(source, source)}

    def written(self, features: Features) -> Tensor:
        layers = range(self.dims.n_layers)
        if self.options.tie == Tie.target:
            return torch.stack([self._written_to(target, features) for target in layers], dim=1)
        rows: list[list[Tensor]] = [[] for _ in layers]
        for source in layers:
            for target in self.targets(source):
                # Without factors every target is sent the same.
                same = target > source and not self._n_columns
                rows[target].append(rows[source][-1] if same else self._part(features, source, target))
        return torch.stack([torch.stack(parts).sum(dim=0) for parts in rows], dim=1) * self.y_scale

    def write(self, features: Features, source: int, target: int) -> Tensor:
        part = self._part(features, source, target)
        return part * self.y_scale[target] if self.options.tie == Tie.source else part

    def _fold_decoders(self, y_scale: Tensor) -> None:
        if self.options.tie == Tie.source:
            self.y_scale.copy_(self.y_scale.double() * y_scale)
            return
        for target in range(self.dims.n_layers):
            table = self._shared(target, target)
            table.copy_(table.double() * y_scale[target])

    def _decoder_weights(self) -> dict[str, Tensor]:
        """W_tied [L, F, D], scale.l and offset.l [F, L - l] where learned, y_scale [L, D] with tie=source."""
        tables = torch.stack([self._shared(layer, layer) for layer in range(self.dims.n_layers)])
        columns = {f"{name}.{layer}": column for name, layer, column in self._columns()}
        return {"W_tied": tables, **columns, **({"y_scale": self.y_scale} if self.options.tie == Tie.source else {})}

    def _load_decoders(self, weights: Mapping[str, Tensor]) -> None:
        for layer in range(self.dims.n_layers):
            self._shared(layer, layer).copy_(weights["W_tied"][layer])

    def stored_table(self, source: int, slot: int) -> tuple[str, int]:
        return "W_tied", source

    @torch.no_grad()
    def load_small(self, weights: Mapping[str, Tensor]) -> None:
        super().load_small(weights)
        for name, layer, column in self._columns():
            column.copy_(weights[f"{name}.{layer}"])
        if self.options.tie == Tie.source:
            self.y_scale.copy_(weights["y_scale"])

    def _columns(self) -> Iterator[tuple[str, int, Tensor]]:
        for name, columns in (("scale", self.scales), ("offset", self.offsets)):
            for layer, column in enumerate(columns or ()):
                yield name, layer, column

    @property
    def _n_columns(self) -> int:
        """Learned numbers of a feature and target."""
        return (self.scales is not None) + (self.offsets is not None)

    def _shared(self, source: int, target: int) -> Tensor:
        return self.kept_rows(*self.place(source, target))

    def _part(self, features: Features, source: int, target: int) -> Tensor:
        """What one source writes to one target, its output scale apart. -> [B, D]"""
        return self.product(self._sent(features, source, target), *self.place(source, target))

    def _written_to(self, target: int, features: Features) -> Tensor:
        """What all sources write to one target, in one product with its table for each form. -> [B, D]"""
        sent = [self._sent(features, source, target) for source in range(target + 1)]
        dense, chosen = (
            [one for one in sent if isinstance(one, Tensor)],
            [one for one in sent if isinstance(one, Chosen)],
        )
        parts: list[Tensor | Chosen] = []
        if dense:
            parts.append(torch.stack(dense).sum(dim=0))
        if chosen:
            pattern, order = merged([one.pattern for one in chosen])
            parts.append(Chosen(pattern, torch.cat([one.values for one in chosen])[order]))
        return torch.stack([self.product(one, *self.place(target, target)) for one in parts]).sum(dim=0)

    def _sent(self, features: Features, source: int, target: int) -> Tensor | Chosen:
        """s a + o 1[a > 0] of one source's features."""
        slot, one = target - source, of_layer(features, source)
        values, ids = (one.values, one.pattern.indices) if isinstance(one, Chosen) else (one, slice(None))
        sent = values
        if self.scales is not None:
            sent = sent * self.scales[source][:, slot][ids]
        if self.offsets is not None:
            sent = sent + self.offsets[source][:, slot][ids] * (values > 0)
        return Chosen(one.pattern, sent) if isinstance(one, Chosen) else sent


def merged(patterns: Sequence[Pattern]) -> tuple[Pattern, Tensor]:
    """The entries of several patterns of the same tokens and features in one, and where each came from in them laid
    end to end. -> (pattern, order [nnz])"""
    tokens, indices = torch.cat([p.tokens for p in patterns]), torch.cat([p.indices for p in patterns])
    order = tokens.argsort(stable=True)
    return from_pairs(tokens[order], indices[order], patterns[0].n_tokens, patterns[0].n_features), order
