"""Architectures by name."""

import dataclasses

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions
from pipeline.core.activations import Activation
from pipeline.errors import UserError

ARCHS: dict[str, type[Transcoder]] = {"clt": CLT}

COMMON = frozenset({"name", "d_features", "site", "init", "init_firing", "init_variance"})
"""The options that every architecture reads."""


def check(options: ArchOptions) -> None:
    """UserError for an unknown architecture or sizes that make no sense."""
    if options.name not in ARCHS:
        raise UserError(f"arch={options.name} does not exist; choose one of {', '.join(ARCHS)}")
    if options.d_features < 1:
        raise UserError(f"arch.d_features={options.d_features} must be at least 1")
    for field in dataclasses.fields(options):
        if field.name not in COMMON | ARCHS[options.name].uses and getattr(options, field.name) != field.default:
            raise UserError(f"arch.{field.name} has no meaning for arch={options.name}; leave it out")


def n_sources(options: ArchOptions, dims: Dims) -> int:
    """Feature spaces of the transcoder named in the options: what an activation rule is built for."""
    check(options)
    return ARCHS[options.name].sources(dims)


def build(options: ArchOptions, dims: Dims, activation: Activation) -> Transcoder:
    """The transcoder named in the options, its weights zero: `arch/init.py` or a file fills them."""
    check(options)
    return ARCHS[options.name](options, dims, activation)
