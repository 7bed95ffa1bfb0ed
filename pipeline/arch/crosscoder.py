"""Acausal crosscoder (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing").

    a = activation(sum_l W_enc^l x^l + b_enc)            y_hat^m = b_dec^m + W_dec^m a

One feature space reads and writes all layers, so that features and pre-activations are [B, 1, F]. As published it
reconstructs what it reads (`arch.target=site`); by default it predicts the MLP outputs. A feature depends on layers
above those that it writes, so nothing of it can run live in a model.

Parameters: 2 L F D + F + L D. `encoders` holds one [F, L D] table, the layers side by side, so that encoding is one
product; files and `W_enc` have [L, F, D].
"""

from typing import ClassVar

from torch import Tensor

from pipeline.arch.base import Dims, Transcoder


class Crosscoder(Transcoder):
    """`targets` of its one source are all layers."""

    causal = False
    uses: ClassVar[frozenset[str]] = frozenset({"target"})

    @staticmethod
    def sources(dims: Dims) -> int:
        return 1

    def width(self) -> int:
        return self.dims.n_layers * self.dims.d_model

    def targets(self, layer: int) -> range:
        return range(self.dims.n_layers)

    def reads(self, source: int) -> range:
        return range(self.dims.n_layers)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x.to(self.encoders[0].dtype).flatten(1),)

    @property
    def W_enc(self) -> Tensor:
        return self.encoder_rows(0).unflatten(1, self.dims).transpose(0, 1).contiguous()

    def stored_encoder(self, source: int) -> tuple[str, int | None]:
        return "W_enc", None

    def encoder_from(self, stored: Tensor) -> Tensor:
        return stored.transpose(0, 1).flatten(1)

    def start_tables(self, source: int) -> dict[int, Tensor]:
        return dict(zip(self.targets(source), self.tables(source), strict=True))
