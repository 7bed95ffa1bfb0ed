"""Optimisers by name."""

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.errors import UserError
from pipeline.train.fused_adam import FusedAdam, supports
from pipeline.train.optimisers import EightBit, Optimiser, ScheduleFree
from pipeline.train.options import LrSchedule, OptimOptions

logger = logging.getLogger(__name__)

Named = list[tuple[str, Parameter]]

MATRICES = {"encoders", "decoders", "U", "V"}
"""Where in a transcoder the matrices lie that Muon moves; all else with two axes is biases or thresholds of layers."""


def _betas(options: OptimOptions) -> tuple[float, float]:
    return options.beta1, options.beta2


def _adam(named: Named, options: OptimOptions) -> Optimizer:
    parameters = [p for _, p in named]
    if options.clip is None and supports(parameters):  # a norm of all gradients needs all gradients
        return FusedAdam(parameters, options.lr, _betas(options))
    # One pass over weights and moments instead of one for each operation: 6 to 9 times faster on a CPU.
    part = torch.optim.Adam(parameters, lr=options.lr, betas=_betas(options), fused=True)
    return Optimiser([part], options.clip)


def _adamw(named: Named, options: OptimOptions) -> Optimizer:
    parameters, decay = [p for _, p in named], options.weight_decay
    if options.clip is None and supports(parameters):
        return FusedAdam(parameters, options.lr, _betas(options), weight_decay=decay, decoupled=True)
    part = torch.optim.AdamW(parameters, lr=options.lr, betas=_betas(options), weight_decay=decay, fused=True)
    return Optimiser([part], options.clip)


def _adam8bit(named: Named, options: OptimOptions) -> Optimizer:
    parameters = [p for _, p in named]
    decay = options.weight_decay
    part = EightBit.adam(parameters, lr=options.lr, betas=_betas(options), weight_decay=decay)
    if parameters[0].device.type == "cpu":
        logger.warning("optim=adam8bit is slow on a CPU, far slower than optim=adam; it is meant for CUDA")
    return EightBit([part], options.clip)


def _muon(named: Named, options: OptimOptions) -> Optimizer:
    matrices = [p for name, p in named if p.ndim == 2 and name.split(".")[0] in MATRICES]
    others = [p for name, p in named if not any(p is matrix for matrix in matrices)]
    assert matrices, "Muon needs the names of the parameters"
    muon = torch.optim.Muon(
        matrices,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        # Updates as long as Adam's usually are, so that one rate serves both (Liu et al. 2025, arXiv:2502.16982).
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.Adam(others, lr=options.lr, betas=_betas(options), fused=True)
    return Optimiser([muon, adam], options.clip)


def _signsgd(named: Named, options: OptimOptions) -> Optimizer:
    return ScheduleFree([p for _, p in named], options.lr, options.momentum, options.clip)


class Entry(NamedTuple):
    make: Callable[[Named, OptimOptions], Optimizer]
    uses: frozenset[str]
    """The options that it reads, beyond those that all read."""
    library: str | None = None
    """What has to be installed for it."""
    state_bytes: float = 8
    """Of a weight's state, on the device."""
    rounds: bool = False
    """Whether it rounds weights that are bfloat16 at random, so that small steps are not lost."""


BETAS = frozenset({"beta1", "beta2"})

OPTIMISERS: dict[str, Entry] = {
    "adam": Entry(_adam, BETAS),
    "adamw": Entry(_adamw, BETAS | {"weight_decay"}),
    "adam8bit": Entry(_adam8bit, BETAS | {"weight_decay"}, "torchao", 2, rounds=True),
    "muon": Entry(_muon, BETAS | {"weight_decay", "momentum"}, None, 4),
    "signsgd": Entry(_signsgd, frozenset({"momentum"}), "schedulefree", 4),
}


def build(parameters: Iterable[Parameter] | Iterable[tuple[str, Parameter]], options: OptimOptions) -> Optimizer:
    """The optimiser of these parameters; muon needs their names (`named_parameters()`). UserError as `check`."""
    check(options)
    named = [entry if isinstance(entry, tuple) else ("", entry) for entry in parameters]
    return OPTIMISERS[options.name].make(named, options)


def check(options: OptimOptions) -> None:
    """UserError for an unknown name, a library that is missing, numbers outside their range or without meaning."""
    if options.name not in OPTIMISERS:
        raise UserError(f"optim={options.name} does not exist; choose one of {', '.join(OPTIMISERS)}")
    if options.lr <= 0:
        raise UserError(f"optim.lr={options.lr} must be above 0")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"optim.{name}={getattr(options, name)} must lie in [0, 1)")
    for name in ("warmup", "decay"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"optim.{name}={getattr(options, name)} is a share of the run and must lie in [0, 1]")
    if not 0 < options.momentum < 1:
        raise UserError(f"optim.momentum={options.momentum} must lie between 0 and 1")
    if options.weight_decay < 0:
        raise UserError(f"optim.weight_decay={options.weight_decay} must not be negative")
    if options.clip is not None and options.clip <= 0:
        raise UserError(f"optim.clip={options.clip} must be above 0; null for no limit")
    _check_meaning(options)
    library = OPTIMISERS[options.name].library
    if library is not None and importlib.util.find_spec(library) is None:
        raise UserError(f"optim={options.name} needs {library}; run: pip install {library}")


def _check_meaning(options: OptimOptions) -> None:
    given = {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    optional = frozenset[str]().union(*(entry.uses for entry in OPTIMISERS.values()))
    for name in sorted(given & optional - OPTIMISERS[options.name].uses):
        raise UserError(f"optim.{name} has no meaning for optim={options.name}; leave it out")
    if options.name == "signsgd" and options.decay > 0 and options.schedule != LrSchedule.constant:
        raise UserError(
            f"optim.decay={options.decay} has no meaning for optim=signsgd, whose weights are averaged instead; use "
            "optim.decay=0"
        )
