"""Virtual weights between features: how much one would drive another, whatever the prompt.

    V[t, s] = W_enc_t . (what reaches t's layer of sum_m W_dec_s[m], m: the layers written before t reads)

along two kinds of path, each held so that it is linear (`paths.py`):

    residual     what is written stays at its position: no attention, the norm in front of t
    head l.h     what was written before layer l, through head h's values and output (W_O W_V, the norms around it), at
                 an attention of 1, and from there along the residual stream alone

t is an encoder row, so V is what a unit of s's activation adds to t's pre-activation. Norms are affine but for their
denominators, which depend on the prompt. The convention: each norm divides by one number, 1 over the mean of 1 / d on
the tokens that `typical` is given (position 0 apart), so that weights into different layers are of one scale. A skip
path of the transcoder counts as part of the residual path.

Of all pairs most interfere only on paper: their features are never active together. With activations a over the tokens
of a text, the same token for both (https://transformer-circuits.pub/2025/attribution-graphs/methods.html, global
weights):

    ERA[t, s]   = E[1(a_t > 0) a_s] V[t, s]         expected residual attribution
    TWERA[t, s] = E[a_t a_s] / E[a_t] V[t, s]       target-weighted

Heads move what they read to later tokens, so their weights are not reweighted.
"""

import heapq
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.data.models import LanguageModel
from pipeline.errors import UserError
from pipeline.interp import naming
from pipeline.interp.circuits import frozen, paths
from pipeline.interp.circuits.attribution import check_linear
from pipeline.interp.circuits.frozen import Gates
from pipeline.interp.circuits.paths import Target
from pipeline.interp.edits import chosen, decoder_rows, features_of
from pipeline.interp.replacement import ReplacementModel

RESIDUAL = "residual"


class Together(NamedTuple):
    """One feature f with every other one on the same n tokens. Sums in float64, each [S, F] but `own`."""

    n_tokens: int
    own: float
    """sum of a_f"""
    sums: Tensor
    """sum of a"""
    products: Tensor
    """sum of a_f a"""
    while_own: Tensor
    """sum of 1(a_f > 0) a"""
    own_while: Tensor
    """sum of a_f 1(a > 0)"""
    tokens: Tensor
    """int64: tokens at which both are active"""

    def era(self, is_target: bool) -> Tensor:
        """What V is multiplied by: f the target of all others, or the source. [S, F]"""
        return (self.while_own if is_target else self.own_while) / max(self.n_tokens, 1)

    def twera(self, is_target: bool) -> Tensor:
        """The same, weighted by the target; 0 where the target is never active. [S, F]"""
        targets = torch.full_like(self.sums, self.own) if is_target else self.sums
        return torch.where(targets > 0, self.products / targets.clamp(min=1e-30), 0.0)


class Weight(NamedTuple):
    """One virtual weight between the feature that was asked for and another."""

    path: str
    """`residual`, or `head 3.1`: the base model's layer, and the head."""
    layer: int
    feature: int
    weight: float
    era: float | None
    """None for heads, and where nothing was counted."""
    twera: float | None
    tokens: int | None
    """At which both are active."""


class Strongest(NamedTuple):
    """Of one feature. Along the residual stream by |TWERA| where features were counted, else by |V|; the heads' behind
    them, by |V|."""

    inputs: list[Weight]
    outputs: list[Weight]


@torch.no_grad()
def typical(lm: LanguageModel, tokens: Tensor) -> Gates:
    """Gates whose norms divide by 1 over the mean of 1 / d at positions >= 1 of tokens int64 [n, T]; their patterns say
    no more than which heads there are. UserError as `frozen.recording` raises."""
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise UserError("norms are measured behind position 0; give contexts of two tokens or more")
    found = frozen.record(lm, tokens)
    norms = {}
    for name, (norm, denominator) in found.norms.items():
        at = [axis for axis in range(1, denominator.dim()) if denominator.shape[axis] == tokens.shape[1]]
        inner = denominator.narrow(at[0], 1, tokens.shape[1] - 1) if len(at) == 1 else denominator
        norms[name] = (norm, inner.reciprocal().mean().reciprocal().view([1] * denominator.dim()))
    patterns = {name: torch.zeros_like(pattern[:1, :, :2, :2]) for name, pattern in found.patterns.items()}
    return Gates(patterns, norms)


@torch.no_grad()
def into(model: ReplacementModel, gates: Gates, layer: int, feature: int) -> Iterator[tuple[str, Tensor]]:
    """V of every feature as a source of one, path by path. gates: `typical`. -> (path, [S, F])"""
    check_feature(model, layer, feature)
    transcoder = model.transcoder
    last = model.lm.layers[layer]
    names, at_once = _paths(gates, last + 1)
    target = Target(layer, 1, transcoder.encoder_row(layer, feature))
    gradients = paths.effects(model.lm, transcoder, at_once, len(names), _two(model.lm), target).mlp_out[:, :, 1]
    for k, name in enumerate(names):
        read = gradients[k] - gradients[0] if k else gradients[0]
        found = torch.zeros(transcoder.n_sources, transcoder.d_features, dtype=read.dtype)
        for source in range(layer):
            for m in transcoder.targets(source):
                if m < layer:
                    found[source] += (transcoder.table(source, m).to(read) @ read[m]).cpu()
        yield name, found


