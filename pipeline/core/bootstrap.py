"""Intervals of ratios: the contexts are drawn anew, with replacement, and each number is taken of what was drawn.

Tokens of a context share its text and its attention, so that they say less than as many independent ones: a context is
drawn as a whole. A number that is a ratio of sums over tokens is a ratio of sums of contexts' sums; with w_c, how often
context c was drawn,

    ratio* = sum_c w_c numerator_c / sum_c w_c denominator_c                 w ~ Multinomial(C, 1/C)

and the interval lies between the 2.5 % and 97.5 % quantiles of 2,000 such. Means that a sum is about (y_bar in the
variance, e_bar in the centred error) stay those of the whole split: to first order in 1/C that changes nothing, and
means of each draw would lower every denominator. The base model, the transcoder and the baselines are given: an
interval says how sure a number is of this run on text of this kind, nothing of another seed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.core.metrics import Sums, ratios

RESAMPLES = 2000

COUNTS_AT_ONCE = 2**22
"""Draws x contexts in memory at a time."""

Interval = tuple[float, float]


def resample(sums: Mapping[str, Tensor], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Tensor]:
    """Sums of drawn contexts. float64 [C, ...] each -> [resamples, ...] each, all of the same draws: numbers made of
    several of them, and differences of runs, are paired. The time of one matrix product."""
    n_contexts = len(next(iter(sums.values())))
    shapes = [s.shape[1:] for s in sums.values()]
    flat = torch.cat([s.reshape(n_contexts, -1).double() for s in sums.values()], dim=1)
    found = torch.empty(resamples, flat.shape[1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for rows in found.split(max(1, COUNTS_AT_ONCE // n_contexts)):
        drawn = torch.randint(n_contexts, (len(rows), n_contexts), generator=generator)
        counts = torch.zeros(len(rows), n_contexts, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand(drawn.shape))
        torch.mm(counts, flat, out=rows)
    parts = found.split([shape.numel() for shape in shapes], dim=1)
    return {name: part.reshape(-1, *shape) for name, part, shape in zip(sums, parts, shapes, strict=True)}


def interval(values: Tensor, level: float = 0.95) -> Tensor:
    """Percentiles of resampled numbers: [resamples, ...] -> [..., 2], low and high. NaN where any of them is NaN."""
    ordered = values.double().sort(dim=0).values  # NaN last
    places = [(len(values) - 1) * (1 + side * level) / 2 for side in (-1, 1)]
    ends = []
    for place in places:
        below = int(place)
        above = min(below + 1, len(values) - 1)
        ends.append(ordered[below].lerp(ordered[above], place - below))
    return torch.where(ordered[-1].isnan()[..., None], torch.nan, torch.stack(ends, dim=-1))


def ratio_interval(
    numerator: Tensor, denominator: Tensor, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """The interval of sum(numerator) / sum(denominator), sums of each context [C]. None of fewer than two contexts, and
    where a resampled denominator is 0."""
    drawn = _drawn({"n": numerator, "d": denominator}, resamples, seed)
    return None if drawn is None else _plain(ratios(drawn["n"], drawn["d"]), level)


def paired_interval(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """The interval of the difference second - first of two ratios, (numerator [C], denominator [C]) each, over the same
    contexts in the same order. What both runs find hard cancels: it can be far narrower than either one's own."""
    sums = {"n1": first[0], "d1": first[1], "n2": second[0], "d2": second[1]}
    drawn = _drawn(sums, resamples, seed)
    if drawn is None:
        return None
    return _plain(ratios(drawn["n2"], drawn["d2"]) - ratios(drawn["n1"], drawn["d1"]), level)


def _drawn(sums: Sums, resamples: int, seed: int) -> dict[str, Tensor] | None:
    lengths = {len(values) for values in sums.values()}
    assert len(lengths) == 1, "sums of the same contexts"
    return None if lengths.pop() < 2 else resample(sums, resamples, seed)


def _plain(values: Tensor, level: float) -> Interval | None:
    low, high = interval(values, level).tolist()
    return None if low != low else (low, high)
