"""What every transcoder is: an encoder row and decoder rows for each feature, an activation between them.

    pre_acts = einsum("bld,lfd->blf", x, W_enc) + b_enc
    features = activation(pre_acts)
    y_hat[:, m] = b_dec[m] + sum over layers l that write m of features[:, l] @ W_dec[l][:, m - l]

A feature is a row. Axes: B tokens, L layers, M target layers, D d_model, F features of a layer, K active features.

    W_enc  [L, F, D]      b_enc [L, F]
    W_dec[l] [F, M_l, D]  b_dec [L, D]     slot j of W_dec[l] writes layer l + j

In files and in the properties below, `W_dec[l]` is one tensor. In memory the trainer keeps one table [F, D] for each
layer and each (layer, target): a fresh gradient of the stacked tensor page-faults on a CPU, which made the step 1.7
times slower.
"""

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from pipeline.arch.options import ArchOptions
from pipeline.core.activations import Activation
from pipeline.core.normalize import Scaling
from pipeline.core.sparse import Features, Pattern, Sparse, bag, chosen_features, from_mask


class Dims(NamedTuple):
    """The sizes that the base model dictates. They come from the cache, never from YAML."""

    n_layers: int
    d_model: int


class Output(NamedTuple):
    pre_acts: Tensor | None
    """[B, L, F]; None on the sparse path, which does not keep them."""
    features: Features
    """[B, L, F], or sparse."""
    y_hat: Tensor
    """[B, L, D]"""
    shorter: tuple[Tensor, ...] = ()
    """Reconstructions [B, L, D] from shorter prefixes of the features, where an architecture nests them."""