@torch.no_grad()
def out_of(model: ReplacementModel, gates: Gates, layer: int, feature: int) -> Iterator[tuple[str, Tensor]]:
    """V of every feature as a target of one, path by path. -> (path, [S, F])"""
    check_feature(model, layer, feature)
    transcoder, lm = model.transcoder, model.lm
    names, at_once = _paths(gates, lm.n_base_layers)
    added = torch.zeros(lm.n_layers, 2, lm.d_model, dtype=transcoder.b_dec.dtype, device=transcoder.b_dec.device)
    added[:, 1] = decoder_rows(transcoder, layer, torch.tensor([feature]))[0]
    read = paths.responses(lm, transcoder, at_once, len(names), _two(lm), added)
    for k, name in enumerate(names):
        found = torch.zeros(transcoder.n_sources, transcoder.d_features, dtype=read[0].dtype)
        for target in range(layer + 1, lm.n_layers):
            x = read[target][k, 1] - read[target][0, 1] if k else read[target][0, 1]
            found[target] = (transcoder.encoder_rows(target).to(x) @ x).cpu()
        yield name, found


def strongest(
    model: ReplacementModel, gates: Gates, layer: int, feature: int, n: int = 10, together: Together | None = None
) -> Strongest:
    """The n strongest inputs and outputs of a feature along the residual stream, and n through heads. UserError for a
    feature that there is not."""
    lists = []
    for is_target, found in ((True, into), (False, out_of)):
        rows: list[Weight] = []
        through: list[Weight] = []
        for path, weights in found(model, gates, layer, feature):
            if path == RESIDUAL:
                rows = _ranked(path, weights, n, together, is_target)
            else:
                more = _ranked(path, weights, n, None, is_target)
                through = heapq.nlargest(n, through + more, key=lambda row: abs(row.weight))
        lists.append(rows + through)
    return Strongest(*lists)


@torch.no_grad()
def count(transcoder: Transcoder, batches: Iterable[Tensor], layer: int, feature: int) -> Together:
    """How a feature is active with all others. batches of what the transcoder reads, [B, L, D]"""
    shape = (transcoder.n_sources, transcoder.d_features)
    sums, products, while_own, own_while = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    tokens = torch.zeros(shape, dtype=torch.int64)
    n_tokens, total = 0, 0.0
    for x in batches:
        features = features_of(transcoder, x.to(transcoder.b_enc.device))
        pattern, values = chosen(features, layer)
        own = torch.zeros(len(x), dtype=torch.float64)
        here = (pattern.indices == feature).cpu()
        own[pattern.tokens.cpu()[here]] = values.double().cpu()[here]
        n_tokens, total = n_tokens + len(x), total + float(own.sum())
        for source in range(shape[0]):
            pattern, values = chosen(features, source)
            ids, at, a = pattern.indices.cpu(), pattern.tokens.cpu(), values.double().cpu()
            sums[source].index_add_(0, ids, a)
            products[source].index_add_(0, ids, a * own[at])
            while_own[source].index_add_(0, ids, a * (own[at] > 0))
            own_while[source].index_add_(0, ids, own[at])
            tokens[source].index_add_(0, ids, (own[at] > 0).long())
    return Together(n_tokens, total, sums, products, while_own, own_while, tokens)


def _ranked(path: str, weights: Tensor, n: int, together: Together | None, is_target: bool) -> list[Weight]:
    """The n largest by size, those of 0 left out."""
    factor = None if together is None else together.twera(is_target)
    score = weights.double() if factor is None else weights * factor
    ids = score.abs().flatten().topk(min(n, score.numel())).indices
    rows = []
    for i in ids[score.flatten()[ids] != 0].tolist():
        layer, feature = divmod(i, weights.shape[1])
        weight = float(weights[layer, feature])
        more: tuple[float | None, float | None, int | None] = (None, None, None)
        if together is not None:
            era, twera = (f(is_target)[layer, feature] * weight for f in (together.era, together.twera))
            more = (float(era), float(twera), int(together.tokens[layer, feature]))
        rows.append(Weight(path, layer, feature, weight, *more))
    return rows


def _paths(gates: Gates, n_base_layers: int) -> tuple[list[str], Gates]:
    """The residual path, then each head of so many layers by itself; and gates for all of them at once, position 1
    reading itself alone."""
    heads = [
        (layer, head, name)
        for layer, (name, pattern) in enumerate(gates.patterns.items())
        for head in range(pattern.shape[1])
        if layer < n_base_layers
    ]
    n = 1 + len(heads)
    patterns = {name: pattern.new_zeros(n, *pattern.shape[1:]) for name, pattern in gates.patterns.items()}
    for k, (_, head, name) in enumerate(heads, 1):
        patterns[name][k, head, 1, 1] = 1
    return [RESIDUAL, *(f"head {layer}.{head}" for layer, head, _ in heads)], Gates(patterns, gates.norms)


def _two(lm: LanguageModel) -> Tensor:
    """Any two tokens: only what is added to them counts."""
    return torch.zeros(1, 2, dtype=torch.int64, device=lm.device)


def check_feature(model: ReplacementModel, layer: int, feature: int) -> None:
    """UserError for a transcoder without virtual weights and for a feature that there is not."""
    transcoder = model.transcoder
    check_linear(transcoder)
    naming.check_there([(layer, feature)], transcoder.n_sources, transcoder.d_features)
