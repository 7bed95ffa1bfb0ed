"""Cross-layer transcoder (Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models").

    a^l = activation(W_enc^l x^l + b_enc^l)              y_hat^m = b_dec^m + sum_{l <= m} W_dec^{l -> m} a^l

Features of layer l read layer l's residual stream and write the MLP outputs of layer l and of all later layers: L
encoders and L (L + 1) / 2 decoders, (L + L (L + 1) / 2) F D weights.
"""

from pipeline.arch.base import Transcoder


class CLT(Transcoder):
    """Untied: each (layer, target) pair has a decoder of its own."""

    def targets(self, layer: int) -> range:
        return range(layer, self.dims.n_layers)
