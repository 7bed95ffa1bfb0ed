"""Optimisers by name."""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.dist.shard import Shard
from pipeline.dist.wire import Group
from pipeline.errors import UserError
from pipeline.train import eight_bit
from pipeline.train.eight_bit import BLOCK, has_codes, in_tables
from pipeline.train.fused_adam import FusedAdam, supports
from pipeline.train.optimisers import EightBit, Optimiser, ScheduleFree
from pipeline.train.options import LrSchedule, OptimOptions

logger = logging.getLogger(__name__)

Named = list[tuple[str, Parameter]]


class Place(NamedTuple):
    """Where an optimiser works."""

    features: Group | None = None
    """The ranks that hold the other features' parameters."""
    seed: int = 0
    """Of the run."""
    ids: Tensor | None = None
    """int64 [n], of the features that are held the numbers in the whole; None for 0, 1, ..."""


def _betas(options: OptimOptions) -> tuple[float, float]:
    return options.beta1, options.beta2


def _adam(named: Named, options: OptimOptions, place: Place) -> Optimizer:
    parameters = [p for _, p in named]
    if options.clip is None and supports(parameters):  # a norm of all gradients needs all gradients
        return FusedAdam(parameters, options.lr, _betas(options))
    # One pass over weights and moments instead of one for each operation: 6 to 9 times faster on a CPU.
    part = torch.optim.Adam(parameters, lr=options.lr, betas=_betas(options), fused=True)
    return Optimiser([part], options.clip, place.features)


def _adamw(named: Named, options: OptimOptions, place: Place) -> Optimizer:
    parameters, decay = [p for _, p in named], options.weight_decay
    if options.clip is None and supports(parameters):
        return FusedAdam(parameters, options.lr, _betas(options), weight_decay=decay, decoupled=True)
    part = torch.optim.AdamW(parameters, lr=options.lr, betas=_betas(options), weight_decay=decay, fused=True)
    return Optimiser([part], options.clip, place.features)


def _adam8bit(named: Named, options: OptimOptions, place: Place) -> Optimizer:
    numbers = {"lr": options.lr, "betas": _betas(options), "weight_decay": options.weight_decay}
    part = eight_bit.adam(named, place.seed, place.ids, **numbers)
    if named[0][1].device.type == "cpu":
        logger.warning("optim=adam8bit is slow on a CPU, far slower than optim=adam; it is meant for CUDA")
    return EightBit([part], options.clip, place.features)


def _muon(named: Named, options: OptimOptions, place: Place) -> Optimizer:
    matrices = [p for name, p in named if in_tables(name)]
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
    return Optimiser([muon, adam], options.clip, place.features)


def _signsgd(named: Named, options: OptimOptions, place: Place) -> Optimizer:
    return ScheduleFree([p for _, p in named], options.lr, options.momentum, options.clip, place.features)


class Entry(NamedTuple):
    make: Callable[[Named, OptimOptions, Place], Optimizer]
    uses: frozenset[str]
    """The options that it reads, beyond those that all read."""
    library: str | None = None
    """What has to be installed for it."""
    state_bytes: float = 8
    """Of a weight's state, on the device."""
    table_bytes: float | None = None
    """The same of a weight in a table of features, where it is another."""
    coded: bool = False
    """Whether tables have moments of 8 bits, in blocks that no border of ranks may cross."""
    rounds: bool = False
    """Whether it rounds weights that are bfloat16 at random, so that small steps are not lost."""
    whole: bool = False
    """Whether a step mixes the rows of a matrix, so that no rank can do with some of them."""


BETAS = frozenset({"beta1", "beta2"})

CODED = 2 + 8 / BLOCK
"""Bytes of two codes, and of their share of two scales."""

OPTIMISERS: dict[str, Entry] = {
    "adam": Entry(_adam, BETAS),
    "adamw": Entry(_adamw, BETAS | {"weight_decay"}),
    "adam8bit": Entry(_adam8bit, BETAS | {"weight_decay"}, "torchao", table_bytes=CODED, coded=True, rounds=True),
    "muon": Entry(_muon, BETAS | {"weight_decay", "momentum"}, table_bytes=4, whole=True),
    "signsgd": Entry(_signsgd, frozenset({"momentum"}), "schedulefree", state_bytes=4),
}


def build(
    parameters: Iterable[Parameter] | Iterable[tuple[str, Parameter]],
    options: OptimOptions,
    place: Place | None = None,
) -> Optimizer:
    """The optimiser of these parameters; muon and adam8bit need their names (`named_parameters()`). UserError as
    `check`."""
    place = place or Place()
    check(options, 1 if place.features is None else place.features.size)
    named = [entry if isinstance(entry, tuple) else ("", entry) for entry in parameters]
    return OPTIMISERS[options.name].make(named, options, place)


def state_bytes(name: str, model: Transcoder) -> int:
    """Of the moments of a model's parameters, of which the shapes alone are read."""
    entry = OPTIMISERS[name]
    if entry.table_bytes is None:
        return int(entry.state_bytes * model.n_parameters)
    named = ((name, p) for name, p in model.named_parameters() if in_tables(name))
    tables = sum(p.numel() for name, p in named if has_codes(name, p) or not entry.coded)
    return int(entry.table_bytes * tables + entry.state_bytes * (model.n_parameters - tables))


def check(options: OptimOptions, feature_ranks: int = 1) -> None:
    """UserError for an unknown name, a library that is missing, numbers outside their range or without meaning, and for
    an optimiser that needs whole matrices where several ranks share the features."""
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
    if feature_ranks > 1 and OPTIMISERS[options.name].whole:
        raise UserError(
            f"optim={options.name} makes a step of a whole matrix and each of {feature_ranks} ranks has some of its "
            "rows; use optim=adam or another, or dist=ddp"
        )
    library = OPTIMISERS[options.name].library
    if library is not None and importlib.util.find_spec(library) is None:
        raise UserError(f"optim={options.name} needs {library}; run: pip install {library}")


def check_borders(name: str, whole: Transcoder, parts: Sequence[Shard]) -> None:
    """UserError where moments of 8 bits would lie in blocks that cross the borders of these feature ranks. `whole` may
    lie on the meta device."""
    tables = {n: p for n, p in whole.named_parameters() if in_tables(n)} if OPTIMISERS[name].coded else {}
    for parameter, table in tables.items() if len(parts) > 1 else ():
        rows, width = whole.feature_rows(parameter, whole.d_features), table.shape[1]
        assert rows is not None
        ranges = [one for shard in parts for one in rows.of(shard.ranges)]
        if any(edge * width % BLOCK for one in ranges for edge in (one.start, one.stop)):
            unit = len(parts) * BLOCK // math.gcd(BLOCK, width)
            raise UserError(
                f"optim={name} has moments in blocks of {BLOCK} numbers, and borders of {len(parts)} feature ranks lie "
                f"inside blocks of tables that are {width} wide; use arch.d_features (and prefixes, and groups of "
                f"groupmax) in multiples of {unit}, optim=adam, or dist=ddp"
            )


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
