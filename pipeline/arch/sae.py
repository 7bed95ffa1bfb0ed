"""Sparse autoencoders, one a layer (Bricken et al. 2023, "Towards Monosemanticity"; Cunningham et al. 2023, arXiv
2309.08600): the reconstruction is of what is read.

    a^l = activation(W_enc^l x^l + b_enc^l)              x_hat^l = b_dec^l + W_dec^l a^l

Parameters: 2 L F D + L F + L D. The input is not centred by b_dec first: b_enc does that as well.
"""

from typing import Any, ClassVar

from pipeline.arch.options import Target
from pipeline.arch.per_layer import PerLayer


class SAE(PerLayer):
    """On any site, mlp_out included: y_hat is compared with x."""

    uses: ClassVar[frozenset[str]] = frozenset({"target"})
    fixed: ClassVar[dict[str, Any]] = {"target": Target.site}
