"""Skip transcoder (Paulo, Shabalin and Belrose 2025, "Transcoders Beat Sparse Autoencoders for Interpretability",
arXiv 2501.18823): a per-layer transcoder with a linear path around the features.

    a^l = activation(W_enc^l x^l + b_enc^l)              y_hat^l = b_dec^l + W_dec^l a^l + W_skip^l x^l

W_skip starts at 0. Parameters: 2 L F D + L F + L D + L D^2.
"""

from typing import Any, ClassVar

from pipeline.arch.per_layer import PerLayer


class Skip(PerLayer):
    """The path stays linear in the input, so that attribution through it is exact."""

    uses: ClassVar[frozenset[str]] = frozenset({"skip"})
    fixed: ClassVar[dict[str, Any]] = {"skip": True}
