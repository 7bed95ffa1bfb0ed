"""What a sweep's own file says (runs/NAME/sweep.yaml): what was swept, and what became of each job."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.web.runs import Run, is_run

FILE = "sweep.yaml"


@dataclass(frozen=True)
class Job:
    number: int
    overrides: str
    """What it does not have in common with the others."""

    state: str
    """That of its run."""

    failed: str
    """Why, or nothing."""


@dataclass(frozen=True)
class Sweep:
    name: str
    again: str
    """The command that runs it, or goes on with it."""

    jobs: list[Job]
    swept: dict[str, list[str]]
    """Its values of each setting, in the order of the jobs."""

    @property
    def n_failed(self) -> int:
        return sum(bool(job.failed) for job in self.jobs)

    @property
    def about(self) -> str:
        """For the header."""
        values = "; ".join(f"{key} = {', '.join(found)}" for key, found in self.swept.items())
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        return f"{values}{': ' if values else ''}{len(self.jobs)} jobs{failed}"


def read(runs: Sequence[Run]) -> list[Sweep]:
    """The sweeps of which all runs are on the page; where one is looked at alone, the others are not its matter."""
    by_place = {run.directory.resolve(): run for run in runs}
    found = []
    for parent in dict.fromkeys(place.parent for place in by_place):
        if not (parent / FILE).is_file():
            continue
        own = {place for place in parent.iterdir() if is_run(place)}
        if own <= by_place.keys():
            found.append(_sweep(parent, {place.name: by_place[place] for place in own}))
    return found


def failures(directory: Path) -> list[str]:
    """The causes of the failed jobs of a sweep, each once; [] where the directory is none."""
    file = directory / FILE
    jobs = yaml.safe_load(file.read_text())["jobs"].values() if file.is_file() else ()
    return list(dict.fromkeys(str(job["failed"]) for job in jobs if job["failed"] is not None))


def _sweep(directory: Path, runs: dict[str, Run]) -> Sweep:
    noted: dict[str, Any] = yaml.safe_load((directory / FILE).read_text())
    jobs: list[Job] = []
    swept: dict[str, list[str]] = {}
    for number, job in noted["jobs"].items():
        for word in job["overrides"]:
            key, _, value = word.lstrip("+").partition("=")
            values = swept.setdefault(key, [])
            if value not in values:
                values.append(value)
        run = runs.get(str(number))
        state = "no run" if run is None else run.state
        jobs.append(Job(int(number), " ".join(job["overrides"]), state, job["failed"] or ""))
    return Sweep(directory.name, str(noted["again"]), jobs, swept)
