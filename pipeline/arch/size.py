"""How many parameters an architecture has, and how wide it may be for a number of them. Nothing is allocated."""

import math
from dataclasses import replace

import torch

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.options import ActivationOptions
from pipeline.errors import UserError


def n_parameters(options: ArchOptions, dims: Dims, activation: ActivationOptions) -> int:
    """Trained numbers of the transcoder, its learned thresholds included: counted on torch's meta device."""
    options, activation = _least(options, activation)
    with torch.device("meta"):
        rule = activations.build(activation, table.n_sources(options, dims), options.d_features)
        return table.build(options, dims, rule).n_parameters


def d_features_for(options: ArchOptions, dims: Dims, activation: ActivationOptions, wanted: int) -> int:
    """The largest d_features with at most `wanted` parameters. UserError when the least there is has more, or when
    other options fix d_features."""
    if options.prefixes is not None:
        raise UserError(
            f"arch.prefixes={list(options.prefixes)} fixes arch.d_features, so that it cannot be chosen for {wanted:,} "
            "parameters; leave out arch.prefixes, or the number of parameters"
        )
    step = _multiple(options, activation)

    def size(times: int) -> int:
        return n_parameters(replace(options, d_features=times * step), dims, activation)

    low, high = 1, 2
    if size(low) > wanted:
        raise UserError(
            f"arch={options.name} has {size(low):,} parameters with arch.d_features={step}, the least there is, "
            f"more than {wanted:,}; ask for more"
        )
    while size(high) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle)
    return low * step


def _least(options: ArchOptions, activation: ActivationOptions) -> tuple[ArchOptions, ActivationOptions]:
    """The same numbers of parameters, without what cannot be had from a few features."""
    if activation.k is not None or activation.k_per_layer is not None:
        activation = replace(activation, k=1, k_per_layer=None, k_start=None, k_anneal=None)
    return replace(options, random_prefixes=None), activation


def _multiple(options: ArchOptions, activation: ActivationOptions) -> int:
    """What d_features must be a multiple of."""
    groups = activation.k_per_layer or [activation.k or 1]
    architecture = table.ARCHS[options.name].multiple(options) if options.name in table.ARCHS else 1
    return math.lcm(architecture, *(groups if activation.name == "groupmax" else ()))
