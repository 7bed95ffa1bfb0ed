"""What features do to predictions, for pictures: their effect on a logit, and probabilities as they are turned up and
down. Both by interventions (`intervene.py`) on the original model, live attention and norms."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.interp.plots.plot_data import Entries, Feature
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering.feature_edits import Edit, Where
from pipeline.interp.steering.intervene import intervene
from pipeline.interp.steering.intervene_options import InterveneOptions, Response

CANDIDATES = 4
"""Times as many active features are taken away as are shown."""


class Effect(NamedTuple):
    """Of one active feature at one token."""

    feature: Feature
    position: int
    value: float
    """Activation."""
    importance: float
    effect: float
    """Of the token's logit, less its mean over the vocabulary, with the feature minus without it."""


def effects(
    model: ReplacementModel, tokens: Tensor, found: Entries, token: int, n: int, response: Response,
    only: list[Feature] | None = None,
) -> list[Effect]:  # fmt: skip
    """Of the active features with the highest importance, CANDIDATES n of them; the n with the largest effect on the
    logit of `token` behind the last one, the largest first."""
    order = np.argsort(-found.importance, kind="stable")
    if only is not None:
        mine = set(only)
        order = order[[(int(found.layer[i]), int(found.feature[i])) in mine for i in order.tolist()]]
    order = order[: CANDIDATES * n]
    if not len(order):
        return []
    places = [(int(found.layer[i]), int(found.feature[i]), int(found.token[i])) for i in order.tolist()]
    edits = [[Edit(layer, feature, Where((position,)), 0.0, 0.0)] for layer, feature, position in places]
    done = intervene(model, tokens, edits, InterveneOptions(layers=response))
    before, after = (_demeaned(logits[:, -1], token) for logits in (done.before.logits, done.logits))
    measured = [
        Effect((layer, feature), position, float(found.value[i]), float(found.importance[i]), change)
        for (layer, feature, position), i, change in zip(places, order.tolist(), (before - after).tolist(), strict=True)
    ]
    return sorted(measured, key=lambda one: -abs(one.effect))[:n]


class Turned(NamedTuple):
    """A feature's activation times each of the factors, wherever it is active."""

    feature: Feature
    positions: tuple[int, ...]
    probabilities: Tensor
    """[factors, V] behind the last token"""


def turned(
    model: ReplacementModel, tokens: Tensor, found: Entries, features: list[Feature], factors: list[float],
    response: Response,
) -> list[Turned]:  # fmt: skip
    """Of the features that are active on the prompt."""
    answer = []
    for layer, feature in features:
        here = (found.layer == layer) & (found.feature == feature)
        positions = tuple(sorted(found.token[here].tolist()))
        if not positions:
            continue
        edits = [[Edit(layer, feature, Where(positions), factor, 0.0)] for factor in factors]
        done = intervene(model, tokens, edits, InterveneOptions(layers=response))
        answer.append(Turned((layer, feature), positions, done.logits[:, -1].float().softmax(dim=-1).cpu()))
    return answer


def moving(turned_ones: list[Turned], n: int) -> list[Turned]:
    """The n whose factors move the probabilities most (half the sum of differences between the first and the last)."""
    moved = [float((one.probabilities[0] - one.probabilities[-1]).abs().sum()) for one in turned_ones]
    order = sorted(range(len(moved)), key=lambda i: -moved[i])[:n]
    return [turned_ones[i] for i in order]


def _demeaned(logits: Tensor, token: int) -> Tensor:
    logits = logits.double()
    return logits[:, token] - logits.mean(dim=-1)


def followed(turned_ones: list[Turned], unchanged: Tensor, n: int, more: int) -> list[int]:
    """The n tokens that are most likely without a change, [V], and `more` whose probability changes most."""
    best = unchanged.topk(n).indices.tolist()
    change = torch.stack([(one.probabilities - unchanged).abs().amax(dim=0) for one in turned_ones]).amax(dim=0)
    change[best] = -1
    return [*best, *change.topk(more).indices.tolist()]
