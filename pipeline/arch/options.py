"""What the user may say about a transcoder's shape. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    mlp_in = "mlp_in"
    resid_mid = "resid_mid"


class Init(StrEnum):
    data = "data"
    random_rows = "random_rows"
    uniform = "uniform"
    transposed = "transposed"
    zero_decoder = "zero_decoder"
    active_subspace = "active_subspace"


@dataclass
class ArchOptions:
    name: str
    """clt."""

    d_features: int = 1024
    """Features of each layer."""

    site: Site = Site.mlp_in
    """What the encoder reads: mlp_in, the residual stream after the MLP's own norm, or resid_mid, before it."""

    init: Init = Init.data
    """Initial weights. data: encoder rows drawn apart from the inputs. random_rows: drawn plainly. uniform: U(+-1/sqrt
    F) and U(+-1/sqrt(L d)), zero biases. transposed: encoder = decoder transposed, times d/F. zero_decoder: a run
    begins at the mean target. active_subspace: rows in the span of the first principal components. arch/init.py has
    the formulas and sources."""

    init_firing: float | None = None
    """relu, jumprelu: share of tokens on which each feature fires at the start. Null is 32 / d_features for init=data
    and random_rows, and the zero or centring bias of the other starts."""

    init_variance: float | None = None
    """init=active_subspace: share of the variance that the principal components keep; null is 0.99."""
