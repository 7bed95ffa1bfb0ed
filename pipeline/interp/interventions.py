"""Do features do in the replacement what they do in the model? Single features are removed from both.

At position t of a held-out context, feature i of layer l is active with value a, taken from the original model's
activations there. What it writes is removed at that position, in every layer m >= l that it writes,

    d^m = -a W_dec,i^{l -> m}

from the MLP outputs of the original model, and from the reconstructions of the replacement: the same change to both,
each with everything else live. An effect is the change of the logits, less its mean over the vocabulary, at positions t
to t + 7 (or to the end of the context). r is an effect in the replacement, o the one in the original:

    replacement   r in the replacement as it is used, without error terms
    with_errors   r in the replacement with its errors on the same text (MLP output minus reconstruction) added back as
                  constants, so that both models start from the same state
    mediated      that r and o, each less the direct effect, which is that of d while all MLP outputs stand still. What
                  remains is what later MLPs make of the change, and what later features do. Not for the last layer
    mlps_frozen   r is the direct effect alone, for comparison: what agrees although no later feature responds

For each, over n interventions:

    cosine            mean of r.o / |r||o|; 0 where one of them is 0, left out where both are
    slope             sum r.o / sum o.o: 1 is the same size, below 1 the replacement responds too little
    r2                1 - sum |r - o|^2 / sum |o|^2: nothing is fitted, so it can be below 0
    rank_correlation  Spearman's, of |r| and |o|
    shuffled          mean cosine with the r of another intervention in the same layer: what chance gives
    per_layer         cosine and slope by the layer of the feature
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core import bootstrap
from pipeline.core.sparse import Chosen
from pipeline.data.models import LanguageModel
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.interp.edits import Sides, chosen, features_of, one_each, written
from pipeline.interp.replacement import put_back
from pipeline.progress import Progress

N_INTERVENTIONS = 128
POSITIONS = 8
"""Of an effect: that of the intervention and the next ones."""
PARTS = 4
"""Interventions of a batch are made in so many lots, by position: what follows the last effect is not computed."""

COMPARED = ("replacement", "with_errors", "mediated", "mlps_frozen")
COLUMNS = ("n", "cosine", "rr", "oo", "ro", "shuffled")

Effects = dict[str, tuple[Tensor, Tensor]]
"""(r, o) of each of COMPARED: float64 [n, POSITIONS V]."""


class Where(NamedTuple):
    """One feature in each of n contexts."""

    context: Tensor
    """int64 [n], on the CPU: row of the batch."""
    position: Tensor
    """The same."""
    feature: Tensor
    """int64 [n]"""
    value: Tensor
    """[n]"""


class Done(NamedTuple):
    """Interventions of one layer, compared."""

    context: Tensor
    """int64 [n]: of the evaluation text."""
    sums: dict[str, Tensor]
    """For each of COMPARED float64 [n, COLUMNS]."""


@torch.inference_mode()
def measure(
    lm: LanguageModel,
    transcoder: Transcoder,
    contexts: np.ndarray,
    scored: Tensor,
    batch_tokens: int,
    n: int = N_INTERVENTIONS,
    factor: float = -1.0,
    resamples: int = 0,
    seed: int = 0,
    group: Group = ALONE,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The agreement of n interventions, as many in each layer, and its intervals (resampled contexts). Layers are
    divided over the ranks. contexts int32
    [n_contexts, T]; scored bool, the same shape: which positions are rows. Contexts come in a random order, again from
    the first once all were used. `factor` times what the feature writes is added: -1 removes it, 1 doubles it. The
    transcoder must be able to run live."""
    sides, n_layers = Sides(lm, transcoder), transcoder.dims.n_layers
    order = np.random.default_rng(seed).permutation(len(contexts))
    each = -(-n // n_layers)
    mine = range(group.rank, n_layers, group.size)
    found = {}
    with Progress(len(mine), "layer", "interventions") as bar:
        for layer in mine:
            own = range(layer * each, (layer + 1) * each)
            found[layer] = _of_layer(sides, contexts, scored, layer, order, own, batch_tokens, factor)
            bar.update(1)
    done = _of_all(found, n_layers, group)
    values: dict[str, Any] = {"n": sum(len(d.context) for d in done), "positions": POSITIONS}
    ci95: dict[str, Any] = {}
    for name in COMPARED:
        layers = done[:-1] if name == "mediated" else done
        values[name] = _agreement([d.sums[name] for d in layers]) if layers else None
        if layers and resamples:
            ci95[name] = _intervals([d.context for d in layers], [d.sums[name] for d in layers], resamples, seed)
    return values, ci95


def _of_all(found: dict[int, Done], n_layers: int, group: Group) -> list[Done]:
    """Every layer's, from those of this rank."""
    if group.size == 1:
        return [found[layer] for layer in range(n_layers)]
    width = len(COLUMNS)
    rows = [torch.zeros(0, 2 + len(COMPARED) * width, dtype=torch.float64)]
    for layer, done in found.items():
        names = torch.stack([torch.full_like(done.context, layer), done.context], dim=1)
        rows.append(torch.cat([names.double(), *(done.sums[name] for name in COMPARED)], dim=1))
    every = torch.cat(group.gather_ragged(torch.cat(rows), "interventions"))
    by_layer = [every[every[:, 0] == layer] for layer in range(n_layers)]
    # Contiguous, so that sums over them come out as those of one process.
    sums = [[part.contiguous() for part in own[:, 2:].split(width, dim=1)] for own in by_layer]
    named = (dict(zip(COMPARED, parts, strict=True)) for parts in sums)
    return [Done(own[:, 1].long(), parts) for own, parts in zip(by_layer, named, strict=True)]


def _of_layer(
    sides: Sides,
    contexts: np.ndarray,
    scored: Tensor,
    layer: int,
    order: np.ndarray,
    numbers: range,
    batch_tokens: int,
    factor: float,
) -> Done:
    """The interventions `numbers`, in batches."""
    size = max(1, batch_tokens // contexts.shape[1])
    taken, effects = [], []
    for start in range(numbers.start, numbers.stop, size):
        ids = range(start, min(start + size, numbers.stop))
        rows = order[np.array(ids) % len(order)]
        tokens = torch.from_numpy(contexts[rows].astype(np.int64))
        kept, found = _effects(sides, tokens, scored[rows], layer, ids, factor)
        taken.append(torch.from_numpy(rows)[kept])
        effects.append(found)
    sums = {}
    for name in COMPARED:
        r, o = (torch.cat([found[name][side] for found in effects]) for side in (0, 1))
        sums[name] = _compared(r, o)
    return Done(torch.cat(taken), sums)


def _effects(
    sides: Sides, tokens: Tensor, scored: Tensor, layer: int, ids: range, factor: float
) -> tuple[Tensor, Effects]:
    """Of one feature of the layer in each context; ids seed the draws. -> (rows where one was active [n], effects)"""
    state = sides.state(tokens)
    x = state.x.flatten(0, 1)
    features = features_of(sides.transcoder, x)
    error = state.mlp_out - sides.transcoder.decode(features, x).view(state.mlp_out.shape)
    where = _draw(chosen(features, layer), scored, ids)
    rows = where.context
    one = one_each(sides.transcoder, layer, where.feature, where.value)
    change = factor * written(sides.transcoder, one, state.x[rows, where.position])
    planned = Planned(
        tokens[rows], scored[rows], state.logits[rows], state.mlp_out[rows], error[rows], where.position, change
    )
    order = where.position.argsort(stable=True)
    found = [_compare(sides, planned.some(few)) for few in order.chunk(PARTS)]
    back = order.argsort()
    both = {name: [torch.cat([part[name][side] for part in found])[back] for side in (0, 1)] for name in COMPARED}
    return rows, {name: (r, o) for name, (r, o) in both.items()}


class Planned(NamedTuple):
    """n interventions, with the state of the original model that they are made on."""

    tokens: Tensor
    """int64 [n, T]"""
    scored: Tensor
    """bool [n, T]"""
    logits: Tensor
    """[n, T, V]"""
    mlp_out: Tensor
    """[n, T, L, D]"""
    error: Tensor
    """[n, T, L, D]: mlp_out minus the reconstruction."""
    position: Tensor
    """int64 [n]"""
    change: Tensor
    """[n, L, D]: what is added to the MLP outputs at that position."""

    def some(self, which: Tensor) -> "Planned":
        """Those of which int64 [k] names the rows, as far as their effects are looked at."""
        length = int(self.position[which].max()) + POSITIONS
        tokens, scored, logits, mlp_out, error = (part[which, :length] for part in self[:5])
        return Planned(tokens, scored, logits, mlp_out, error, self.position[which], self.change[which])


def _compare(sides: Sides, planned: Planned) -> Effects:
    tokens, scored, logits, mlp_out, error, position, change = planned
    at = torch.arange(len(position)), position

    def changed(m: int, out: Tensor) -> Tensor:
        out = out.clone()
        out[at] += change[:, m].to(out.dtype)
        return out

    def effect(after: Tensor, before: Tensor) -> Tensor:
        return _effect(after, before, position, scored)

    original = sides.original(tokens, changed)
    direct = mlp_out.clone()
    direct[at] += change.to(direct.dtype)
    frozen = put_back(sides.lm, direct, tokens)
    with_errors = sides.replaced(tokens, lambda m, y_hat: changed(m, y_hat + error[:, :, m]))
    total = effect(original, logits)
    return {
        "replacement": (effect(sides.replaced(tokens, changed), sides.replaced(tokens)), total),
        "with_errors": (effect(with_errors, logits), total),
        "mediated": (effect(with_errors, frozen), effect(original, frozen)),
        "mlps_frozen": (effect(frozen, logits), total),
    }


def _draw(one: Chosen, scored: Tensor, ids: range) -> Where:
    """One of the features that are active at scored positions of each context, all alike; contexts without one are
    left out. scored bool [n, T]"""
    pattern, values = one
    length = scored.shape[1]
    active = (values > 0) & scored.flatten().to(values.device)[pattern.tokens]
    entries = active.nonzero().squeeze(1)
    edges = torch.searchsorted(pattern.tokens[entries].cpu(), length * torch.arange(len(ids) + 1)).tolist()
    # A generator for each intervention, so that how they are batched does not matter.
    picked = [
        first + int(np.random.default_rng(number).integers(last - first))
        for number, first, last in zip(ids, edges, edges[1:], strict=False)
        if last > first
    ]
    entry = entries[picked]
    token = pattern.tokens[entry]
    return Where(token.cpu() // length, token.cpu() % length, pattern.indices[entry], values[entry])


def _effect(after: Tensor, before: Tensor, position: Tensor, scored: Tensor) -> Tensor:
    """Logits [n, T, V] after less before at `position` [n] and the next ones, less their mean over the vocabulary; 0
    where nothing is scored. -> float64 [n, POSITIONS V]"""
    at = position[:, None] + torch.arange(POSITIONS)
    rows = torch.arange(len(at))[:, None]
    inside = at < scored.shape[1]
    at = at.clamp(max=scored.shape[1] - 1)
    inside &= scored[rows, at]
    change = (after[rows, at].double() - before[rows, at].double()).cpu()
    return ((change - change.mean(dim=-1, keepdim=True)) * inside[:, :, None]).flatten(1)


def _compared(r: Tensor, o: Tensor) -> Tensor:
    """What is summed of each pair of effects [n, N], with another's r for `shuffled`. -> [n, COLUMNS]"""
    rr, oo, ro = (r * r).sum(1), (o * o).sum(1), (r * o).sum(1)
    either = (rr > 0) | (oo > 0)
    other = r.roll(1, dims=0)
    shuffled = (other * o).sum(1) / (rr.roll(1) * oo).sqrt()
    cosine = ro / (rr * oo).sqrt()
    return torch.stack([either.double(), cosine.nan_to_num(0.0), rr, oo, ro, shuffled.nan_to_num(0.0)], dim=1)


def _numbers(sums: Tensor) -> dict[str, Tensor]:
    """Of sums [..., COLUMNS]; NaN where they say nothing."""
    n, cosine, rr, oo, ro, shuffled = sums.unbind(-1)
    r2 = 1 - (rr - 2 * ro + oo) / oo
    return {"cosine": cosine / n, "slope": ro / oo, "r2": r2, "shuffled": shuffled / n}


def _agreement(layers: list[Tensor]) -> dict[str, Any]:
    """[n, COLUMNS] of each layer."""
    every = torch.cat(layers)
    by_layer = _numbers(torch.stack([layer.sum(dim=0) for layer in layers]))
    return {
        "n": int(every[:, 0].sum()),
        **{name: _plain(value) for name, value in _numbers(every.sum(dim=0)).items()},
        "rank_correlation": _rank_correlation(every[:, COLUMNS.index("rr")], every[:, COLUMNS.index("oo")]),
        "per_layer": {name: [_plain(v) for v in by_layer[name]] for name in ("cosine", "slope")},
    }


def _intervals(contexts: list[Tensor], layers: list[Tensor], resamples: int, seed: int) -> dict[str, Any]:
    """[low, high] of what `_numbers` gives, contexts drawn anew."""
    used, place = torch.cat(contexts).unique(return_inverse=True)
    every = torch.cat(layers)
    sums = every.new_zeros(len(used), every.shape[1]).index_add_(0, place, every)
    if len(used) < 2:
        return {}
    drawn = _numbers(bootstrap.resample({"sums": sums}, resamples, seed)["sums"])
    return {name: [_plain(v) for v in bootstrap.interval(values)] for name, values in drawn.items()}


def _rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Of sizes that hardly ever tie. None of fewer than two."""
    if len(first) < 2:
        return None
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _plain(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else number
