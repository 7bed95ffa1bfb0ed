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
    """clt, matryoshka, molt."""

    d_features: int = 1024
    """Features of each layer."""

    site: Site = Site.mlp_in
    """What the encoder reads: mlp_in, the residual stream after the MLP's own norm, or resid_mid, before it."""

    init: Init = Init.data
    """data: encoder rows drawn apart from the inputs. uniform: U(+-1/sqrt F) and U(+-1/sqrt(L d)), zero biases."""

    max_reach: int | None = None
    """matryoshka: features of layer l write layers l to l + max_reach; 0 is the own layer alone, null all later."""

    ranks: list[int] | None = None
    """molt: ranks of the transforms, from large to small. Each takes the same share of the layer's total rank, so that
    the number of transforms of a rank is inversely proportional to it; d_features is the number of all."""

    prefixes: list[int] | None = None
    """matryoshka: how many of the first features reconstruct alone, ascending; the last is d_features. Null, with
    random_prefixes null too: the published shares of d_features, 1/32, 3/32, 7/32, 15/32 and 1."""

    random_prefixes: int | None = None
    """matryoshka: in place of fixed prefixes, so many drawn anew at every step, d_features always among them."""
