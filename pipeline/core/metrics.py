"""How good the features and the reconstruction are: each number defined here once.

All are ratios of sums over the held-out tokens, accumulated in float64; a mean of the ratios of batches is another
number. y, y_hat are in the model's own units. Positions that are no rows (position 0, padding) never reach this file.
What a replacement does to the predictions is in `core/metrics_predictions.py`, numbers of weights alone in
`core/metrics_weights.py`.

Sums are kept by context (a packed piece of text), since the interval of a number comes from drawing contexts anew
(`core/bootstrap.py`). C contexts, L layers, D d_model, S feature spaces, F features of one.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from pipeline.core.sparse import Chosen, Features, n_tokens, of_layer

Sums = Mapping[str, Tensor]
"""By name: float64 with any leading axes (of resamples, say), then [] or [L], [S], or [T - 1]."""

Tree = dict[str, Any]
"""Numbers in groups, as in metrics.json."""

DENSE = 0.1
"""A feature is dense when it fires on more than this share of the tokens."""


class Pooled(TypedDict):
    """A ratio of sums: over all layers, and of each layer; None where the denominator is 0."""

    pooled: float | None
    per_layer: list[float | None]


class Reconstruction:
    """How near y_hat is to y, with e = y_hat - y and y_bar, e_bar means over the whole split.

        FVU            sum_n |e|^2 / sum_n |y - y_bar|^2           per layer; pooled: sum over layers / sum over layers
        EV_centred     1 - sum_n |e - e_bar|^2 / sum_n |y - y_bar|^2
        bias           |e_bar|^2 / mean_n |y - y_bar|^2            so FVU = 1 - EV_centred + bias
        cosine         mean over tokens (pooled: and layers) of y_hat . y / |y_hat| |y|
        relative norm  sum_n |y_hat| / sum_n |y|

    Explained variance is 1 - FVU, not clamped; a constant offset counts as error in it, and not in EV_centred. The
    cosine of a y_hat of 0 is 0; tokens whose y is 0 have none and are left out. None where a denominator is 0.

    Memory: the sums of y and e of each context, [C, L, D].
    """

    def __init__(self, n_layers: int, d_model: int, n_contexts: int = 1, origin: Tensor | None = None) -> None:
        """origin: y [L, D] of some token. None: of the first one seen."""
        by_layer, by_dimension = (n_contexts, n_layers), (n_contexts, n_layers, d_model)
        self.counts = torch.zeros(n_contexts, dtype=torch.float64)
        # Sums about one token, not about 0: the variance of a channel far from 0 keeps its digits.
        self.origin = None if origin is None else origin.detach().double().cpu()
        self.y_sum = torch.zeros(by_dimension, dtype=torch.float64)
        self.e_sum = torch.zeros(by_dimension, dtype=torch.float64)
        self.y_square = torch.zeros(by_layer, dtype=torch.float64)
        self.e_square = torch.zeros(by_layer, dtype=torch.float64)
        names = ("cosine_sum", "cosine_n", "norm_y_hat", "norm_y")
        self.tokens = {name: torch.zeros(by_layer, dtype=torch.float64) for name in names}
        """What a token adds to the sums of its context."""

    def update(self, y_hat: Tensor, y: Tensor, context: Tensor | None = None) -> None:
        """y_hat, y [B, L, D]; context int64 [B]: of which context each token is. None: of the first."""
        y_hat, y = y_hat.detach().double().cpu(), y.detach().double().cpu()
        index = torch.zeros(len(y), dtype=torch.int64) if context is None else context.cpu()
        if self.origin is None:
            self.origin = y[0].clone()
        centred, error = y - self.origin, y_hat - y
        self.counts.index_add_(0, index, torch.ones(len(y), dtype=torch.float64))
        self.y_sum.index_add_(0, index, centred)
        self.e_sum.index_add_(0, index, error)
        self.y_square.index_add_(0, index, centred.square().sum(dim=2))
        self.e_square.index_add_(0, index, error.square().sum(dim=2))
        norm_y_hat, norm_y = torch.linalg.vector_norm(y_hat, dim=2), torch.linalg.vector_norm(y, dim=2)
        product = torch.linalg.vecdot(y_hat, y)
        cosine = torch.where(product != 0, product / (norm_y_hat * norm_y), 0.0)
        token = {"cosine_sum": cosine, "cosine_n": norm_y > 0, "norm_y_hat": norm_y_hat, "norm_y": norm_y}
        for name, sums in self.tokens.items():
            sums.index_add_(0, index, token[name].double())

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def added(self) -> list[Tensor]:
        """All that adds up over tokens: those of others with the same origin, added to them, make one of both."""
        return [self.counts, self.y_sum, self.e_sum, self.y_square, self.e_square, *self.tokens.values()]

    def sums(self) -> dict[str, Tensor]:
        """Of each context: n_tokens [C], and [C, L] error = sum |e|^2, error_centred = sum |e - e_bar|^2, variance =
        sum |y - y_bar|^2, cosine_sum, cosine_n (tokens that have one), norm_y_hat, norm_y. y_bar and e_bar are those of
        the whole split."""
        variance = _about_the_mean(self.y_square, self.y_sum, self.counts)
        error_centred = _about_the_mean(self.e_square, self.e_sum, self.counts)
        own = {"error": self.e_square, "error_centred": error_centred, "variance": variance}
        return {"n_tokens": self.counts, **own, **self.tokens}

    def total(self) -> Tensor:
        """sum_n |y - y_bar|^2 per layer. [L]"""
        return self.sums()["variance"].sum(dim=0)

    def fvu(self) -> Pooled:
        """Of all layers together and of each."""
        return _pooled_floats(self.e_square.sum(dim=0), self.total())

    def explained_variance(self) -> Pooled:
        """1 - FVU, in the same form."""
        fvu = self.fvu()
        return {"pooled": _complement(fvu["pooled"]), "per_layer": [_complement(f) for f in fvu["per_layer"]]}

    def bias(self) -> Pooled:
        """The constant part of the FVU. It has no interval: the square of a resampled mean lies above its own."""
        constant = self.e_sum.sum(dim=0).square().sum(dim=1) / max(self.n, 1)
        return _pooled_floats(constant, self.total())


def _about_the_mean(square: Tensor, total: Tensor, counts: Tensor) -> Tensor:
    """sum |v - v_bar|^2 of each context from sum |v|^2 [C, L], sum v [C, L, D] and how many v [C] it has; v_bar is the
    mean over all contexts. -> [C, L]"""
    mean = total.sum(dim=0) / counts.sum().clamp(min=1)
    return square - 2 * (total * mean).sum(dim=2) + counts[:, None] * mean.square().sum(dim=1)


class Firing:
    """How often features fire: L0, its percentiles over tokens, firing densities, features that never fired.

        L0_l = mean_n #{i : a_i^l > 0}        density_i = mean_n 1[a_i > 0]        dense: density_i > 0.1

    "Dead" here means not once in the n evaluation tokens. Resampling tokens biases it: give n beside it.
    """

    def __init__(self, n_layers: int, d_features: int, n_contexts: int = 1) -> None:
        self.fires = torch.zeros(n_layers, d_features, dtype=torch.int64)
        # Histogram of the tokens' total L0, so that percentiles are exact without keeping every token.
        self.l0_histogram = torch.zeros(n_layers * d_features + 1, dtype=torch.int64)
        self.l0_sum = torch.zeros(n_contexts, n_layers, dtype=torch.float64)

    def update(self, features: Features, context: Tensor | None = None) -> None:
        """features [B, S, F], or sparse; context int64 [B]: of which context each token is. None: of the first."""
        n = n_tokens(features)
        index = torch.zeros(n, dtype=torch.int64) if context is None else context.cpu()
        active = torch.stack([self._layer(of_layer(features, i), i) for i in range(len(self.fires))], dim=1)
        self.l0_sum.index_add_(0, index, active.double())
        self.l0_histogram += torch.bincount(active.sum(dim=1), minlength=self.l0_histogram.numel())

    def _layer(self, features: Tensor | Chosen, layer: int) -> Tensor:
        """Counts the layer's features. -> int64 [B], how many each token has"""
        if isinstance(features, Chosen):
            fired = features.values > 0  # padding is 0
            pattern = features.pattern
            self.fires[layer] += torch.bincount(pattern.indices[fired], minlength=pattern.n_features).cpu()
            return torch.bincount(pattern.tokens[fired], minlength=pattern.n_tokens).cpu()
        active = features > 0
        self.fires[layer] += active.sum(dim=0).cpu()
        return active.sum(dim=1).cpu()

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.l0_histogram.sum())

    def added(self) -> list[Tensor]:
        """All that adds up over tokens, as in `Reconstruction`."""
        return [self.fires, self.l0_histogram, self.l0_sum]

    def sums(self) -> dict[str, Tensor]:
        """l0_sum [C, S]: active features of each context, by feature space."""
        return {"l0_sum": self.l0_sum}

    def l0(self) -> dict[str, Any]:
        """{"total", "per_layer", "p5", "p50", "p95"}: mean active features of a token; percentiles of the total."""
        per_layer = self.fires.sum(dim=1).double() / self.n
        return {"total": float(per_layer.sum()), "per_layer": per_layer.tolist(), **self.percentiles()}

    def percentiles(self) -> dict[str, int]:
        """Of the tokens' total: the smallest L0 that at least q % of the tokens do not exceed."""
        cumulative = self.l0_histogram.cumsum(0)
        return {f"p{q}": int((cumulative * 100 < q * self.n).sum()) for q in (5, 50, 95)}

    def density(self) -> Tensor:
        """[S, F]"""
        return self.fires.double() / self.n

    def dead_fraction(self) -> dict[str, Any]:
        """{"total", "per_layer"}: the share of features that never fired."""
        dead = (self.fires == 0).double()
        return {"total": float(dead.mean()), "per_layer": dead.mean(dim=1).tolist()}

    def dense_features(self) -> dict[str, Any]:
        """{"total", "per_layer"}: how many features fire on more than a tenth of the tokens."""
        dense = (self.density() > DENSE).sum(dim=1)
        return {"total": int(dense.sum()), "per_layer": dense.tolist()}

    def density_histogram(self) -> dict[str, Any]:
        """Counts of features by log10 density, half a decade a bin; the features that never fired apart."""
        density = self.density()
        edges = torch.arange(-8.0, 0.5, 0.5, dtype=torch.float64)
        counts = [
            torch.histogram(layer[layer > 0].log10().clamp(-8, 0), bins=edges).hist.long().tolist() for layer in density
        ]
        return {
            "log10_edges": edges.tolist(),
            "per_layer": counts,
            "never_fired": (self.fires == 0).sum(dim=1).tolist(),
        }


