"""How good is a finished transcoder? Held-out text only, the model's units, sums in float64 (`core/metrics.py`).

Two rules are measured: the fixed thresholds, which graphs and exports use (the headline), and, where it is another
one, the rule of training (`exact`). A rule that looks at the batch has its L0 and FVU measured on shuffled batches of
training size and cannot replace anything live.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.metrics import Firing, Reconstruction, Tree, as_plain
from pipeline.core.metrics_predictions import Divergence, Predictions
from pipeline.core.sparse import sparsify
from pipeline.data.models import LanguageModel
from pipeline.dist import pieces
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.interp.replacement import NOTES, Basis, ReplacementModel, TeacherForced, ablated_logits
from pipeline.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Logits = Callable[[Tensor], Tensor]
Models = dict[str, ReplacementModel | TeacherForced]
"""By rule."""


Rows = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Row numbers int64 [B] -> x, y [B, L, D] float32, in the model's units: what the transcoder reads there, and what it
reconstructs."""


class HeldOut(NamedTuple):
    """Held-out text with its activations."""

    contexts: np.ndarray
    """int32 [n_contexts, T]"""
    n_rows: int
    """Tokens at positions >= 1 that are no padding, in context order."""
    read: Rows

    def context_of(self, rows: Tensor) -> Tensor:
        """Which context each row is of. int64 [B] -> [B]"""
        return rows // (self.contexts.shape[1] - 1)


class Fit(NamedTuple):
    """What the features of one rule are like, and how near they come."""

    firing: Firing
    reconstruction: Reconstruction

    def sums(self) -> dict[str, Tensor]:
        """Of each context, [C, ...]."""
        return self.reconstruction.sums() | self.firing.sums()

    def beside(self) -> Tree:
        """The numbers that are no ratios of sums over contexts: they have no interval."""
        return {
            "dead_fraction": self.firing.dead_fraction(),
            "bias": self.reconstruction.bias(),
            "dense_features": self.firing.dense_features(),
            "density_histogram": self.firing.density_histogram(),
        }


SPARSE_BELOW = 0.1
"""Features that are active at a smaller share of the pairs are decoded sparsely."""


@torch.no_grad()
def fit(model: Transcoder, held_out: HeldOut, batches: Iterator[Tensor], group: Group = ALONE) -> Fit:
    """Features and reconstruction of every row, once. `batches` are row numbers, and divided over the ranks."""
    every = list(batches)
    own = [every[i] for i in pieces.mine(len(every), group)]
    n_contexts = held_out.contexts.shape[0]
    origin = held_out.read(every[0])[1][0] if group.size > 1 else None
    firing = Firing(model.n_sources, model.d_features, n_contexts)
    reconstruction = Reconstruction(*model.dims, n_contexts, origin)
    device = model.b_enc.device
    with Progress(sum(map(len, own)), "tok", "features") as bar:
        for rows in own:
            x, y = held_out.read(rows)
            x = x.to(device)
            features = model.activate(x, need_pre_acts=False).features
            if isinstance(features, Tensor) and float((features > 0).float().mean()) < SPARSE_BELOW:
                features = sparsify(features)
            context = held_out.context_of(rows)
            firing.update(features, context)
            reconstruction.update(model.decode(features, x), y, context)
            bar.update(len(rows))
    for sums in (*firing.added(), *reconstruction.added()):
        pieces.added(sums, group, "fit")
    return Fit(firing, reconstruction)


def replacements(lm: LanguageModel, models: Models, y_mean: Tensor) -> dict[str, Logits]:
    """What takes the MLPs' place, by name: the transcoders, and zero and mean ablation as baselines."""
    return {
        **{name: model.logits for name, model in models.items()},
        "zero_ablation": partial(ablated_logits, lm, torch.zeros_like(y_mean)),
        "mean_ablation": partial(ablated_logits, lm, y_mean),
    }


