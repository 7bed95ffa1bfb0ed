"""Cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models").

    a^l = activation(W_enc^l x^l + b_enc^l)              y_hat^m = b_dec^m + sum_{l <= m} W_dec^{l -> m} a^l

Features of layer l read layer l and write the MLP outputs of layer l and of later ones: of all of them, or of the next
`max_reach` (0: of layer l alone, a per-layer transcoder). With `skip`, W_skip^m x^m is added to y_hat^m.

Parameters, P the number of (layer, target) pairs: (L + P) F D + L F + L D, and L D^2 with `skip`. Without a reach
P = L (L + 1) / 2; with R < L, P = (R + 1) L - R (R + 1) / 2.
"""

from typing import ClassVar

from pipeline.arch.base import Transcoder


class CLT(Transcoder):
    """Untied: each (layer, target) pair has a decoder of its own."""

    uses: ClassVar[frozenset[str]] = frozenset({"max_reach", "skip"})

    def targets(self, layer: int) -> range:
        reach = self.options.max_reach
        end = self.dims.n_layers if reach is None else layer + reach + 1
        return range(layer, min(end, self.dims.n_layers))