class Transcoder(nn.Module):
    """Base of the architectures. A subclass says which layers a layer writes (`targets`) and documents its formula."""

    causal = True
    """Whether layer l's features depend on inputs of layers <= l alone, so that it can replace MLPs in a live model."""

    linear: ClassVar[bool] = True
    """Whether a feature writes a fixed direction, its row of W_dec; without that there is no W_dec."""

    uses: ClassVar[frozenset[str]] = frozenset()
    """The options that this architecture reads, beyond those that all read."""

    config: dict[str, Any] | None = None
    """What `final/config.json` says, when the transcoder was read from a run."""

    def __init__(self, options: ArchOptions, dims: Dims, activation: Activation) -> None:
        super().__init__()
        self.options, self.dims, self.activation = options, dims, activation
        self.d_features = d_features = options.d_features
        n_layers, d_model = dims
        self.encoders = nn.ParameterList(torch.zeros(d_features, d_model) for _ in range(n_layers))
        self.decoders = nn.ModuleList(
            nn.ParameterList(torch.zeros(d_features, d_model) for _ in range(self.n_tables(layer)))
            for layer in range(n_layers)
        )
        self.b_enc = nn.Parameter(torch.zeros(n_layers, d_features))
        self.b_dec = nn.Parameter(torch.zeros(n_layers, d_model))

    @classmethod
    def check(cls, options: ArchOptions) -> None:
        """UserError for options that this architecture cannot be built from."""

    def n_tables(self, source: int) -> int:
        """Decoder tables [F, D] that are kept for a source."""
        return len(self.targets(source))

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
        """The layers that features of `layer` write, a range that begins at `layer`."""
        raise NotImplementedError

    @property
    def W_enc(self) -> Tensor:
        """[L, F, D], a copy."""
        return torch.stack(list(self.encoders))

    @property
    def W_dec(self) -> list[Tensor]:
        """For each layer l [F, M_l, D], a copy: slot j writes layer l + j."""
        return [torch.stack(list(self.tables(layer)), dim=1) for layer in range(self.n_sources)]

    def tables(self, layer: int) -> Iterator[Tensor]:
        """The decoder tables [F, D] of a layer, one for each target."""
        decoder = self.decoders[layer]
        assert isinstance(decoder, nn.ParameterList)
        return iter(decoder)

    def encode_layer(self, x: Tensor, layer: int) -> Tensor:
        """One layer's pre-activations. x [B, D] -> [B, F]"""
        return nn.functional.linear(x, self.encoders[layer], self.b_enc[layer])

    def encode(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> pre_acts [B, L, F]"""
        return torch.stack([self.encode_layer(h, layer) for layer, h in enumerate(x.unbind(1))], dim=1)

    def choose(self, x: Tensor) -> Sparse:
        """Features in sparse form, for the activations that choose; pre-activations are dropped layer by layer."""
        inputs = x.unbind(1)
        with torch.no_grad():
            pre_acts = (self.encode_layer(h, layer) for layer, h in enumerate(inputs))
            chosen = list(self.activation.choose(pre_acts))
        values = [
            chosen_features(pattern, taken, h, self.encoders[layer], self.b_enc[layer])
            for layer, ((pattern, taken), h) in enumerate(zip(chosen, inputs, strict=True))
        ]
        return Sparse([pattern for pattern, _ in chosen], values)

    def decode(self, features: Features, x: Tensor) -> Tensor:
        """features [B, L, F] or sparse, x [B, L, D] -> y_hat [B, L, D]. A plain CLT ignores x; a skip path reads it."""
        sources = range(self.n_sources)
        rows: list[Tensor | None] = [None for _ in range(self.dims.n_layers)]
        for layer in sources:
            for target, table in zip(self.targets(layer), self.tables(layer), strict=True):
                part = self._write(features, layer, table)
                so_far = rows[target]
                rows[target] = part if so_far is None else so_far + part
        return torch.stack([row for row in rows if row is not None], dim=1) + self.b_dec

    def write_rows(self, z: Tensor, ids: Tensor, layer: int, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What features `ids` [n] of a layer write with activations z [B, n] on x [B, D]: (target, [B, D]), no bias."""
        for target, table in zip(self.targets(layer), self.tables(layer), strict=True):
            yield target, z @ table[ids]

    def decode_layer(self, features: Sparse, layer: int, x: Tensor) -> Tensor:
        """What layer `layer`'s MLP output becomes: its input x [B, D], features of layers <= layer -> [B, D]"""
        y_hat = self.b_dec[layer]
        for source in range(len(features.patterns)):
            if layer in self.targets(source):
                table = list(self.tables(source))[layer - source]
                y_hat = y_hat + self._write(features, source, table)
        return y_hat

    def layer_features(self, x: Tensor, layer: int) -> tuple[Pattern, Tensor]:
        """One layer's features, for activations that look at nothing else. x [B, D] -> (pattern, values [nnz])"""
        dense = self.activation.layer(self.encode_layer(x, layer), layer)
        pattern = from_mask(dense > 0)
        return pattern, dense[pattern.tokens, pattern.indices]

    def forward(self, x: Tensor, need_pre_acts: bool = False) -> Output:
        """x [B, L, D] -> Output. Sparse where the activation chooses, unless a loss needs the pre-activations."""
        pre_acts, features = self.activate(x, need_pre_acts)
        return Output(pre_acts, features, self.decode(features, x))

    def activate(self, x: Tensor, need_pre_acts: bool) -> tuple[Tensor | None, Features]:
        """The first two fields of `forward`'s Output."""
        if self.activation.chooses and not need_pre_acts:
            return None, self.choose(x)
        pre_acts = self.encode(x)
        return pre_acts, self.activation(pre_acts)

    def decoder_norms(self) -> Tensor:
        """L2 norm of each feature's decoder rows, concatenated over its targets; gradient 0 at 0. -> [L, F]"""
        squares = [sum(table.square().sum(dim=1) for table in self.tables(i)) for i in range(self.n_sources)]
        return safe_root(torch.stack([s for s in squares if isinstance(s, Tensor)]))

    @torch.no_grad()
    def fold(self, scaling: Scaling) -> None:
        """From the transcoder's units to the model's, in place: afterwards x and y are the model's own.

        W_enc / s, b_enc - W_enc m (the new W_enc), W_dec S of the TARGET layer, b_dec S + M. Thresholds are unchanged.
        """
        scaling = Scaling(*(t.double() for t in scaling))
        for layer, weight in enumerate(self.encoders):
            folded = weight.double() / scaling.x_scale[layer]
            self.b_enc[layer] = self.b_enc[layer].double() - folded @ scaling.x_mean[layer]
            weight.copy_(folded)
            for target, table in zip(self.targets(layer), self.tables(layer), strict=True):
                table.copy_(table.double() * scaling.y_scale[target])
        self.b_dec.copy_(self.b_dec.double() * scaling.y_scale + scaling.y_mean)

    def weights(self) -> dict[str, Tensor]:
        """The weights as they stand in files: W_enc, b_enc, W_dec.0 ... W_dec.{L-1}, b_dec."""
        decoders = {f"W_dec.{layer}": W for layer, W in enumerate(self.W_dec)}
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, **decoders, "b_dec": self.b_dec}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The inverse of `weights`."""
        self.b_enc.copy_(weights["b_enc"])
        self.b_dec.copy_(weights["b_dec"])
        for layer, weight in enumerate(self.encoders):
            weight.copy_(weights["W_enc"][layer])
            for slot, table in enumerate(self.tables(layer)):
                table.copy_(weights[f"W_dec.{layer}"][:, slot])

    def _write(self, features: Features, layer: int, table: Tensor) -> Tensor:
        if isinstance(features, Sparse):
            return bag(features.patterns[layer], features.values[layer], table)
        return features[:, layer] @ table


def safe_root(square: Tensor) -> Tensor:
    """The root of sums of squares, with gradient 0 at 0."""
    # The derivative of the root at 0 is infinite, and infinity times the inner 0 would be NaN.
    nonzero = square > 0
    return torch.where(nonzero, square.where(nonzero, 1.0).sqrt(), 0.0)
