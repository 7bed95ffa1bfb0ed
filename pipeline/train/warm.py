"""Weights of a finished run as the start of another: `train.init_from=RUN`.

A finished run is folded, so it works in the base model's units. `Scaling.inverse` takes it back, into the units of the
cache that the new run trains on, which need not be those that it came from.
"""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.core.activations import FixedThreshold, JumpReLU
from pipeline.core.normalize import Scaling
from pipeline.errors import UserError
from pipeline.plain import to_plain
from pipeline.train.artifact import Trained

logger = logging.getLogger(__name__)

LOWEST = 1e-4
"""Where a threshold of 0 begins, in the units of pre_acts: its logarithm is what is learned."""


def check(path: Path, config: dict[str, Any], arch: ArchOptions, dims: Dims) -> None:
    """UserError when the finished run, whose config.json this is, has another shape than the new one, or the new one
    names a start as well."""
    theirs = Dims(**config["dims"])
    if theirs != dims:
        raise UserError(
            f"train.init_from={path} was trained on {theirs.n_layers} layers of {theirs.d_model}, "
            f"the cache has {dims.n_layers} of {dims.d_model}; name a run of the same language model and layers"
        )
    before, now = config["arch"], to_plain(arch)
    starts = {name for name in now if name.startswith("init")}
    differ = [name for name in now if name not in starts and before.get(name) != now[name]]
    if differ:
        shown = ", ".join(f"arch.{name}={now[name]} (there {before.get(name)})" for name in differ)
        raise UserError(f"train.init_from={path} has another shape: {shown}; give this run that shape")
    for field in fields(arch):
        if field.name in starts and getattr(arch, field.name) != field.default:
            raise UserError(
                f"arch.{field.name} has no meaning with train.init_from, which brings the weights; leave it out"
            )


@torch.no_grad()
def start_from(model: Transcoder, trained: Trained, scaling: Scaling) -> None:
    """Fill `model` with the finished weights, in the units of `scaling`; thresholds too where the rule has any."""
    model.load_weights(trained.transcoder.weights())
    model.fold(scaling.inverse())
    fixed = trained.transcoder.activation
    assert isinstance(fixed, FixedThreshold)
    if not isinstance(model.activation, JumpReLU):
        logger.info("           its thresholds are left behind: the rule of this run has none to learn")
        return
    low = int((fixed.threshold < LOWEST).sum())
    if low:
        logger.info("           %s of its thresholds are below %g and begin there", f"{low:,}", LOWEST)
    model.activation.log_threshold.copy_(fixed.threshold.clamp(min=LOWEST).log())
