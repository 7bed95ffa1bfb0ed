"""What the user may say about a transcoder's shape. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class Site(StrEnum):
    mlp_in = "mlp_in"
    resid_mid = "resid_mid"
    mlp_out = "mlp_out"


class Target(StrEnum):
    mlp_out = "mlp_out"
    site = "site"


class Tie(StrEnum):
    source = "source"
    target = "target"


class Init(StrEnum):
    data = "data"
    random_rows = "random_rows"
    uniform = "uniform"
    transposed = "transposed"
    zero_decoder = "zero_decoder"
    active_subspace = "active_subspace"


@dataclass
class ArchOptions:
    """A field that the chosen architecture does not read keeps its default; setting it is an error, not a no-op."""

    name: str
    """clt, per_layer, skip, tied, sae, crosscoder, molt, matryoshka."""

    d_features: int = 1024
    """Features of each layer; of a crosscoder, which has one space over all layers, features in all."""

    site: Site = Site.mlp_in
    """What the encoder reads: mlp_in, the residual stream after the MLP's own norm, resid_mid, before it, or mlp_out,
    the MLP's output, which only an architecture that reconstructs what it reads can take (arch.target=site)."""

    target: Target = Target.mlp_out
    """What is reconstructed. crosscoder: mlp_out or site, what it reads. sae: always site."""

    init: Init = Init.data
    """Initial weights. data: encoder rows drawn apart from the inputs. random_rows: drawn plainly. uniform: U(+-1/sqrt
    F) and U(+-1/sqrt(L d)), zero biases. transposed: encoder = decoder transposed, times d/F. zero_decoder: a run
    begins at the mean target. active_subspace: rows in the span of the first principal components. arch/init.py has
    the formulas and sources."""

    init_firing: float | None = None
    """relu, jumprelu: share of tokens on which each feature fires at the start. Null is 32 / d_features
    for init=data and random_rows (more with a high loss.target_l0), and the zero or centring bias of the others."""

    init_variance: float | None = None
    """init=active_subspace: share of the variance that the principal components keep; null is 0.99."""

    max_reach: int | None = None
    """clt, matryoshka: features of layer l write layers l to l + max_reach; 0 is the own layer alone, null all later
    layers."""

    skip: bool = False
    """clt, tied: add W_skip^m x^m, [D, D] for each layer, to the reconstruction. skip: always true."""

    tie: Tie = Tie.source
    """tied: source, one decoder table for each layer, written to every later one; target, one table for each target
    layer, shared by all layers that write it."""

    scale: bool = True
    """tied: learn a factor for each feature and target, from 1."""

    offset: bool = False
    """tied: learn what an active feature adds to its value, for each feature and target, from 0. The reconstruction is
    then no longer linear in the features."""

    ranks: list[int] | None = None
    """molt: ranks of the transforms, from large to small. Each takes the same share of the layer's total rank, so that
    the number of transforms of a rank is inversely proportional to it; d_features is the number of all."""

    prefixes: list[int] | None = None
    """matryoshka: how many of the first features reconstruct alone, ascending; the last is d_features. Null, with
    random_prefixes null too: the published shares of d_features, 1/32, 3/32, 7/32, 15/32 and 1."""

    random_prefixes: int | None = None
    """matryoshka: in place of fixed prefixes, so many drawn anew at every step, d_features always among them."""

    @property
    def writes(self) -> Site:
        """The site whose activations are reconstructed."""
        return self.site if self.target == Target.site else Site.mlp_out
