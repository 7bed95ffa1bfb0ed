"""What it costs to replace one layer, the layers up to one, and those from one on.

For each layer l: `only` l, `up_to` l (layers <= l) and `from` l (layers >= l), live and teacher-forced
(`interp/replacement.py` says what each is). KL, top-1 agreement and the rise in cross-entropy of each are those of
`core/metrics_predictions.py`, on fewer contexts than the rest of an evaluation: a curve is read for its shape.

Work is shared where the results are the same: the original runs once on each batch; features below the first replaced
layer are the original's; a layer alone is the same live and teacher-forced; and all layers are `from` 0 as well as
`up_to` the last. So L layers take 5 L - 6 forward passes of a batch and one of the original, in place of 6 L.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.metrics_predictions import Divergence
from pipeline.data.models import LanguageModel
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.interp.evaluation import joined, scored_batches
from pipeline.interp.original import Original, read_original
from pipeline.interp.replacement import Live, ReplacementModel, TeacherForced, put_back, replacement
from pipeline.progress import Progress

Key = tuple[bool, tuple[int, ...]]
"""(teacher-forced?, the replaced layers): one replacement that is measured."""

Curves = dict[str, list[Key]]
"""only, up_to and from -> what is replaced at each layer."""


@torch.inference_mode()
def measure(
    lm: LanguageModel,
    transcoder: Transcoder,
    contexts: np.ndarray,
    n_rows: int,
    batch_tokens: int,
    n_contexts: int,
    group: Group = ALONE,
) -> dict[str, Any]:
    """The curves on the first `n_contexts` of `contexts` int32 [C, T], of which `n_rows` positions are rows; they are
    divided over the ranks. `live` is None for an acausal architecture. UserError where nothing can be replaced.

    -> {n_tokens, n_contexts, live: {only, up_to, from: [L] of {kl, top1, delta_ce}}, teacher_forced: {the same}}
    """
    contexts = contexts[:n_contexts]
    n_rows = min(n_rows, len(contexts) * (contexts.shape[1] - 1))
    model = replacement(lm, transcoder)
    live = plan(lm.n_layers, forced=False) if transcoder.causal else {}
    curves: dict[str, Curves] = {"live": live, "teacher_forced": plan(lm.n_layers, forced=True)}
    keys = sorted({key for curve in curves.values() for points in curve.values() for key in points})
    results = {key: Divergence() for key in keys}
    batches = scored_batches(contexts, n_rows, batch_tokens, group)
    with Progress(sum(batch.n_scored for batch in batches), "tok", "curves") as bar:
        for batch in batches:
            original = read_original(lm, model.site, model.norm, batch.tokens)
            predictions = batch.predictions(original.logits)
            for key, logits in zip(keys, replaced(model, original, batch.tokens, keys), strict=True):
                results[key].add(predictions, logits)
            bar.update(batch.n_scored)
    results = {key: joined(result, contexts.shape[1], group) for key, result in results.items()}
    found: dict[str, Any] = {"n_tokens": n_rows, "n_contexts": len(contexts)}
    for name, curve in curves.items():
        points = {which: [_numbers(results[key]) for key in subsets] for which, subsets in curve.items()}
        found[name] = points or None
    return found


def plan(n_layers: int, forced: bool) -> Curves:
    """What is replaced at each point of each curve; the same key where the result is the same."""
    layers = range(n_layers)
    subsets: dict[str, list[tuple[int, ...]]] = {
        "only": [(l,) for l in layers],
        "up_to": [tuple(layers[: l + 1]) for l in layers],
        "from": [tuple(layers[l:]) for l in layers],
    }
    # A layer alone reads a stream in which nothing has changed.
    return {which: [(forced or len(s) == 1, s) for s in points] for which, points in subsets.items()}


def replaced(
    model: ReplacementModel | TeacherForced, original: Original, tokens: Tensor, keys: Iterable[Key]
) -> Iterator[Tensor]:
    """The logits [n, T, V] of each key, one after the other. tokens int64 [n, T]"""
    if isinstance(model, TeacherForced):
        features, y_hat = [], model.y_hat(original)
    else:
        at_original = model.at_original(original)
        features, y_hat = at_original.features, torch.stack(at_original.y_hat, dim=2)
    for forced, layers in keys:
        if forced:
            yield put_back(model.lm, y_hat, tokens, layers)
        else:
            assert isinstance(model, ReplacementModel)
            live = Live(model, layers, known=features[: min(layers)])
            yield model.lm.logits(tokens, live, own_at_0=live.unread())


def _numbers(result: Divergence) -> dict[str, float | None]:
    found = {"kl": result.kl, "top1": result.top1, "delta_ce": result.delta_ce}
    return {name: None if math.isnan(value) else value for name, value in found.items()}
