"""How many parameters an architecture has, and how wide it may be for a number of them. Nothing is allocated."""

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
    narrow = replace(activation, k=1) if activation.k is not None else activation
    with torch.device("meta"):
        rule = activations.build(narrow, table.n_sources(options, dims), options.d_features)
        model = table.build(options, dims, rule)
    return sum(p.numel() for p in model.parameters())


def d_features_for(options: ArchOptions, dims: Dims, activation: ActivationOptions, wanted: int) -> int:
    """The largest d_features with at most `wanted` parameters. UserError when one feature is too many already."""

    def size(d_features: int) -> int:
        return n_parameters(replace(options, d_features=d_features), dims, activation)

    low, high = 1, 2
    if size(low) > wanted:
        raise UserError(
            f"arch={options.name} has {size(low):,} parameters with a single feature, more than {wanted:,}; "
            "ask for more"
        )
    while size(high) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= wanted else (low, middle)
    return low
