"""Maps of features: what they write, projected to a plane.

A feature is its decoder rows, concatenated over target layers (0 where nothing is written), scaled to length 1, so that
the angle between two features is what counts. PCA to at most 50 dimensions, the first two of which are the first map;
t-SNE (van der Maaten & Hinton 2008, scikit-learn) and UMAP (McInnes et al. 2018, where umap-learn is installed) begin
from those dimensions.
"""

from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.arch.base import Transcoder
from pipeline.errors import UserError
from pipeline.interp.edits import decoder_rows
from pipeline.interp.plots.plot_data import Feature

DIMENSIONS = 50
LETTER, LINE = 0.0135, 0.035
"""Of a label, in parts of a map's width and height."""


class Embedding(NamedTuple):
    name: str
    """PCA, t-SNE, UMAP"""
    points: NDArray[np.float64]
    """[n, 2]"""
    said: str
    """What a reader should know of the axes."""


@torch.inference_mode()
def rows(transcoder: Transcoder, features: list[Feature]) -> NDArray[np.float32]:
    """What each feature writes, of length 1. [n, L D]. Raises UserError where features write no fixed direction."""
    if not transcoder.directions:
        name = transcoder.options.name
        raise UserError(f"arch={name}: features write no fixed direction, so there is no map of them; use another run")
    found = np.zeros((len(features), *transcoder.dims), dtype=np.float32)
    for source in range(transcoder.n_sources):
        mine = [i for i, (layer, _) in enumerate(features) if layer == source]
        ids = torch.tensor([features[i][1] for i in mine], dtype=torch.int64)
        found[mine] = decoder_rows(transcoder, source, ids).float().cpu().numpy()
    flat = found.reshape(len(features), -1)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.asarray(flat / np.where(length > 0, length, 1), dtype=np.float32)


def embeddings(vectors: NDArray[np.float32], perplexity: float, seed: int) -> list[Embedding]:
    """[n, d] -> each map that can be made. Raises UserError for too few features, a perplexity that they do not allow,
    and a missing scikit-learn."""
    if find_spec("sklearn") is None:
        raise UserError("maps of features need scikit-learn; pip install 'clt-pipeline[plot]'")
    n = len(vectors)
    if n < 5:
        raise UserError(f"a map of {n} features shows nothing; give 5 or more")
    if not 1 <= perplexity < n:
        raise UserError(f"plot.perplexity={perplexity:g} must be at least 1 and below the number of features, {n}")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    solver = PCA(min(DIMENSIONS, *vectors.shape), random_state=seed, svd_solver="full" if n <= 500 else "randomized")
    reduced = solver.fit_transform(vectors)
    share = solver.explained_variance_ratio_
    found = [Embedding("PCA", reduced[:, :2], f"{share[0]:.0%} and {share[1]:.0%} of the variance")]
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, learning_rate="auto")
    found.append(
        Embedding("t-SNE", tsne.fit_transform(reduced), f"perplexity {perplexity:g}; distances far apart mean little")
    )
    if find_spec("umap") is not None:
        import umap

        points = umap.UMAP(random_state=seed, n_jobs=1).fit_transform(reduced)
        found.append(Embedding("UMAP", points, "15 neighbours; distances far apart mean little"))
    return found


def legible(points: NDArray[np.float64], texts: list[str], n: int) -> list[int]:
    """At most n points whose texts do not run into one another: each the farthest from those before that has room."""
    if not len(points):
        return []
    unit = (points - points.min(axis=0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    width = np.array([LETTER * min(len(text), 22) for text in texts])
    free = np.ones(len(points), dtype=np.bool_)
    nearest = np.linalg.norm(unit - unit.mean(axis=0), axis=1)
    chosen: list[int] = []
    while len(chosen) < n and free.any():
        chosen.append(int(np.where(free, nearest, -1).argmax()))
        apart = np.abs(unit - unit[chosen[-1]])
        free &= (apart[:, 0] > (width + width[chosen[-1]]) / 2) | (apart[:, 1] > LINE)
        nearest = np.minimum(nearest, np.linalg.norm(unit - unit[chosen[-1]], axis=1))
    return chosen
