"""What an intervention changed: the next token, every position's distribution, and later features."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.interp.generation import token_kl
from pipeline.interp.steering.feature_edits import Compiled, Values
from pipeline.interp.steering.intervene import Intervened

NOTHING = 1e-4
"""Of the layer's largest activation on the prompt: smaller changes are not counted, since a pass of another batch size
rounds otherwise."""


class Change(NamedTuple):
    """One activation, before and after."""

    layer: int
    feature: int
    position: int
    before: float
    after: float

    @property
    def kind(self) -> str:
        if self.before == 0:
            return "appears"
        return "vanishes" if self.after == 0 else "changes"


def kl(found: Intervened) -> Tensor:
    """KL(before || after) in nats at each position. -> float64 [n, T]"""
    before = found.before.logits[0].float().cpu()
    return torch.stack([token_kl(before, after.float().cpu()) for after in found.logits])


def tokens(found: Intervened, row: int, top: int, chosen: Iterable[int] = ()) -> list[dict[str, Any]]:
    """The next token at the last position: the `chosen` ones, then those whose probability changes most."""
    before, after = (side[-1].double().cpu() for side in (found.before.logits[0], found.logits[row]))
    p, q = before.softmax(-1), after.softmax(-1)
    movers = (q - p).abs().topk(min(top, len(p))).indices.tolist()
    return [
        {
            "token": token,
            "logit": [float(before[token]), float(after[token])],
            "probability": [float(p[token]), float(q[token])],
        }
        for token in dict.fromkeys([*chosen, *movers])
    ]


def made(found: Intervened, row: int) -> list[Change]:
    """What the edits name, by layer, position and feature: before, and as it was decoded after."""
    length, changes = found.tokens.shape[1], list[Change]()
    for layer, named in sorted(_named(found, row).items()):
        before, after = _flat(found.before.features[layer], 0, length), _flat(found.edited[layer], row, length)
        width = found.edited[layer][0].n_features
        changes += [
            Change(layer, key % width, key // width, before.get(key, 0.0), after.get(key, 0.0)) for key in sorted(named)
        ]
    return changes


def features(found: Intervened, row: int) -> list[Change]:
    """What else is active otherwise than before, in the stream as it is after the edits; the largest changes first.
    Position 0 is left out."""
    length, named, changes = found.tokens.shape[1], _named(found, row), []
    for layer, old in enumerate(found.before.features):
        before, after = _flat(old, 0, length), _flat(found.read[layer], row, length)
        least = NOTHING * float(old[1].max()) if old[1].numel() else 0.0
        width = old[0].n_features
        for key in (before.keys() | after.keys()) - named.get(layer, set()):
            a, b = before.get(key, 0.0), after.get(key, 0.0)
            if abs(b - a) > least and key >= width:
                changes.append(Change(layer, key % width, key // width, a, b))
    return sorted(changes, key=lambda one: (-abs(one.after - one.before), one))


def _named(found: Intervened, row: int) -> dict[int, set[int]]:
    """By layer, position F + feature of what is edited."""
    length = found.tokens.shape[1]
    maps = Compiled([found.interventions[row]], length, 0, length, found.edited[0][0].n_features).maps
    return {layer: set(of) for layer, of in maps.items()}


def _flat(values: Values, row: int, length: int) -> dict[int, float]:
    """position F + feature -> activation, of one row."""
    pattern, amounts = values
    first, last = (int(pattern.offsets[token]) for token in (row * length, (row + 1) * length))
    keys = (pattern.tokens[first:last] - row * length) * pattern.n_features + pattern.indices[first:last]
    return dict(zip(keys.tolist(), amounts[first:last].tolist(), strict=True))
