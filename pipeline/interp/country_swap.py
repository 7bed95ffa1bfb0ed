"""Swap the country: does the answer follow the features?

Prompts ask for a country's capital or language ("The capital of France is"). At the position of the country's name, the
features that tell countries apart are taken out and those of another country's prompt are put in; the answer at the end
of the prompt follows when it is the other country's. Which features do is found in other text, none of whose documents
holds one of the prompts: they are active on at least half of the tokens that name some country, and so for at most a
quarter of the countries.

In the original model, what the features write is swapped in the MLP outputs at that position,

    y^m(source) + (what the target's such features write to m) - (what the source's write to m)

for every layer m, put in place of the MLP's own output, which must not respond a second time; everything else is live.
In the replacement the features themselves are swapped, values from its own run on the target's prompt.

Beside both, in the original model in the same way:

    all_features     all that is active there is swapped, whatever it tells
    random_features  the difference between what all features write at two other tokens of other text, with the norm of
                     the swap in each layer
    exact_mlp        the MLP outputs themselves: what a perfect transcoder reaches

follows: share of the pairs that answer for the target. keeps: share that still answer for the source. active: features
at the position, mean over prompts, and swapped: those of them that are swapped. answered: prompts that are answered
rightly without a swap.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.core import bootstrap
from pipeline.core.metrics import Tree
from pipeline.core.pattern import Pattern, from_pairs
from pipeline.core.sparse import Sparse
from pipeline.data import world
from pipeline.data.world import SwapPair
from pipeline.interp.edits import Sides, features_of, written
from pipeline.interp.replacement import Basis, basis
from pipeline.interp.world_text import Mass
from pipeline.progress import Progress

N_PAIRS = 240
"""Of a relation, drawn from all ordered pairs of countries with different answers."""
ACTIVE_ON = 0.5
AT_MOST = 0.25


def tell_apart(mass: Mass) -> Tensor:
    """Which features tell countries apart. bool [S, F]"""
    n_countries = (mass.active_on() >= ACTIVE_ON).sum(dim=-1)
    return (n_countries >= 1) & (n_countries <= AT_MOST * mass.active_on().shape[-1])


class Asked(NamedTuple):
    """All prompts of a relation, and pairs of them."""

    tokens: Tensor
    """int64 [n_prompts, T]"""
    at: int
    """The country's position in every prompt."""
    source: Tensor
    """int64 [n]: numbers of prompts."""
    target: Tensor
    """int64 [n]"""
    answer: Tensor
    """int64 [n_prompts]: id of the right answer."""


def asked(sides: Sides, pairs: list[SwapPair], seed: int) -> Asked:
    """N_PAIRS of the pairs of one relation, all countries' prompts among them."""
    prompts = {p.source: p.source_answer for p in pairs}
    number = {prompt: i for i, prompt in enumerate(prompts)}
    tokenizer = sides.lm.tokenizer
    ids = torch.tensor(tokenizer(list(prompts), add_special_tokens=False)["input_ids"])
    answers = torch.tensor(tokenizer(list(prompts.values()), add_special_tokens=False)["input_ids"]).squeeze(1)
    (at,) = {p.position for p in pairs}
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:N_PAIRS]
    source, target = (torch.tensor([number[getattr(pairs[i], side)] for i in drawn]) for side in ("source", "target"))
    bos = torch.full((len(ids), 1), tokenizer.bos_token_id)
    return Asked(torch.cat([bos, ids], dim=1), at, source, target, answers)


@torch.inference_mode()
def measure(sides: Sides, tells: Tensor, others: Tensor, resamples: int = 0, seed: int = 0) -> tuple[Tree, Tree]:
    """By relation, and the intervals (resampled by source country). tells bool [S, F]: the features that tell countries
    apart; others [n, L, D]: what the transcoder reads at other tokens."""
    values: Tree = {}
    ci95: Tree = {}
    pairs, tells = world.swap_pairs(), tells.to(others.device)
    relations = list(dict.fromkeys(p.relation for p in pairs))
    with Progress(len(relations), "relation", "country swap") as bar:
        for relation in relations:
            ask = asked(sides, [p for p in pairs if p.relation == relation], seed)
            found, answers = _relation(sides, ask, tells, others, seed)
            values[relation] = found | {name: _scores(given, ask) for name, given in answers.items()}
            if resamples:
                ci95[relation] = {name: _intervals(given, ask, resamples) for name, given in answers.items()}
            bar.update(1)
    return values, ci95


