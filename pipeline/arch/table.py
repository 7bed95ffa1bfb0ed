"""Architectures by name."""

import dataclasses

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.clt import CLT
from pipeline.arch.crosscoder import Crosscoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.arch.molt import MOLT
from pipeline.arch.on_disk import Rows, on_disk
from pipeline.arch.options import ArchOptions, Site, Target
from pipeline.arch.per_layer import PerLayer
from pipeline.arch.sae import SAE
from pipeline.arch.skip import Skip
from pipeline.arch.tied import Tied
from pipeline.core.activations import Activation, BatchTopKAcross
from pipeline.errors import UserError

ARCHS: dict[str, type[Transcoder]] = {
    "clt": CLT,
    "per_layer": PerLayer,
    "skip": Skip,
    "tied": Tied,
    "sae": SAE,
    "crosscoder": Crosscoder,
    "molt": MOLT,
    "matryoshka": Matryoshka,
}

COMMON = frozenset({"name", "d_features", "site", "init", "init_firing", "init_variance"})
"""The options that every architecture reads."""


def check(options: ArchOptions) -> None:
    """UserError for an unknown architecture, sizes that make no sense, or options that do not go together."""
    if options.name not in ARCHS:
        raise UserError(f"arch={options.name} does not exist; choose one of {', '.join(ARCHS)}")
    architecture = ARCHS[options.name]
    if options.d_features < 1:
        raise UserError(f"arch.d_features={options.d_features} must be at least 1")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in COMMON | architecture.uses and value != field.default:
            raise UserError(f"arch.{field.name} has no meaning for arch={options.name}; leave it out")
    for name, value in architecture.fixed.items():
        if getattr(options, name) != value:
            shown = str(value).lower()
            raise UserError(
                f"arch={options.name} has arch.{name}={shown} always, not {str(getattr(options, name)).lower()}; "
                "leave it out or choose another arch="
            )
    if options.max_reach is not None and options.max_reach < 0:
        raise UserError(f"arch.max_reach={options.max_reach} must be 0 (the own layer alone) or more; null is no limit")
    if options.site == Site.mlp_out and options.target == Target.mlp_out:
        raise UserError(
            f"arch.site=mlp_out is what arch={options.name} is to predict; read arch.site=mlp_in or resid_mid, or "
            "reconstruct what is read (arch=sae, or arch=crosscoder arch.target=site)"
        )
    architecture.check(options)


def n_sources(options: ArchOptions, dims: Dims) -> int:
    """Feature spaces of the transcoder named in the options: what an activation rule is built for."""
    check(options)
    return ARCHS[options.name].sources(dims)


def build(options: ArchOptions, dims: Dims, activation: Activation, rows: Rows | None = None) -> Transcoder:
    """The transcoder named in the options, its weights zero: `arch/init.py` or a file fills them. With `rows` its
    tables are not made but read from there (`arch/on_disk.py`). UserError for an architecture that cannot be."""
    one = n_sources(options, dims) == 1 < dims.n_layers
    if one and isinstance(activation, BatchTopKAcross):
        raise UserError(
            f"arch={options.name} has one feature space over all layers, so that batchtopk_across is the same as "
            "batchtopk; use activation=batchtopk"
        )
    architecture = ARCHS[options.name]
    if rows is None:
        return architecture(options, dims, activation)
    if not architecture.directions:
        raise UserError(
            f"arch={options.name} has matrices in place of decoder rows, which are read whole; read it into memory"
        )
    found = on_disk(architecture)(options, dims, activation)
    found.rows = rows
    return found
