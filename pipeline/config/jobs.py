"""One job of a command line: what Hydra calls with the composed settings. A command without -m is one job."""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline import progress, ranks
from pipeline.config.composing import typed, with_jobs, with_own_settings
from pipeline.config.request import Request
from pipeline.config.table import STAGES, Config
from pipeline.config.terminal import log_as_rank
from pipeline.errors import LostPeers, Preempted, UserError
from pipeline.stages import slurm
from pipeline.stages.options import TrainConfig
from pipeline.stages.sweep import Sweep


class Job:
    """What Hydra calls for each job: types the configuration and runs the stage. Errors are noted instead of raised, so
    that the other jobs of a sweep run and Hydra adds no words of its own."""

    def __init__(self, stage: str, request: Request, sweep: Sweep | None) -> None:
        self.stage, self.sweep = stage, sweep
        self.errors: list[Exception] = []
        """Of a command line without -m."""
        self.sharing: dict[int, TrainConfig] = {}
        """Jobs that are to be trained together (train.share_pass), when all are known."""
        self.bases: dict[str, str] = {}
        """Default names that a sweep has taken: experiment -> base of `name`."""
        self.tasks = 1
        """Of a job that a dry run prices in place of its launcher."""
        self.parent = os.getpid()
        self.searchpath = [f"hydra.searchpath=[file://{request.config_dir.resolve()}]"] if request.config_dir else []

    def run(self, cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        number = int(settings.job.num) if self.sweep is not None else None
        is_away = os.getpid() != self.parent  # a launcher may run this in a process of its own
        if is_away:
            progress.bars = False  # several would draw on one terminal
            slurm.export_ranks()
            log_as_rank(self.stage, f"[{number}] ")
        if self.sweep is not None and number is not None:
            threads = os.environ.get("OMP_NUM_THREADS") if is_away else None
            more = f", CPU threads: {threads}" if threads else ""
            self.sweep.begin(number, settings.overrides.task, more, ranks.number())
        try:
            done = self.attempt([number or 0], lambda: self._work(cfg, settings, number, is_away))
        except Preempted:
            if is_away:
                slurm.requeue()
            raise
        if is_away and not done and self.sweep is not None and self.sweep.directory is None:
            raise self.errors[0]  # only an exception finds its way back to the parent

    def attempt(self, numbers: Sequence[int], work: Callable[[], object]) -> bool:
        """Do the work of these jobs. What it raises fails them alone. -> whether it was done"""
        try:
            work()
        except Exception as error:  # noqa: BLE001  (the sweep goes on, and says what it was)
            self.errors.append(error)
            if self.sweep is not None:
                if ranks.number() or isinstance(error, LostPeers):
                    ranks.await_launcher()
                self.sweep.failed(numbers, error, ranks.number())
            return False
        return True

    def _work(self, cfg: DictConfig, settings: Any, number: int | None, is_away: bool) -> None:
        words = settings.overrides.task
        base = self.sweep.directory.name if self.sweep is not None and self.sweep.directory is not None else None
        config = typed(self.stage, cfg, dict(settings.runtime.choices), number, self.bases, base)
        config = with_jobs(config, [*words, *self.searchpath])
        config = with_own_settings(config, words)
        _number(config, number)
        if self.tasks > 1 and type(config) is TrainConfig:
            _plan_for(config, self.tasks)
        if type(config) is TrainConfig and config.train.share_pass and number is not None:
            if is_away or settings.runtime.choices.get("hydra/launcher") != "basic":
                raise UserError(
                    "train.share_pass=true trains its jobs in one process, so that no launcher can spread them; leave "
                    "hydra/launcher out"
                )
            self.sharing[number] = config
            return
        importlib.import_module(STAGES[self.stage].module).run(config)


def _plan_for(config: TrainConfig, n_ranks: int) -> None:
    """The ranks that a launcher would start, for a dry run that it does not."""
    if config.dist.name == "single":
        raise UserError(
            f"dist=single is for 1 rank and the launcher starts {n_ranks} for a job; add dist=feature_shard (ddp, "
            "mesh), or take hydra.launcher.nodes and tasks_per_node out"
        )
    config.dist.world = config.dist.world or n_ranks


def _number(config: Config, job: int | None) -> None:
    """What a job of a sweep writes where `to=` says, beside what the others do: out.json -> out-0.json."""
    to = getattr(config, "to", None)
    if job is None or not to:
        return
    place = Path(to)
    is_file = place.suffix in (".json", ".html")
    config.to = str(place.with_stem(f"{place.stem}-{job}") if is_file else place.with_name(f"{place.name}-{job}"))  # type: ignore[union-attr]