def fit_numbers(sums: Sums) -> Tree:
    """Every number of `Firing` and `Reconstruction` that is a ratio of sums, from the sums that they name. Leaves have
    the leading axes of the sums, then [] or [L] (L0: [S]); NaN where a denominator is 0."""
    error, variance = sums["error"], sums["variance"]
    return {
        "l0": {
            "total": sums["l0_sum"].sum(dim=-1) / sums["n_tokens"],
            "per_layer": sums["l0_sum"] / sums["n_tokens"][..., None],
        },
        "fvu": pooled(error, variance),
        "explained_variance": {key: 1 - value for key, value in pooled(error, variance).items()},
        "explained_variance_centred": {
            key: 1 - value for key, value in pooled(sums["error_centred"], variance).items()
        },
        "cosine": pooled(sums["cosine_sum"], sums["cosine_n"]),
        "relative_norm": pooled(sums["norm_y_hat"], sums["norm_y"]),
    }


def pooled(numerator: Tensor, denominator: Tensor) -> dict[str, Tensor]:
    """[..., L] each -> {"pooled": [...], "per_layer": [..., L]}: the ratio of the sums over layers, and of each."""
    return {
        "pooled": ratios(numerator.sum(dim=-1), denominator.sum(dim=-1)),
        "per_layer": ratios(numerator, denominator),
    }


def ratios(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, NaN where the denominator is not above 0."""
    return torch.where(denominator > 0, numerator / denominator, torch.nan)


def ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator, None where the denominator is 0."""
    return numerator / denominator if denominator > 0 else None


def as_plain(tree: Tree) -> Tree:
    """The same tree with floats, None where a number is NaN, and lists of them in place of tensors."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: leaf(part) for key, part in value.items()}
        if isinstance(value, Tensor):
            return leaf(value.tolist())
        if isinstance(value, list):
            return [leaf(part) for part in value]
        return None if isinstance(value, float) and value != value else value

    return {key: leaf(value) for key, value in tree.items()}


def _pooled_floats(numerator: Tensor, denominator: Tensor) -> Pooled:
    plain = as_plain(dict(pooled(numerator, denominator)))
    return {"pooled": plain["pooled"], "per_layer": plain["per_layer"]}


def _complement(value: float | None) -> float | None:
    return None if value is None else 1.0 - value
