"""What the user may say about a transcoder's shape. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    mlp_in = "mlp_in"
    resid_mid = "resid_mid"


class Init(StrEnum):
    data = "data"
    uniform = "uniform"


@dataclass
class ArchOptions:
    name: str
    """clt."""

    d_features: int = 1024
    """Features of each layer."""

    site: Site = Site.mlp_in
    """What the encoder reads: mlp_in, the residual stream after the MLP's own norm, or resid_mid, before it."""

    init: Init = Init.data
    """data: encoder rows drawn apart from the inputs. uniform: U(+-1/sqrt F) and U(+-1/sqrt(L d)), zero biases."""