def divergences(
    lm: LanguageModel,
    replaced: dict[str, Logits],
    contexts: np.ndarray,
    n_rows: int,
    batch_tokens: int,
    group: Group = ALONE,
) -> dict[str, Divergence]:
    """KL, top-1 agreement and delta CE of each replacement on the contexts, which are divided over the ranks. Position
    0 and padding are not scored."""
    results = {name: Divergence() for name in replaced}
    batches = scored_batches(contexts, n_rows, batch_tokens, group)
    with Progress(sum(batch.n_scored for batch in batches), "tok", "replace") as bar:
        for batch in batches:
            original = batch.predictions(lm.logits(batch.tokens))
            for name, logits in replaced.items():
                results[name].add(original, logits(batch.tokens))
            bar.update(batch.n_scored)
    return {name: joined(result, contexts.shape[1], group) for name, result in results.items()}


def joined(result: Divergence, length: int, group: Group) -> Divergence:
    """What all ranks measured, each on its own contexts of `length` tokens, in the order of the ranks."""
    if group.size == 1:
        return result
    return Divergence.of_rows(torch.cat(group.gather_ragged(result.rows(length), "predictions")))


class Batch(NamedTuple):
    """Some contexts, and what of them counts."""

    tokens: Tensor
    """int64 [n, T]"""
    scored: Tensor
    """bool [n, T]: not position 0, no padding."""

    @property
    def n_scored(self) -> int:
        return int(self.scored.sum())

    def predictions(self, original: Tensor) -> Predictions:
        """The original's logits [n, T, V], ready to be compared with others."""
        # The next token is known, and a row, except behind the last row of a context.
        has_next = self.scored & torch.cat([self.scored[:, 1:], torch.zeros_like(self.scored[:, :1])], dim=1)
        return Predictions(original, self.scored, self.tokens.roll(-1, dims=1), has_next)


def scored_batches(contexts: np.ndarray, n_rows: int, batch_tokens: int, group: Group = ALONE) -> list[Batch]:
    """Contexts int32 [C, T], of which `n_rows` positions are rows, some at a time: those batches that are this
    rank's."""
    tokens = torch.from_numpy(contexts.astype(np.int64))
    scored = valid_positions(tokens.shape[0], tokens.shape[1], n_rows)
    size = max(1, batch_tokens // tokens.shape[1])
    every = list(zip(tokens.split(size), scored.split(size), strict=True))
    return [Batch(*every[i]) for i in pieces.mine(len(every), group)]


def rule_metrics(
    fit: Fit, replaced: Divergence | None, basis: Basis | None, numbers: Tree, intervals: Tree | None
) -> Tree:
    """The numbers of one rule as they stand in metrics.json: `numbers` of `interp/contexts.py` and their intervals, and
    beside them those that have none."""
    tree: Tree = {**as_plain(numbers), **fit.beside()}
    tree["l0"] |= fit.firing.percentiles()
    if replaced is not None and basis is not None:
        note = {"note": NOTES[basis]} if basis in NOTES else {}
        tree["replacement"] = {"basis": str(basis), **note, **tree["replacement"], "kl_median": replaced.kl_median}
    return tree | {"ci95": intervals}


def worst_contexts(
    replaced: Divergence, contexts: np.ndarray, tokenizer: "PreTrainedTokenizerBase", n: int = 10
) -> list[dict[str, Any]]:
    """The contexts with the highest mean KL, highest first: number, mean KL, the text of each token up to the last that
    is scored, and the KL of each (None of position 0)."""
    kl, scored = replaced.per_token()
    mean = kl.sum(dim=1) / scored.sum(dim=1)
    found = []
    for context in mean.argsort(descending=True, stable=True)[:n].tolist():
        length = 1 + int(scored[context].nonzero().max())
        values = [
            value if is_scored else None for value, is_scored in zip(kl[context].tolist(), scored[context], strict=True)
        ]
        texts = [tokenizer.decode([token]) for token in contexts[context, :length].tolist()]
        found.append({"context": context, "kl": float(mean[context]), "tokens": texts, "kl_per_token": values[:length]})
    return found


def valid_positions(n_contexts: int, context: int, n_rows: int) -> Tensor:
    """Which positions are rows: all but position 0, up to the last row. bool [n_contexts, T]"""
    row = torch.arange(n_contexts)[:, None] * (context - 1) + torch.arange(context)[None] - 1
    valid = row < n_rows
    valid[:, 0] = False
    return valid