def _relation(sides: Sides, ask: Asked, tells: Tensor, others: Tensor, seed: int) -> tuple[Tree, dict[str, Tensor]]:
    """(counts, the answers given to each pair under each change, int64 [n])"""
    state = sides.state(ask.tokens)
    x, mlp_out = state.x[:, ask.at], state.mlp_out[:, ask.at]
    every = features_of(sides.transcoder, x)
    telling = _kept(every, tells)
    own, all_own = (written(sides.transcoder, features, x) for features in (telling, every))
    change = own[ask.target] - own[ask.source]
    changes = {
        "features": change,
        "all_features": all_own[ask.target] - all_own[ask.source],
        "random_features": _as_long(_random(sides, others, len(change), seed), change),
        "exact_mlp": mlp_out[ask.target] - mlp_out[ask.source],
    }
    answers = {name: _swapped(sides, ask, mlp_out[ask.source] + delta) for name, delta in changes.items()}
    answered = {"original": _right(state.logits[:, -1].argmax(-1), ask.answer)}
    if basis(sides.transcoder) in (Basis.live, Basis.runs_the_mlp):
        answers["replacement"], unswapped = _replaced(sides, ask, tells)
        answered["replacement"] = _right(unswapped, ask.answer)
    active, swapped = (sum(int((v > 0).sum()) for v in f.values) / len(ask.tokens) for f in (every, telling))
    return {"n": len(ask.source), "answered": answered, "active": active, "swapped": swapped}, answers


def _swapped(sides: Sides, ask: Asked, output: Tensor) -> Tensor:
    """The model's answers with `output` [n, L, D] as the MLP outputs at the country's position. -> int64 [n]"""

    def put(layer: int, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, ask.at] = output[:, layer].to(out.dtype)
        return out

    return sides.original(ask.tokens[ask.source], put, last=True)[:, -1].argmax(-1)


def _replaced(sides: Sides, ask: Asked, tells: Tensor) -> tuple[Tensor, Tensor]:
    """The replacement's answers with the target's features for the source's, and those to the prompts as they are. ->
    int64 [n], [n_prompts]"""
    length = ask.tokens.shape[1]
    seen: list[tuple[Pattern, Tensor]] = []

    def read(layer: int, pattern: Pattern, values: Tensor) -> tuple[Pattern, Tensor]:
        seen.append((pattern, values))
        return pattern, values

    unswapped = sides.replaced(ask.tokens, choose=read, last=True)[:, -1].argmax(-1)

    def swap(layer: int, pattern: Pattern, values: Tensor) -> tuple[Pattern, Tensor]:
        theirs, amounts = seen[layer]
        # The target's features, for each pair that has this target.
        wanted = (theirs.tokens % length == ask.at) & tells[layer][theirs.indices]
        prompt = theirs.tokens[wanted] // length
        pair, entry = (prompt[None] == ask.target[:, None].to(prompt.device)).nonzero().unbind(1)
        stays = ~((pattern.tokens % length == ask.at) & tells[layer][pattern.indices])
        tokens = torch.cat([pattern.tokens[stays], pair * length + ask.at])
        order = tokens.argsort(stable=True)
        indices = torch.cat([pattern.indices[stays], theirs.indices[wanted][entry]])
        mixed = torch.cat([values[stays], amounts[wanted][entry]])
        return from_pairs(tokens[order], indices[order], pattern.n_tokens, pattern.n_features), mixed[order]

    return sides.replaced(ask.tokens[ask.source], choose=swap, last=True)[:, -1].argmax(-1), unswapped


def _kept(features: Sparse, mask: Tensor) -> Sparse:
    """The features that a mask bool [S, F] names, the others at 0."""
    assert all(pattern is not None for pattern in features.patterns)
    values = [
        values * mask[source][pattern.indices]
        for source, (pattern, values) in enumerate(zip(features.patterns, features.values, strict=True))
        if pattern is not None
    ]
    return Sparse(features.patterns, values)


def _random(sides: Sides, others: Tensor, n: int, seed: int) -> Tensor:
    """The difference between what all features write at two tokens. [n, L, D]"""
    first, second = np.random.default_rng([seed, 1]).integers(len(others), size=(2, n))
    out = written(sides.transcoder, features_of(sides.transcoder, others), others)
    return out[first] - out[second]


def _as_long(change: Tensor, like: Tensor) -> Tensor:
    """With the norm of `like` in each layer. [n, L, D]"""
    return change * like.norm(dim=2, keepdim=True) / change.norm(dim=2, keepdim=True).clamp(min=1e-12)


def _scores(given: Tensor, ask: Asked) -> dict[str, float]:
    return {"follows": _right(given, ask.answer[ask.target]), "keeps": _right(given, ask.answer[ask.source])}


def _intervals(given: Tensor, ask: Asked, resamples: int) -> dict[str, list[float] | None]:
    """Pairs with the same source are drawn together."""
    n = torch.bincount(ask.source).double()
    found = {}
    for name, side in (("follows", ask.target), ("keeps", ask.source)):
        right = torch.bincount(ask.source, weights=(given.cpu() == ask.answer[side]).double())
        interval = bootstrap.ratio_interval(right[n > 0], n[n > 0], resamples)
        found[name] = None if interval is None else list(interval)
    return found


def _right(given: Tensor, answer: Tensor) -> float:
    return float((given.cpu() == answer).double().mean())
