"""What every transcoder is: an encoder row and decoder rows for each feature, an activation between them.

    pre_acts = einsum("bld,lfd->blf", x, W_enc) + b_enc
    features = activation(pre_acts)
    y_hat[:, m] = b_dec[m] + sum over layers l that write m of features[:, l] @ W_dec[l][:, m - l]

A feature is a row. Axes: B tokens, L layers, M target layers, D d_model, F features of a layer, K active features.

    W_enc  [L, F, D]      b_enc [L, F]
    W_dec[l] [F, M_l, D]  b_dec [L, D]     slot j of W_dec[l] writes the j-th of targets(l): layer l + j
    W_skip [L, D, D]                       with arch.skip: W_skip[m] x^m is added to y_hat^m; 0 at first

Most architectures have a feature space for each layer. One with another number of them (`sources`) has that number in
place of L wherever features, pre-activations, thresholds or counters have a layer axis; S stands for it below.

In files and in the properties below, `W_dec[l]` is one tensor. In memory the trainer keeps one table [F, D] for each
layer and each (layer, target): a fresh gradient of the stacked tensor page-faults on a CPU, which made the step 1.7
times slower.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from pipeline.arch.held import Held
from pipeline.arch.options import ArchOptions
from pipeline.arch.rows import Axes, FeatureRows, axis_of
from pipeline.core.activations import Activation
from pipeline.core.normalize import Scaling
from pipeline.core.norms import row_norms
from pipeline.core.sparse import Chosen, Features, Pattern, Sparse, bag, bags, chosen_features, from_mask, of_layer


class Dims(NamedTuple):
    """The sizes that the base model dictates. They come from the cache, never from YAML."""

    n_layers: int
    d_model: int


class Encoded(NamedTuple):
    """What comes before decoding."""

    pre_acts: Tensor | tuple[Tensor, ...] | None
    """[B, S, F]. The sparse step keeps them only where a loss reads them all, and then as [B, F] for each source."""
    features: Features
    """[B, S, F], or sparse."""
    gated: Features | None = None
    """The pre-activations that a gate made `features` of in the sparse step, in the same form, without gradient."""
    beyond: tuple[Pattern | Tensor | None, ...] = ()
    """For each source what `core/gates.Pairs` says, in the sparse step of a gate."""


class Output(NamedTuple):
    pre_acts: Tensor | tuple[Tensor, ...] | None
    features: Features
    y_hat: Tensor
    """[B, L, D]"""
    shorter: tuple[Tensor, ...] = ()
    """Reconstructions [B, L, D] from shorter prefixes of the features, where an architecture nests them."""
    gated: Features | None = None
    beyond: tuple[Pattern | Tensor | None, ...] = ()


class Transcoder(nn.Module):
    """Base of the architectures. A subclass says which layers a layer writes (`targets`) and documents its formula."""

    causal = True
    """Whether layer l's features depend on inputs of layers <= l alone, so that it can replace MLPs in a live model."""

    linear: bool = True
    """Whether y_hat is linear in the features (and x), so that attribution through it is exact."""

    directions: bool = True
    """Whether a feature writes a fixed direction, its row of W_dec; without that there is no W_dec."""

    uses: ClassVar[frozenset[str]] = frozenset()
    """The options that this architecture reads, beyond those that all read."""

    fixed: ClassVar[dict[str, Any]] = {}
    """Options that have one value in this architecture, which its YAML sets."""

    axes: ClassVar[Axes] = {"encoders": 0, "decoders": 0, "b_enc": 1, "b_dec": None, "W_skip": None}
    """Where parameters and buffers have their features, by the first part of their names (`arch/rows.py`)."""

    stored_axes: ClassVar[Axes] = {"W_enc": 1, "b_enc": 1, "W_dec": 0, "b_dec": None, "W_skip": None}
    """The same of `weights`."""

    tables_on: ClassVar[str | None] = None
    """The device that the tables are made on; None: the default one."""

    in_memory: ClassVar[bool] = True
    """Whether the tables are, all of them at once."""

    W_skip: nn.Parameter | None

    _aside: Tensor | None = None
    """Memory for one layer's pre-activations [B, F] at a time, kept from step to step of training."""

    config: dict[str, Any] | None = None
    """What `final/config.json` says, when the transcoder was read from a run."""

    def __init__(self, options: ArchOptions, dims: Dims, activation: Activation) -> None:
        super().__init__()
        self.options, self.dims, self.activation = options, dims, activation
        self.d_features = d_features = options.d_features
        n_layers, d_model = dims
        table = partial(torch.zeros, d_features, device=self.tables_on)
        self.encoders = nn.ParameterList(table(self.width()) for _ in range(self.n_sources))
        self.decoders = nn.ModuleList(
            nn.ParameterList(table(d_model) for _ in range(self.n_tables(source))) for source in range(self.n_sources)
        )
        self.b_enc = nn.Parameter(torch.zeros(self.n_sources, d_features))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))
        W_skip = nn.Parameter(torch.zeros(n_layers, d_model, d_model)) if options.skip else None
        self.register_parameter("W_skip", W_skip)

    @classmethod
    def check(cls, options: ArchOptions) -> None:
        """UserError for options that this architecture cannot be built from."""

    @classmethod
    def multiple(cls, options: ArchOptions) -> int:
        """Number of which d_features must be a multiple."""
        return 1

    @staticmethod
    def sources(dims: Dims) -> int:
        """Number of feature spaces: one for each layer, unless the architecture has another number."""
        return dims.n_layers

    @property
    def n_sources(self) -> int:
        """Length of the layer axis of features, pre-activations, thresholds and counters."""
        return self.sources(self.dims)

    def under(self, rule: Activation) -> Self:
        """The same weights, shared, under another activation rule."""
        other = copy.copy(self)
        other._modules = self._modules | {"activation": rule}
        return other.train(self.training)

    def targets(self, layer: int) -> range:
        """The layers that features of source `layer` write."""
        raise NotImplementedError

    def reads(self, source: int) -> range:
        """The layers that features of `source` read."""
        return range(source, source + 1)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each source reads. x [B, L, D] -> [B, width()] for each source"""
        return x.to(self.encoders[0].dtype).unbind(1)

    def width(self) -> int:
        """Length of an encoder row."""
        return self.dims.d_model

    def n_tables(self, source: int) -> int:
        """Decoder tables [F, D] that are kept for a source."""
        return len(self.targets(source))

    @property
    def n_parameters(self) -> int:
        """Learned numbers, those of the activation rule (thresholds) included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def decode_flops(self, active: Sequence[int]) -> float:
        """Of one token with so many features of each source at work (F: dense). See `arch/cost.py`."""
        n_layers, d_model = self.dims
        rows = sum(n * len(self.targets(source)) for source, n in enumerate(active))
        return 2 * d_model * rows + (2 * n_layers * d_model**2 if self.options.skip else 0)

    @property
    def W_enc(self) -> Tensor:
        """[L, F, D], a copy."""
        return torch.stack([self.encoder_rows(source) for source in range(self.n_sources)])

    @property
    def W_dec(self) -> list[Tensor]:
        """For each source l [F, M_l, D], a copy: slot j writes the j-th of targets(l)."""
        return [
            torch.stack([self.table(source, target) for target in self.targets(source)], dim=1)
            for source in range(self.n_sources)
        ]

    def tables(self, layer: int) -> Iterator[Tensor]:
        """The decoder tables [F, D] that are kept for a source: one for each target, where decoders are untied."""
        decoder = self.decoders[layer]
        assert isinstance(decoder, nn.ParameterList)
        return iter(decoder)

    def encoder_rows(self, source: int, ids: Tensor | None = None) -> Tensor:
        """What the features of a source (or those in `ids` [n]) read with. -> [F, width()] or [n, width()]"""
        return self.encoders[source] if ids is None else self.encoders[source][ids]

    def encoder_row(self, source: int, feature: int) -> Tensor:
        """The same of one feature. -> [width()]"""
        return self.encoder_rows(source, torch.tensor([feature], device=self.b_enc.device))[0]

    def kept_rows(self, source: int, slot: int, ids: Tensor | None = None) -> Tensor:
        """One of `tables(source)`, or rows of it. -> [F, D] or [n, D]"""
        table = next(islice(self.tables(source), slot, None))
        return table if ids is None else table[ids]

    def place(self, source: int, target: int) -> tuple[int, int]:
        """The table that is kept of what a source writes to a target, as `kept_rows` takes it: (source, slot)."""
        return source, target - self.targets(source).start

    def table(self, source: int, target: int, ids: Tensor | None = None) -> Tensor:
        """What a unit of each feature of `source` (or of those in `ids` [n]) writes to `target`. -> [F, D] or [n, D]"""
        return self.kept_rows(*self.place(source, target), ids)

    def readers(self, source: int) -> Iterator[tuple[Tensor, float]]:
        """Weights [n, D] that read the input beside the encoder, and the bound of their uniform draw."""
        return iter(())

    def table_rows(self, held: Held) -> Held:
        """The rows of `tables` and `readers` that features have."""
        return held

    def start_tables(self, source: int) -> dict[int, Tensor]:
        """The tables that `arch/init.py` fills from data, by the layer whose outputs they are filled with."""
        return {source: next(self.tables(source))}

    def encode_layer(self, x: Tensor, layer: int, out: Tensor | None = None) -> Tensor:
        """One source's pre-activations. x [B, width()] -> [B, F], in `out` if given, without a gradient then."""
        weight = self.encoders[layer]
        bias = self.b_enc[layer].to(weight.dtype)
        return nn.functional.linear(x, weight, bias) if out is None else torch.addmm(bias, x, weight.T, out=out)

    def pre_acts_of(self, x: Tensor, source: int, ids: Tensor) -> Tensor:
        """Those of some features of a source. x [B, width()], ids int64 [n] -> [B, n]"""
        return nn.functional.linear(x, self.encoder_rows(source, ids), self.b_enc[source][ids])

    def encode(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> pre_acts [B, S, F]"""
        return torch.stack([self.encode_layer(h, source) for source, h in enumerate(self.inputs(x))], dim=1)

    def choose(self, x: Tensor) -> Sparse:
        """Features in sparse form, for the activations that choose; pre-activations are dropped layer by layer."""
        inputs = self.inputs(x)
        with torch.no_grad():
            pre_acts = (self.encode_aside(h, layer) for layer, h in enumerate(inputs))
            chosen = list(self.activation.choose(pre_acts, self.rank_norms()))
        values = [
            chosen_features(pattern, taken, h, self.encoders[layer], self.b_enc[layer])
            for layer, ((pattern, taken), h) in enumerate(zip(chosen, inputs, strict=True))
        ]
        return Sparse([pattern for pattern, _ in chosen], values)

    def encode_aside(self, x: Tensor, layer: int) -> Tensor:
        """`encode_layer`, in the memory that the layer before it was in, where the rule lets go of a layer."""
        other_rules = torch.is_inference_mode_enabled() or torch.is_autocast_enabled(x.device.type)
        if not self.training or self.activation.compares_layers or other_rules:
            return self.encode_layer(x, layer)
        # Rows begin at whole cache lines: a product with 1,113 columns side by side took 1.4 times as long on a CPU.
        shape = (x.shape[0], -(-self.d_features // 16) * 16)
        aside = self._aside
        if aside is None or aside.shape != shape or (aside.dtype, aside.device) != (x.dtype, x.device):
            # Kept from step to step: fresh pages cost a CPU more than the selection does.
            self._aside = aside = x.new_empty(shape)
        return self.encode_layer(x, layer, aside[:, : self.d_features])

    def decode(self, features: Features, x: Tensor) -> Tensor:
        """features [B, S, F] or sparse, x [B, L, D] -> y_hat [B, L, D]. x is read by a skip path alone."""
        y_hat = self.written(features) + self.b_dec
        return y_hat if self.W_skip is None else y_hat + torch.einsum("bld,led->ble", x, self.W_skip)

    def written(self, features: Features) -> Tensor:
        """What the features write, without biases and skip path. -> [B, L, D]"""
        if isinstance(features, Sparse) and self.in_memory:
            writes = [(i, target, self.table(i, target)) for i in range(self.n_sources) for target in self.targets(i)]
            return bags(features, writes, self.dims.n_layers).to(self.b_dec.dtype)
        rows: list[Tensor | None] = [None for _ in range(self.dims.n_layers)]
        for source in range(self.n_sources):
            for target in self.targets(source):
                # Sums are float32 where tables are bfloat16.
                part = self.write(features, source, target).to(self.b_dec.dtype)
                so_far = rows[target]
                rows[target] = part if so_far is None else so_far + part
        return torch.stack([row for row in rows if row is not None], dim=1)

    def write(self, features: Features, source: int, target: int) -> Tensor:
        """What the features of one source write to one layer. -> [B, D]"""
        return self.product(of_layer(features, source), *self.place(source, target))

    def product(self, features: Tensor | Chosen, source: int, slot: int) -> Tensor:
        """One source's features, [B, F] or in sparse form, times a table that is kept. -> [B, D]"""
        table = self.kept_rows(source, slot)
        return bag(*features, table) if isinstance(features, Chosen) else features @ table

    def write_rows(self, z: Tensor, ids: Tensor, source: int, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What features `ids` [n] of a source write with activations z [B, n] on what it reads, x [B, width()], for
        each target: (target, [B, D]), without a bias."""
        for target in self.targets(source):
            yield target, z @ self.table(source, target, ids)

    def decode_layer(self, features: Sparse, layer: int, x: Tensor) -> Tensor:
        """What layer `layer`'s MLP output becomes, from the features of layers <= layer. x [B, D] of it -> [B, D]"""
        y_hat = self.b_dec[layer]
        for source in range(len(features.patterns)):
            if layer in self.targets(source):
                y_hat = y_hat + self.write(features, source, layer)
        return y_hat if self.W_skip is None else y_hat + nn.functional.linear(x, self.W_skip[layer])

    def layer_features(self, x: Tensor, layer: int) -> tuple[Pattern, Tensor]:
        """One layer's features, for activations that look at nothing else. x [B, D] -> (pattern, values [nnz])"""
        dense = self.activation.layer(self.encode_layer(x, layer), layer, self.rank_norms())
        pattern = from_mask(dense > 0)
        return pattern, dense[pattern.tokens, pattern.indices]

    def all_features(self, x: Tensor) -> Sparse:
        """Those of every source, one after the other. x [B, L, D]"""
        found = [self.layer_features(h, source) for source, h in enumerate(self.inputs(x))]
        return Sparse([pattern for pattern, _ in found], [values for _, values in found])

    def forward(self, x: Tensor, need_pre_acts: bool = False) -> Output:
        """x [B, L, D] -> Output. Sparse where the activation chooses, unless the pre-activations are asked for."""
        return self.decoded(self.activate(x, need_pre_acts), x)

    def activate(self, x: Tensor, need_pre_acts: bool) -> Encoded:
        """What `forward` decodes. Training has a form of its own (`arch/sparse_step.py`)."""
        if self.activation.chooses and not need_pre_acts:
            return Encoded(None, self.choose(x))
        pre_acts = self.encode(x)
        return Encoded(pre_acts, self.activation(pre_acts, self.rank_norms()))

    def decoded(self, encoded: Encoded, x: Tensor) -> Output:
        """The Output that follows. x [B, L, D] is read by a skip path alone."""
        y_hat = self.decode(encoded.features, x)
        return Output(encoded.pre_acts, encoded.features, y_hat, (), encoded.gated, encoded.beyond)

    def decoder_norms(self) -> Tensor:
        """L2 norm of each feature's decoder rows, concatenated over its targets; gradient 0 at 0. -> [S, F]"""
        sources = range(self.n_sources)
        return torch.stack([row_norms([self.table(i, target) for target in self.targets(i)]) for i in sources])

    def rank_norms(self) -> Tensor | None:
        """The decoder norms for a rule that ranks by them, without gradient. -> [L, F] or None"""
        if not self.activation.by_norm:
            return None
        with torch.no_grad():
            return self.decoder_norms()

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """From the transcoder's units to the model's, in place: afterwards x and y are the model's own.

        W_enc / s, b_enc - W_enc m (the new W_enc), W_dec S of the TARGET layer, b_dec S + M. Thresholds are unchanged.
        With a skip path W_skip S / s and b_dec - W_skip m (the new W_skip).
        """
        scaling = Scaling(*(t.double() for t in scaling))
        for source, weight in enumerate(self.encoders):
            read = slice(self.reads(source).start, self.reads(source).stop)
            folded = weight.double() / scaling.x_scale[read].flatten()
            self.b_enc[source] = self.b_enc[source].double() - folded @ scaling.x_mean[read].flatten()
            weight.copy_(folded)
        self._fold_decoders(scaling.y_scale)
        b_dec = self.b_dec.double() * scaling.y_scale + scaling.y_mean
        if self.W_skip is not None:
            skip = self.W_skip.double() * scaling.y_scale[:, :, None] / scaling.x_scale[:, None]
            b_dec = b_dec - torch.einsum("led,ld->le", skip, scaling.x_mean)
            self.W_skip.copy_(skip)
        self.b_dec.copy_(b_dec)

    def _fold_decoders(self, y_scale: Tensor) -> None:
        """Each table times the scale [L, D] of the layer that it writes."""
        for source in range(self.n_sources):
            for target, table in zip(self.targets(source), self.tables(source), strict=True):
                table.copy_(table.double() * y_scale[target])

    def feature_axis(self, name: str) -> int | None:
        """The axis of a parameter or buffer that has features, or rows of them; None where it has none. KeyError for a
        name that nothing is said of."""
        return axis_of(self.axes, name)

    def feature_rows(self, name: str, d_features: int) -> FeatureRows | None:
        """The same with the entries of each feature, in a transcoder like this one with so many features."""
        axis = self.feature_axis(name)
        return None if axis is None else FeatureRows(axis, ((d_features, 1),))

    def stored_rows(self, name: str, d_features: int) -> FeatureRows | None:
        """The same for the names of `weights`."""
        axis = axis_of(self.stored_axes, name)
        return None if axis is None else FeatureRows(axis, ((d_features, 1),))

    def weights(self) -> dict[str, Tensor]:
        """The weights as they stand in files: W_enc, b_enc, W_dec.0 ... W_dec.{S-1}, b_dec, with a skip path W_skip."""
        skip = {} if self.W_skip is None else {"W_skip": self.W_skip}
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, **self._decoder_weights(), "b_dec": self.b_dec, **skip}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The inverse of `weights`."""
        self.load_small(weights)
        W_enc = weights["W_enc"]
        for source, weight in enumerate(self.encoders):
            at = self.stored_encoder(source)[1]
            weight.copy_(self.encoder_from(W_enc if at is None else W_enc[at]))
        self._load_decoders(weights)

    @torch.no_grad()
    def load_small(self, weights: Mapping[str, Tensor]) -> None:
        """The same of everything but the tables."""
        self.b_enc.copy_(weights["b_enc"])
        self.b_dec.copy_(weights["b_dec"])
        if self.W_skip is not None:
            self.W_skip.copy_(weights["W_skip"])

    def stored_encoder(self, source: int) -> tuple[str, int | None]:
        """Where a source's encoder stands in `weights`: the tensor, and which entry it is of the other of the first two
        axes than the features'; None where it is all of them."""
        return "W_enc", source

    def encoder_from(self, stored: Tensor) -> Tensor:
        """Encoder rows [n, width()] from what stands there for n features."""
        return stored

    def stored_table(self, source: int, slot: int) -> tuple[str, int]:
        """The same of a table that is kept."""
        return f"W_dec.{source}", slot

    def _decoder_weights(self) -> dict[str, Tensor]:
        return {f"W_dec.{source}": W for source, W in enumerate(self.W_dec)}

    def _load_decoders(self, weights: Mapping[str, Tensor]) -> None:
        for source in range(self.n_sources):
            for slot, table in enumerate(self.tables(source)):
                table.copy_(weights[f"W_dec.{source}"][:, slot])


def safe_root(square: Tensor) -> Tensor:
    """The root of sums of squares, with gradient 0 at 0."""
    # The derivative of the root at 0 is infinite, and infinity times the inner 0 would be NaN.
    nonzero = square > 0
    return torch.where(nonzero, square.where(nonzero, 1.0).sqrt(), 0.0)
