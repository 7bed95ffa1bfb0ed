"""Every number of `clt eval`, written from its formula: one token, layer and dimension at a time, in Python's floats.

Shares no code with the package. Sums are exact (math.fsum), so that what differs is the package's rounding. Rows are
tokens: row r is position 1 + r % (T - 1) of context r // (T - 1).
"""

import math
from typing import Any

import numpy as np

Rows = np.ndarray
"""[N, L, D] or [N, S, F], float64."""


def over(numerator: float, denominator: float) -> float | None:
    return None if denominator == 0 else numerator / denominator


def fit(y_hat: Rows, y: Rows, features: Rows) -> dict[str, Any]:
    """What one rule's features and reconstruction are like."""
    return {**reconstruction(y_hat, y), **firing(features)}


def reconstruction(y_hat: Rows, y: Rows) -> dict[str, Any]:
    N, L, D = y.shape
    error, centred, constant, variance, cosines, norm_y_hat, norm_y = ([[] for _ in range(L)] for _ in range(7))
    for l in range(L):
        y_bar = [math.fsum(float(y[n, l, d]) for n in range(N)) / N for d in range(D)]
        e_bar = [math.fsum(float(y_hat[n, l, d]) - float(y[n, l, d]) for n in range(N)) / N for d in range(D)]
        if all(float(y[n, l, d]) == float(y[0, l, d]) for n in range(N) for d in range(D)):
            y_bar = [float(v) for v in y[0, l]]  # a mean that rounds is no mean of equal numbers
        for n in range(N):
            e = [float(y_hat[n, l, d]) - float(y[n, l, d]) for d in range(D)]
            error[l].append(math.fsum(v * v for v in e))
            centred[l].append(math.fsum((v - b) ** 2 for v, b in zip(e, e_bar, strict=True)))
            constant[l].append(math.fsum(b * b for b in e_bar))
            variance[l].append(math.fsum((float(v) - b) ** 2 for v, b in zip(y[n, l], y_bar, strict=True)))
            here, there = (math.sqrt(math.fsum(float(v) ** 2 for v in row[n, l])) for row in (y_hat, y))
            norm_y_hat[l].append(here)
            norm_y[l].append(there)
            if there > 0:
                product = math.fsum(float(a) * float(b) for a, b in zip(y_hat[n, l], y[n, l], strict=True))
                cosines[l].append(product / (here * there) if here > 0 else 0.0)
    ones = [[1.0] * len(values) for values in cosines]
    return {
        "fvu": both(error, variance),
        "explained_variance": one_minus(both(error, variance)),
        "explained_variance_centred": one_minus(both(centred, variance)),
        "bias": both(constant, variance),
        "cosine": both(cosines, ones),
        "relative_norm": both(norm_y_hat, norm_y),
    }


def both(numerator: list[list[float]], denominator: list[list[float]]) -> dict[str, Any]:
    """Values of each layer's tokens -> the ratio over everything, and of each layer."""
    pooled = over(*(math.fsum(value for layer in part for value in layer) for part in (numerator, denominator)))
    layers = zip(numerator, denominator, strict=True)
    return {"pooled": pooled, "per_layer": [over(math.fsum(top), math.fsum(bottom)) for top, bottom in layers]}


def one_minus(numbers: dict[str, Any]) -> dict[str, Any]:
    def of(value: float | None) -> float | None:
        return None if value is None else 1 - value

    return {"pooled": of(numbers["pooled"]), "per_layer": [of(value) for value in numbers["per_layer"]]}


def firing(features: Rows) -> dict[str, Any]:
    N, S, F = features.shape
    fires = [[sum(float(features[n, s, i]) > 0 for n in range(N)) for i in range(F)] for s in range(S)]
    totals = sorted(sum(float(v) > 0 for v in features[n].flatten()) for n in range(N))
    edges = [-8 + 0.5 * j for j in range(17)]
    histogram = []
    for s in range(S):
        bins = [0] * 16
        for count in fires[s]:
            if count:
                bins[max(j for j in range(16) if edges[j] <= math.log10(count / N))] += 1
        histogram.append(bins)
    dead = [sum(count == 0 for count in fires[s]) for s in range(S)]
    dense = [sum(10 * count > N for count in fires[s]) for s in range(S)]
    return {
        "l0": {
            "total": sum(map(sum, fires)) / N,
            "per_layer": [sum(fires[s]) / N for s in range(S)],
            **{f"p{q}": totals[math.ceil(q * N / 100) - 1] for q in (5, 50, 95)},
        },
        "dead_fraction": {"total": sum(dead) / (S * F), "per_layer": [count / F for count in dead]},
        "dense_features": {"total": sum(dense), "per_layer": dense},
        "density_histogram": {"log10_edges": edges, "per_layer": histogram, "never_fired": dead},
    }


def log_probabilities(logits: np.ndarray) -> list[float]:
    values = [float(v) for v in logits]
    highest = max(values)
    total = highest + math.log(math.fsum(math.exp(v - highest) for v in values))
    return [v - total for v in values]


def most_likely(logits: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda v: (-float(logits[v]), v))[:k]


def divergence(original: np.ndarray, replaced: np.ndarray, contexts: np.ndarray, n_rows: int) -> dict[str, Any]:
    """What a replacement does. logits [C, T, V], contexts [C, T]; the first n_rows rows are text, the rest padding."""
    T, V = original.shape[1:]
    kl, same, overlap, before, after = ([] for _ in range(5))
    by_position: list[list[float]] = [[] for _ in range(T - 1)]
    for row in range(n_rows):
        c, t = row // (T - 1), 1 + row % (T - 1)
        p, q = log_probabilities(original[c, t]), log_probabilities(replaced[c, t])
        kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        by_position[t - 1].append(kl[-1])
        same.append(most_likely(original[c, t], 1) == most_likely(replaced[c, t], 1))
        k = min(5, V)
        overlap.append(len({*most_likely(original[c, t], k)} & {*most_likely(replaced[c, t], k)}) / k)
        if t + 1 < T and row + 1 < n_rows:
            before.append(-p[int(contexts[c, t + 1])])
            after.append(-q[int(contexts[c, t + 1])])
    middle = sorted(kl)
    ce_original, ce_replaced = mean(before), mean(after)
    return {
        "kl": mean(kl),
        "kl_median": (middle[(n_rows - 1) // 2] + middle[n_rows // 2]) / 2,
        "kl_by_position": [mean(values) for values in by_position],
        "top1": mean(same),
        "top5": mean(overlap),
        "ce_original": ce_original,
        "ce_replaced": ce_replaced,
        "delta_ce": None if ce_original is None or ce_replaced is None else ce_replaced - ce_original,
    }


def mean(values: list[float]) -> float | None:
    return over(math.fsum(values), len(values))


def against_ablation(own: dict[str, Any], ablated: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys that compare a replacement with a baseline; a baseline that does no harm recovers nothing: null."""
    found = {f"{key}_{name}": ablated[key] for key in ("kl", "top1", "delta_ce")}
    for key, label in (("kl", "kl"), ("delta_ce", "ce")):
        harmed = ablated[key] is not None and ablated[key] > 0
        found[f"{label}_recovered_{name}"] = 1 - own[key] / ablated[key] if harmed else None
    return found
