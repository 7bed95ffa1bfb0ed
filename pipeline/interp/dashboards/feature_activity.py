"""Which features are active together.

    score(i, j) = n_ij / sqrt(n_i n_j)      n_i tokens at which i is active, n_ij those at which both are

on the first tokens of the text (`features.related_tokens`), the same ones for all features. Pairs that meet on fewer
than MEETINGS tokens are left out: two rare features that meet once would lead every list.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.arch.base import Transcoder
from pipeline.interp.dashboards.feature_text import FeatureText
from pipeline.interp.edits import chosen, features_of

MEETINGS = 5
MOST_PAIRS = 20_000_000
"""Active (token, feature) pairs that are kept; a denser transcoder is compared on fewer tokens."""
MOST_COUNTS = 1 << 23
"""Counters n_ij at a time."""


class Activity(NamedTuple):
    """Active pairs, by token."""

    feature: NDArray[np.int64]
    """[nnz], source * F + feature, in rising order within a token"""
    starts: NDArray[np.int64]
    """[n_tokens + 1]: token t has pairs starts[t] to starts[t + 1]"""
    n_features: int
    """S F"""


class Together(NamedTuple):
    """For each of n features those that it is active with most, the highest score first; as many as there are."""

    ids: list[list[int]]
    """source * F + feature"""
    score: list[list[float]]
    tokens: list[list[int]]
    """n_ij"""


@torch.inference_mode()
def activity(transcoder: Transcoder, text: FeatureText, n_tokens: int) -> Activity:
    """Of the blocks that hold the first n_tokens, or as many as MOST_PAIRS allows."""
    features: list[NDArray[np.int64]] = []
    sizes: list[NDArray[np.int64]] = []
    done = pairs = 0
    for block in text.blocks():
        if done >= n_tokens or pairs >= MOST_PAIRS:
            break
        found = features_of(transcoder, text.read(block))
        parts = [chosen(found, source).pattern for source in range(transcoder.n_sources)]
        token = np.concatenate([part.tokens.cpu().numpy() for part in parts])
        ids = [part.indices.cpu().numpy() + s * transcoder.d_features for s, part in enumerate(parts)]
        features.append(np.concatenate(ids)[np.argsort(token, kind="stable")])
        sizes.append(np.bincount(token, minlength=block.n_rows))
        done, pairs = done + block.n_rows, pairs + len(token)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Activity(np.concatenate(features), starts, transcoder.n_sources * transcoder.d_features)


def together(found: Activity, chosen_features: NDArray[np.int64], k: int) -> Together:
    """chosen_features [n]: source * F + feature"""
    counts = np.bincount(found.feature, minlength=found.n_features)
    sizes = np.diff(found.starts)
    token = np.repeat(np.arange(len(sizes)), sizes)
    place = np.full(found.n_features, -1)
    answer = Together([], [], [])
    step = max(1, MOST_COUNTS // found.n_features)
    for first in range(0, len(chosen_features), step):
        mine = chosen_features[first : first + step]
        place[:] = -1
        place[mine] = np.arange(len(mine))
        met = _met(found, sizes, token, place, len(mine))
        for i, feature in enumerate(mine.tolist()):
            others = np.flatnonzero(met[i] >= MEETINGS)
            others = others[others != feature]
            score = met[i, others] / np.sqrt(float(counts[feature]) * counts[others])
            best = np.argsort(-score, kind="stable")[:k]
            answer.ids.append(others[best].tolist())
            answer.score.append(score[best].tolist())
            answer.tokens.append(met[i, others[best]].tolist())
    return answer


def _met(
    found: Activity, sizes: NDArray[np.int64], token: NDArray[np.int64], place: NDArray[np.int64], n: int
) -> NDArray[np.int64]:
    """How often each of n features, those with a place, is active with each of all. -> [n, S F]"""
    mine = np.flatnonzero(place[found.feature] >= 0)
    met = np.zeros(n * found.n_features, dtype=np.int64)
    # A few million pairs of pairs at a time.
    ends = np.cumsum(sizes[token[mine]])
    for some in np.split(mine, np.searchsorted(ends, np.arange(4_000_000, ends[-1] if len(ends) else 0, 4_000_000))):
        here = token[some]
        partners = np.repeat(found.starts[here] - np.cumsum(sizes[here]) + sizes[here], sizes[here])
        partners = found.feature[partners + np.arange(sizes[here].sum())]
        row = np.repeat(place[found.feature[some]], sizes[here])
        met += np.bincount(row * found.n_features + partners, minlength=len(met))
    return met.reshape(n, -1)
