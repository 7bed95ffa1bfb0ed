"""How runs belong together: which settings differ, which runs are one recipe with several seeds, what to call them."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.train.run import NO_EFFECT
from pipeline.web.columns import FVU, KL, Column
from pipeline.web.runs import Run

SEED = "train.seed"
UNIMPORTANT = NO_EFFECT | {"name", "arch.target", "train.kernels", "train.checkpoint_every"}
"""Settings that make no run another one. What architectures fix (arch.target) differs with the architecture alone."""

MISSING = object()
"""A setting that the run's config.yaml does not have."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; often a single one."""

    label: str
    runs: tuple[Run, ...]
    index: int
    """Its place among the groups, which decides its colour."""

    @property
    def first(self) -> Run:
        return self.runs[0]

    def values(self, column: Column) -> list[float]:
        """Of the runs that have the number."""
        return [value for run in self.runs if (value := column.value(run)) is not None]

    def mean(self, column: Column) -> float | None:
        values = self.values(column)
        return statistics.fmean(values) if values else None

    def spread(self, column: Column) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        values = self.values(column)
        return statistics.stdev(values) if len(values) > 1 else None


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not the same in all runs, in the order of the first config.yaml that has them."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    keys = [key for key in keys if key not in UNIMPORTANT and not key.startswith("log.")]
    return [key for key in keys if len({_comparable(run, key) for run in runs}) > 1]


def grouped(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Runs with the same values of all these settings but the seed: lowest KL first, then those without a KL by FVU,
    then the rest as they come. Those whose numbers stand alone are not ranked by them."""
    parts: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        same = tuple(_comparable(run, key) for key in keys if key != SEED)
        parts.setdefault(same, []).append(run)
    several = any(len(members) > 1 for members in parts.values())
    labels = [_label(members, keys, several) for members in parts.values()]
    twice = {label for label, n in Counter(labels).items() if n > 1}
    found = [
        Group(members[0].name if label in twice else label, tuple(members), index)
        for index, (label, members) in enumerate(zip(labels, parts.values(), strict=True))
    ]
    return [replace(group, index=index) for index, group in enumerate(sorted(found, key=_place))]


def _place(group: Group) -> tuple[int, float]:
    for rank, column in enumerate([KL, FVU]):
        if (mean := group.mean(column)) is not None and column.compares(group.first):
            return rank, mean
    return 2, float(group.index)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, where it says enough: optim.lr -> lr, arch.name -> arch."""
    brief = {key: key.split(".")[0] if key.endswith(".name") else key.split(".")[-1] for key in keys}
    often = Counter(brief.values())
    return {key: name if often[name] == 1 else key for key, name in brief.items()}


def described(run: Run, keys: Sequence[str], without_seed: bool = False) -> str:
    """clt, k=8, lr=0.001: what sets the run apart. What is chosen by name says by itself what it is."""
    brief = short_names(keys)
    wanted = [key for key in keys if not (without_seed and key == SEED) and run.settings.get(key) is not None]
    values = {key: f"{value:g}" if isinstance(value := run.settings[key], float) else str(value) for key in wanted}
    return ", ".join(values[key] if key.endswith(".name") else f"{brief[key]}={values[key]}" for key in wanted)


def setting(run: Run, key: str) -> Any:
    """Its value, or MISSING."""
    return run.settings.get(key, MISSING)


def _comparable(run: Run, key: str) -> str:
    return repr(run.settings[key]) if key in run.settings else ""


def _label(members: list[Run], keys: Sequence[str], several: bool) -> str:
    """topk of topk-0 and topk-1; what sets it apart, where the names are numbers of a sweep."""
    stems = {run.name.removesuffix(f"-{run.seed}") if several else run.name for run in members}
    if len(stems) == 1 and not _is_number(stem := stems.pop()):
        return stem
    if about := described(members[0], keys, without_seed=True):
        return about if len(members) > 1 else f"{members[0].name}: {about}"
    return f"seeds {', '.join(str(run.seed) for run in members)}" if len(members) > 1 else members[0].name


def _is_number(name: str) -> bool:
    return name.rsplit("/", 1)[-1].isdigit()
