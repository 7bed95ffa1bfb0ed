"""What a reader wants first: what was compared on what, and which run is best at which L0."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.web import columns as headline
from pipeline.web.columns import Column, shown
from pipeline.web.groups import Group
from pipeline.web.names import listed
from pipeline.web.paired import Pairs
from pipeline.web.runs import Run, lookup

CONTESTS = [headline.KL, headline.FVU, headline.TASKS, headline.DEAD]
WITHIN = 1.25
"""Runs whose L0 is at most so many times the lowest of them are compared with each other."""


@dataclass(frozen=True)
class Winner:
    group: Group
    column: Column
    others: int
    """How many it was compared with."""

    verdict: str
    """How far ahead it is of the next, and whether that counts."""

    @property
    def value(self) -> str:
        mean, spread = self.group.mean(self.column), self.group.spread(self.column)
        if spread is not None:
            return f"{shown(mean)} ± {shown(spread, mean)}"
        interval = headline.shown_interval(self.column.interval(self.group.first), mean)
        return f"{shown(mean)} {interval}".strip()


@dataclass(frozen=True)
class Contest:
    """Runs of about one L0, and the best of them by each number."""

    lowest: float
    highest: float
    groups: list[Group]
    winners: list[Winner | None]

    @property
    def l0(self) -> str:
        low, high = shown(self.lowest), shown(self.highest)
        return low if low == high else f"{low} to {high}"


def contests(groups: Sequence[Group], drawn: Pairs) -> list[Contest]:
    """One for each range of L0, from the fewest active features up."""
    measured = sorted(
        ((mean, group.index, group) for group in groups if (mean := group.mean(headline.L0)) is not None),
        key=lambda at: at[:2],
    )
    parts: list[list[tuple[float, int, Group]]] = []
    for at in measured:
        if not parts or at[0] > WITHIN * parts[-1][0][0]:
            parts.append([])
        parts[-1].append(at)
    return [
        Contest(part[0][0], part[-1][0], members, [_winner(members, column, drawn) for column in CONTESTS])
        for part in parts
        if (members := [group for _, _, group in part])
    ]


def warnings(runs: Sequence[Run]) -> list[str]:
    """Why numbers of these runs may not be compared with each other."""
    measured = [run for run in runs if run.metrics is not None]
    said = []
    if len({lookup(run.final, "model.weights_sha256") for run in measured}) > 1:
        said.append("The runs are of different language models: compare within a model only.")
    texts = {(run.metrics or {}).get("split") for run in measured}
    tokens = {(run.metrics or {}).get("n_tokens") for run in measured}
    if len(texts) > 1 or len(tokens) > 1 or len({lookup(run.final, "dataset.fingerprint") for run in measured}) > 1:
        said.append("The runs were not all measured on the same text: small differences may come from that.")
    alone = [run.name for run in measured if run.number("replacement.kl") is not None and not headline.KL.compares(run)]
    none = [run.name for run in measured if run.metrics is not None and run.metrics.get("replacement") is None]
    if alone:
        basis = lookup(next(run for run in measured if run.name == alone[0]).metrics, "replacement.basis")
        said.append(
            f"KL, top-1, delta CE and tasks of {listed(alone)} are not of live features ({basis}): "
            "they are marked † and take no part in what is best."
        )
    if none:
        said.append(f"{listed(none)} cannot stand in for the MLPs and so {'have' if len(none) > 1 else 'has'} no KL.")
    other = [run.name for run in measured if not headline.FVU.compares(run)]
    if other:
        said.append(f"{listed(other)} reconstruct what they read, not the MLPs' outputs: their FVU is marked † too.")
    return said


def facts(runs: Sequence[Run]) -> dict[str, str]:
    """The header: model, data, held-out text, runs."""
    measured = [run for run in runs if run.metrics is not None]
    done = [run for run in runs if run.final is not None and "dims" in run.final]
    shapes = {
        run.settings.get("model.name"): f", {lookup(run.final, 'dims.n_layers')} layers of "
        f"{lookup(run.final, 'dims.d_model')}"
        for run in done
    }
    models = [run.settings.get("model.name") for run in runs]
    scored = _each(
        f"{run.metrics['n_tokens']:,} tokens, split {run.metrics.get('split')}"
        for run in measured
        if run.metrics and run.metrics.get("n_tokens") is not None
    )
    finished = sum(run.final is not None for run in runs)
    said = {
        "model": _each(None if name is None else f"{name}{shapes.get(name, '')}" for name in models),
        "transcoder": _each(f"{run.arch} with {run.activation}" for run in runs),
        "trained on": _each(
            f"{run.settings.get('dataset.name')}, {run.tokens() or 0:,} tokens" for run in done or runs if run.lines
        ),
        "measured on": scored or "nothing yet: run clt eval",
        "runs": f"{len(runs)}: {finished} finished, {len(measured)} evaluated",
    }
    return {name: value for name, value in said.items() if value}


def _winner(groups: Sequence[Group], column: Column, drawn: Pairs) -> Winner | None:
    able = [group for group in groups if group.mean(column) is not None and column.compares(group.first)]
    if not able:
        return None
    ordered = sorted(able, key=lambda group: -column.better * (group.mean(column) or 0.0))
    return Winner(ordered[0], column, len(able) - 1, _verdict(ordered, column, drawn))


def _verdict(ordered: Sequence[Group], column: Column, drawn: Pairs) -> str:
    """Against the next best: by seeds where both have several, else by the paired interval over contexts."""
    if len(ordered) < 2:
        return "nothing to compare with"
    best, other = ordered[:2]
    gap = abs((best.mean(column) or 0.0) - (other.mean(column) or 0.0))
    ahead = f"ahead of {other.label} by {shown(gap)}"
    ours, theirs = best.values(column), other.values(column)
    if len(ours) > 1 and len(theirs) > 1:
        apart = max(ours) < min(theirs) if column.better < 0 else min(ours) > max(theirs)
        return f"{ahead}, with every seed" if apart else f"{ahead}, less than seeds differ: a draw"
    found = drawn.differences(best.first, other.first, [column])
    if not isinstance(found, str):
        sure = found[column.key].counts and found[column.key].value * column.better > 0
        seeds = "one seed" if len(ours) == len(theirs) == 1 else "first seeds"
        return f"{ahead}, {'more than the choice of contexts explains' if sure else 'within chance: a draw'} ({seeds})"
    return f"{ahead}, one seed, no interval"


def _each(values: object) -> str:
    """What they are, without repetition; at most three of them."""
    found = list(dict.fromkeys(str(value) for value in values if value is not None))  # type: ignore[attr-defined]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} others" if len(found) > 3 else "")
