"""Every number that is reported, each defined here once.

All are ratios of sums over the held-out tokens, accumulated in float64; a mean of the ratios of batches is another
number. y, y_hat are in the model's own units. Positions that are no rows (position 0, padding) never reach this file.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor

POSITIONS_AT_ONCE = 1024
"""Bounds the memory of float64 logits: 400 MB a copy for a vocabulary of 50,000."""


class Pooled(TypedDict):
    """A ratio of sums: over all layers, and of each layer; None where the denominator is 0."""

    pooled: float | None
    per_layer: list[float | None]


class Reconstruction:
    """Fraction of variance unexplained.

        FVU = sum_n |y - y_hat|^2 / sum_n |y - y_bar|^2,    y_bar the mean over the whole split

    per layer, and pooled: the sum of the numerators over the sum of the denominators. Explained variance is 1 - FVU,
    not clamped; a constant offset counts as error. None where y does not vary.
    """

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.n = 0
        self.error = torch.zeros(n_layers, dtype=torch.float64)
        # Sums about the first token seen, not about 0: the variance of a channel far from 0 keeps its digits.
        self.origin: Tensor | None = None
        self.sum = torch.zeros(n_layers, d_model, dtype=torch.float64)
        self.square = torch.zeros(n_layers, dtype=torch.float64)

    def update(self, y_hat: Tensor, y: Tensor) -> None:
        """[B, L, D], [B, L, D]"""
        y_hat, y = y_hat.detach().double().cpu(), y.detach().double().cpu()
        if self.origin is None:
            self.origin = y[0].clone()
        centred = y - self.origin
        self.n += y.shape[0]
        self.error += (y_hat - y).square().sum(dim=(0, 2))
        self.sum += centred.sum(dim=0)
        self.square += centred.square().sum(dim=(0, 2))

    def total(self) -> Tensor:
        """sum_n |y - y_bar|^2 per layer. [L]"""
        return self.square - self.sum.square().sum(dim=1) / max(self.n, 1)

    def fvu(self) -> Pooled:
        """Of all layers together and of each."""
        total = self.total()
        per_layer = [ratio(e, t) for e, t in zip(self.error.tolist(), total.tolist(), strict=True)]
        return {"pooled": ratio(float(self.error.sum()), float(total.sum())), "per_layer": per_layer}

    def explained_variance(self) -> Pooled:
        """1 - FVU, in the same form."""
        fvu = self.fvu()
        return {"pooled": _complement(fvu["pooled"]), "per_layer": [_complement(f) for f in fvu["per_layer"]]}


class Firing:
    """How often features fire: L0, its percentiles over tokens, firing densities, features that never fired.

        L0_l = mean_n #{i : a_i^l > 0}        density_i = mean_n 1[a_i > 0]

    "Dead" here means not once in the n evaluation tokens. Resampling tokens biases it: give n beside it.
    """

    def __init__(self, n_layers: int, d_features: int) -> None:
        self.n = 0
        self.fires = torch.zeros(n_layers, d_features, dtype=torch.int64)
        # Histogram of the tokens' total L0, so that percentiles are exact without keeping every token.
        self.l0_histogram = torch.zeros(n_layers * d_features + 1, dtype=torch.int64)

    def update(self, features: Tensor) -> None:
        """[B, L, F]"""
        active = features > 0
        self.n += features.shape[0]
        self.fires += active.sum(dim=0).cpu()
        per_token = active.sum(dim=(1, 2)).cpu()
        self.l0_histogram += torch.bincount(per_token, minlength=self.l0_histogram.numel())

    def l0(self) -> dict[str, Any]:
        """{"total", "per_layer", "p5", "p50", "p95"}: mean active features of a token; percentiles of the total."""
        per_layer = self.fires.sum(dim=1).double() / self.n
        quantiles = {f"p{q}": self._percentile(q) for q in (5, 50, 95)}
        return {"total": float(per_layer.sum()), "per_layer": per_layer.tolist(), **quantiles}

    def _percentile(self, q: int) -> int:
        """The smallest L0 that at least q % of the tokens do not exceed."""
        cumulative = self.l0_histogram.cumsum(0)
        return int((cumulative * 100 < q * self.n).sum())

    def density(self) -> Tensor:
        """[L, F]"""
        return self.fires.double() / self.n

    def dead_fraction(self) -> dict[str, Any]:
        """{"total", "per_layer"}: the share of features that never fired."""
        dead = (self.fires == 0).double()
        return {"total": float(dead.mean()), "per_layer": dead.mean(dim=1).tolist()}

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


class Divergence:
    """What replacing the MLPs does to the model's predictions, over the scored positions.

    kl        KL(P_original || P_replaced) in nats, mean over positions
    top1      share of positions where both have the same most likely token
    delta_ce  mean of CE_replaced - CE_original in nats, over the positions whose next token is known
    """

    def __init__(self) -> None:
        self.n = self.n_next = 0
        self.kl_sum = self.same_sum = self.ce_original_sum = self.ce_replaced_sum = 0.0

    def update(self, original: Tensor, replaced: Tensor, scored: Tensor, next_token: Tensor, has_next: Tensor) -> None:
        """original, replaced: logits [n, T, V]; scored, has_next: bool [n, T]; next_token int64 [n, T]."""
        scored, next_token, has_next = (t.to(original.device).flatten() for t in (scored, next_token, has_next))
        original, replaced = original.flatten(0, 1), replaced.flatten(0, 1)
        for rows in scored.nonzero().squeeze(1).split(POSITIONS_AT_ONCE):
            p = original[rows].double().log_softmax(-1)
            q = replaced[rows].double().log_softmax(-1)
            self.n += p.shape[0]
            self.kl_sum += float((p.exp() * (p - q)).sum())
            self.same_sum += float((p.argmax(-1) == q.argmax(-1)).sum())
            known, target = has_next[rows], next_token[rows]
            self.n_next += int(known.sum())
            self.ce_original_sum -= float(p[known].gather(-1, target[known, None]).sum())
            self.ce_replaced_sum -= float(q[known].gather(-1, target[known, None]).sum())

    @property
    def kl(self) -> float:
        return self.kl_sum / self.n

    @property
    def top1(self) -> float:
        return self.same_sum / self.n

    @property
    def ce_original(self) -> float:
        return self.ce_original_sum / self.n_next

    @property
    def delta_ce(self) -> float:
        return (self.ce_replaced_sum - self.ce_original_sum) / self.n_next


def ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator, None where the denominator is 0."""
    return numerator / denominator if denominator > 0 else None


def _complement(value: float | None) -> float | None:
    return None if value is None else 1.0 - value
