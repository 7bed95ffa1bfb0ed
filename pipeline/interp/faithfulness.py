"""Does a transcoder go through the steps that the model goes through? Two diagnostics for `metrics.json`.

`decoder_mass` says to which layers features write (`interp/decoder_mass.py`), `interventions` whether removing a
feature does in the replacement what it does in the model (`interp/interventions.py`). Each file defines its numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core import bootstrap
from pipeline.data.models import LanguageModel
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.interp import decoder_mass, interventions
from pipeline.interp.replacement import NOTES, Basis, basis, no_basis


class Measured(NamedTuple):
    values: dict[str, Any]
    ci95: dict[str, Any]
    """The same tree with [low, high] for the numbers that admit an interval; empty without resamples."""


def measure(
    lm: LanguageModel,
    transcoder: Transcoder,
    contexts: np.ndarray,
    read: Callable[[Tensor], Tensor],
    scored: Tensor,
    batch_tokens: int,
    resamples: int = 0,
    group: Group = ALONE,
) -> Measured:
    """contexts int32 [n_contexts, T]; scored bool, the same shape: which positions are rows; read: some of those rows,
    counted in order, int64 [B] -> what the transcoder, in the model's units and with fixed thresholds, reads there
    [B, L, D]. The ranks of the group divide the work."""
    mass, mass_ci95 = _decoder_mass(transcoder, read, scored, batch_tokens, resamples, group)
    values: dict[str, Any] = {"decoder_mass": mass}
    ci95: dict[str, Any] = {"decoder_mass": mass_ci95} if mass_ci95 else {}
    found = basis(transcoder)
    if found is None or found == Basis.teacher_forced:
        why = no_basis(transcoder.options) if found is None else _NOT_LIVE.format(transcoder.options.name)
        return Measured(values | {"interventions": None, "no_interventions": why}, ci95)
    agreement, agreement_ci95 = interventions.measure(
        lm, transcoder, contexts, scored, batch_tokens, resamples=resamples, group=group
    )
    note = {"note": NOTES[found]} if found in NOTES else {}
    values["interventions"] = {"basis": str(found), **note, **agreement}
    return Measured(values, ci95 | ({"interventions": agreement_ci95} if agreement_ci95 else {}))


_NOT_LIVE = "arch={} reads all layers at once, so that no later feature can respond to a change"


def _decoder_mass(
    transcoder: Transcoder,
    read: Callable[[Tensor], Tensor],
    scored: Tensor,
    batch_tokens: int,
    resamples: int,
    group: Group,
) -> tuple[dict[str, Any], dict[str, Any]]:
    why = decoder_mass.no_matrix(transcoder)
    if why is not None:
        return {"decoders": None, "written": None, "no_matrix": why}, {}
    context = torch.arange(len(scored)).repeat_interleave(scored.sum(dim=1))
    by_context = decoder_mass.by_context(transcoder, read, context, len(scored), batch_tokens, group)
    values = {
        "decoders": decoder_mass.shares(decoder_mass.of_decoders(transcoder)),
        "written": {"n_tokens": len(context), **decoder_mass.shares(by_context.sum(dim=0) / len(context))},
    }
    if not resamples:
        return values, {}
    own, total = by_context.diagonal(dim1=1, dim2=2).sum(dim=1), by_context.sum(dim=(1, 2))
    interval = bootstrap.ratio_interval(own, total, resamples)
    return values, {"written": {"own": interval and list(interval)}}
