"""The jobs of one `clt train -m`: what each of them is, which failed, and how to go on.

    runs/NAME/sweep.yaml
        again: clt train -m name=NAME activation.k=8,16    the command that continues it
        jobs:
          0: {overrides: [activation.k=8], started: ..., failed: null}
          1: {overrides: [activation.k=16], started: ..., failed: 'no cache; ...'}

The runs themselves are runs/NAME/0, 1, ...; a job whose settings were refused has none. Jobs may run in processes of
their own, on other machines, so that each writes its lines itself. Loads no library before it has to.
"""

import fcntl
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import LostPeers, UserError

logger = logging.getLogger(__name__)

FILE = "sweep.yaml"


@dataclass
class Job:
    overrides: list[str]
    """What it does not have in common with the other jobs."""

    started: str
    """When its sweep was started last."""

    failed: str | None = None
    """The cause, in one line."""

    bug: bool = False
    """Whether that is ours."""


@dataclass
class Sweep:
    """One command line. Without a directory nothing is written, and jobs are known in this process alone."""

    again: str
    """What runs it again."""

    words: tuple[str, ...]
    """The overrides of the command line, as Hydra sees them."""

    refusal: Callable[[Exception], UserError | None]
    """What the user can mend, in one line; None for a bug of ours."""

    directory: Path | None
    """runs/NAME"""

    started: str
    """Tells its jobs from those of an earlier command of the same name."""

    jobs: dict[int, Job] = field(default_factory=dict)

    def begin(self, number: int, overrides: Iterable[str], more: str = "", rank: int = 0) -> None:
        """Say that a job begins, and note what it is; of several ranks the first does."""
        own = [word for word in overrides if self._is_swept(word)]
        logger.info(f"job {number}: {' '.join(own)}{more}")
        self.jobs[number] = Job(own, self.started)
        if not rank:
            self._note({number: self.jobs[number]})

    def _is_swept(self, override: str) -> bool:
        """Whether it is one value of several: its key stands in the command line with a list, a range or a glob, or
        not at all."""
        key = override.lstrip("+").partition("=")[0]
        given = [word for word in self.words if word.lstrip("+").partition("=")[0] == key]
        return override not in given and (not given or any(sign in word for word in given for sign in ",(*"))

    def failed(self, numbers: Sequence[int], error: Exception, rank: int = 0) -> None:
        """Say what became of these jobs, with a trace where it is our bug, and note it: of several ranks the first, and
        another one where none has."""
        label = f"job {numbers[0]}" if len(numbers) == 1 else f"jobs {', '.join(map(str, numbers))}"
        refusal = self.refusal(error)
        if refusal is None:
            logger.error(f"{label} crashed", exc_info=error)
        else:
            logger.error(f"{label}: {refusal}")
        cause = " ".join(f"{type(error).__name__}: {error}".split()) if refusal is None else str(refusal)
        cause = f"rank {rank}: {cause}" if rank else cause
        is_second = bool(rank) or isinstance(error, LostPeers)
        self._note({n: Job(self.jobs[n].overrides, self.started, cause, refusal is None) for n in numbers}, is_second)

    def end(self) -> int:
        """Say which jobs failed, why, and what continues them. -> the exit code"""
        self._gather()
        self._tidy()
        failed = {number: job for number, job in sorted(self.jobs.items()) if job.failed is not None}
        if not failed:
            return 0
        causes: dict[str, list[str]] = {}
        for number, job in failed.items():
            name = f"job {number}" + (f" ({' '.join(job.overrides)})" if job.overrides else "")
            causes.setdefault(str(job.failed), []).append(name)
        listed = "; ".join(f"{', '.join(names)}: {cause.rstrip('.')}" for cause, names in causes.items())
        others = "the others are done. " if len(failed) < len(self.jobs) else ""
        logger.error(
            f"{len(failed)} of {len(self.jobs)} jobs failed; {others}{listed}. That mended, go on with {self.again}"
        )
        return 1 if any(job.bug for job in failed.values()) else 2

    def interrupted(self) -> None:
        """Say how to go on."""
        logger.error(f"interrupted; go on with {self.again}")
        self._tidy()

    def _gather(self) -> None:
        """Take in what jobs in other processes have noted."""
        if self.directory is not None:
            noted = read(self.directory)
            self.jobs |= {number: job for number, job in noted.items() if job.started == self.started}

    def _note(self, jobs: Mapping[int, Job], is_second: bool = False) -> None:
        """is_second: what is noted of a failure already stays."""
        self.jobs |= jobs
        if self.directory is None:
            return
        import yaml

        from pipeline.files import write_aside

        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory):
            noted = read(self.directory)
            for number, job in jobs.items():
                before = noted.get(number)
                if is_second and before is not None and before.started == job.started and before.failed is not None:
                    continue
                # Of a run that was made with other settings, which the job will be refused for, what is noted stays.
                is_other = before is not None and before.overrides != job.overrides
                if not is_other or not (self.directory / str(number)).exists():
                    noted[number] = job
            content = {"again": self.again, "jobs": {number: asdict(noted[number]) for number in sorted(noted)}}
            write_aside(self.directory / FILE, yaml.safe_dump(content, sort_keys=False, width=1000).encode())

    def _tidy(self) -> None:
        """Nothing stays of a sweep that left no run."""
        if self.directory is None or not self.directory.exists():
            return
        from pipeline.files import remove_empty

        (self.directory / f"{FILE}.lock").unlink(missing_ok=True)
        if not any(child.is_dir() for child in self.directory.iterdir()):
            (self.directory / FILE).unlink(missing_ok=True)
            remove_empty([self.directory, self.directory.parent])


def read(directory: Path) -> dict[int, Job]:
    """The jobs of a sweep, by number; {} where there is no sweep.yaml."""
    import yaml

    file = directory / FILE
    if not file.exists():
        return {}
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return {int(number): Job(**job) for number, job in found["jobs"].items()}


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / f"{FILE}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
