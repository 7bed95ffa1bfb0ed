"""Per-layer transcoder (Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits", arXiv 2406.11944).

    a^l = activation(W_enc^l x^l + b_enc^l)              y_hat^l = b_dec^l + W_dec^l a^l

Parameters: 2 L F D + L F + L D.
"""

from pipeline.arch.base import Transcoder


class PerLayer(Transcoder):
    """Features of a layer write that layer's MLP output alone."""

    def targets(self, layer: int) -> range:
        return range(layer, layer + 1)
