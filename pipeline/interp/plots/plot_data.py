"""The numbers behind the pictures of features (`clt plot`): what is active on a prompt, and what correlates.

The importance of an active feature is its activation times its decoder norm (all target layers together): the length
of what it writes.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.interp.dashboards.feature_text import FeatureText
from pipeline.interp.edits import Sides, chosen, features_of

Feature = tuple[int, int]
"""(layer, number in the layer)"""

MOST_PER_LAYER = 1024
"""Features of a layer that are correlated with those of others: the most frequent ones."""
ALIKE = 0.7
LEAST_ACTIVE = 10
"""Tokens at which a feature is active before its correlations count."""


class Entries(NamedTuple):
    """Active features at tokens: the entries of a sparse table."""

    token: NDArray[np.int64]
    layer: NDArray[np.int64]
    feature: NDArray[np.int64]
    value: NDArray[np.float32]
    importance: NDArray[np.float32]

    def strongest(self, n: int) -> list[Feature]:
        """n features with a high importance: in turn the first one of each token, the second one, and so on."""
        order = np.lexsort((-self.importance, self.token))
        starts = np.flatnonzero(np.diff(self.token[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        turns = order[np.lexsort((-self.importance[order], rank))].tolist()
        found = dict.fromkeys((int(self.layer[i]), int(self.feature[i])) for i in turns)
        return list(found)[:n]

    def table(self, features: list[Feature], n_tokens: int) -> NDArray[np.float32]:
        """Activations [features, n_tokens]."""
        row = {feature: i for i, feature in enumerate(features)}
        found = np.zeros((len(features), n_tokens), dtype=np.float32)
        for token, layer, feature, value in zip(*self[:4], strict=True):
            i = row.get((int(layer), int(feature)))
            if i is not None:
                found[i, token] = value
        return found


def norms(transcoder: Transcoder) -> Tensor:
    """Of each feature's decoder rows together; 1 where features write no fixed direction. [S, F]"""
    if transcoder.directions:
        return transcoder.decoder_norms()
    return torch.ones(transcoder.n_sources, transcoder.d_features, device=transcoder.b_enc.device)


@torch.inference_mode()
def entries(sides: Sides, tokens: Tensor) -> Entries:
    """Of a prompt, int64 [1, T], on the original model's activations; none at position 0."""
    return of_inputs(sides.transcoder, sides.state(tokens).x[0], skip_first=True)


@torch.inference_mode()
def of_inputs(transcoder: Transcoder, x: Tensor, skip_first: bool = False) -> Entries:
    """Of what the transcoder reads, [B, L, D]."""
    features, size = features_of(transcoder, x), norms(transcoder)
    parts: list[tuple[Tensor, ...]] = []
    for source in range(transcoder.n_sources):
        pattern, values = chosen(features, source)
        layer = torch.full_like(pattern.indices, source)
        parts.append((pattern.tokens, layer, pattern.indices, values, values * size[source][pattern.indices]))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    kept = columns[0] > 0 if skip_first else np.ones(len(columns[0]), dtype=np.bool_)
    return Entries(*(column[kept] for column in columns))


class Correlated(NamedTuple):
    """Pearson correlations of activations over tokens, those where a feature is not active included."""

    best: NDArray[np.float64]
    """[S, S]: mean over the features of a layer (row) of their highest correlation with one of another (column); NaN
    where a layer has no feature that is active often enough, and on the diagonal of a layer with one."""
    features: list[Feature]
    """By layer; within it those that correlate stand together."""
    matrix: NDArray[np.float64]
    """[features, features]"""


@torch.inference_mode()
def correlations(transcoder: Transcoder, text: FeatureText, features: list[Feature] | None, n: int) -> Correlated:
    """features: those of the matrix; None: the n that write most, equally many of each layer, without those that are
    nearly the same as one before in their layer (a correlation above ALIKE)."""
    standard, ids, weight = [], [], []
    activations = [_dense(transcoder, text, source) for source in range(transcoder.n_sources)]
    size = norms(transcoder).cpu()
    for source, (mine, values) in enumerate(activations):
        ids.append(mine)
        weight.append((values * size[source][mine]).sum(dim=0))
        centred = values - values.mean(dim=0)
        standard.append(centred / centred.norm(dim=0).clamp(min=1e-12))
    best = np.array([[_best(one, other, one is other) for other in standard] for one in standard])
    if features is None:
        each = max(1, n // transcoder.n_sources)
        picked = [_unlike(standard[s], weight[s], each) for s in range(transcoder.n_sources)]
        features = [(s, int(ids[s][i])) for s, places in enumerate(picked) for i in places]
    place = {(s, int(f)): i for s, mine in enumerate(ids) for i, f in enumerate(mine.tolist())}
    features = [feature for feature in features if feature in place]
    columns = torch.stack([standard[s][:, place[s, f]] for s, f in features]) if features else torch.zeros(0, 1)
    order = _together([s for s, _ in features], columns)
    columns = columns[order]
    return Correlated(best, [features[i] for i in order], (columns @ columns.T).double().numpy())


def _dense(transcoder: Transcoder, text: FeatureText, source: int) -> tuple[Tensor, Tensor]:
    """(the features of a source that are active often enough, the most frequent ones, [m]; activations [B, m])"""
    blocks = [chosen(features_of(transcoder, text.read(block)), source) for block in text.blocks()]
    counts = sum((torch.bincount(p.indices.cpu(), minlength=p.n_features) for p, _ in blocks), torch.zeros(1))
    order = counts.argsort(descending=True, stable=True)[:MOST_PER_LAYER]
    mine = order[counts[order] >= LEAST_ACTIVE].sort().values
    place = torch.full((transcoder.d_features,), -1)
    place[mine] = torch.arange(len(mine))
    found, first = torch.zeros(text.n_rows, len(mine)), 0
    for pattern, values in blocks:
        column = place[pattern.indices.cpu()]
        kept = column >= 0
        found[first + pattern.tokens.cpu()[kept], column[kept]] = values.float().cpu()[kept]
        first += pattern.n_tokens
    return mine, found


def _unlike(standard: Tensor, weight: Tensor, n: int) -> list[int]:
    """The n columns of [B, m] with the highest weight that are unlike those before them."""
    found: list[int] = []
    for i in weight.argsort(descending=True, stable=True).tolist():
        if len(found) < n and (not found or float((standard[:, found].T @ standard[:, i]).max()) <= ALIKE):
            found.append(i)
    return found


def _best(one: Tensor, other: Tensor, same: bool) -> float:
    products = one.T @ other
    if same:
        products.fill_diagonal_(-1)
    if products.shape[0] == 0 or products.shape[1] <= int(same):
        return float("nan")
    return float(products.amax(dim=1).mean())


def _together(layer: list[int], columns: Tensor) -> list[int]:
    """An order in which each layer's rows go from neighbour to nearest neighbour. columns [m, B]"""
    order: list[int] = []
    for source in sorted(set(layer)):
        left = [i for i, other in enumerate(layer) if other == source]
        chain = [left.pop(0)]
        while left:
            nearest = int((columns[left] @ columns[chain[-1]]).argmax())
            chain.append(left.pop(nearest))
        order += chain
    return order
