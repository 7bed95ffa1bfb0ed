"""From a command line to its exit code: Hydra composes, sweeps and launches; each job calls its stage.

Hydra itself creates no file and no directory: what a run leaves behind is its stage's business.
"""

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline import ranks
from pipeline.config.jobs import Job
from pipeline.config.refusals import one_line, refusal_of
from pipeline.config.request import Request, check_flags
from pipeline.config.sweeps import is_of_launcher, new_sweep, of_launcher, show_sbatch, sweep_name, tasks
from pipeline.config.table import CONF
from pipeline.config.terminal import log_as_rank, log_to_stderr
from pipeline.config.words import choices_of, prepare
from pipeline.errors import LostPeers, UserError
from pipeline.stages.sweep import Sweep

logger = logging.getLogger(__name__)

QUIET = {
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
"""Settings under which Hydra writes nothing and leaves logging to `log_to_stderr`."""


def launch(stage: str, request: Request) -> int:
    """Run one command line and return its exit code: 0 done, 2 the user's input (one line says what to mend),
    1 our bug in a job of a sweep or a rank that has lost the others, 130 interrupted. Our bug elsewhere is raised."""
    log_as_rank(stage)
    sweep: Sweep | None = None
    try:
        check_flags(request)
        words = prepare(stage, request.overrides, request.config_dir, request.config_name)
        sweep = new_sweep(stage, request, words) if request.multirun else None
        job = Job(stage, request, sweep)
        is_dry = "dry_run=true" in words  # which costs nothing, and is done in this process
        job.tasks = tasks(stage, words) if is_dry and sweep is not None else 1
        here = [word for word in words if not (is_dry and is_of_launcher(word))]
        name = sweep_name(request, words) if sweep is not None and stage == "train" else stage
        folder = Path("runs", name) if stage == "train" else Path()
        _run_hydra(stage, request, here, job.run, of_launcher(here, folder, name) if sweep is not None else {})
        if sweep is not None and here != words and choices_of(words, "hydra/launcher") == ["submitit_slurm"]:
            show_sbatch(stage, words, folder, name, len(sweep.jobs))
        if job.sharing:
            importlib.import_module("pipeline.stages.share_pass").run(job.sharing, job.attempt)
    except KeyboardInterrupt:
        if sweep is None:
            (logger.info if ranks.number() else logger.error)("interrupted")
        else:
            sweep.interrupted()
        return 130
    except RuntimeError as error:
        if sweep is None or not _is_of_worker(error):
            raise
        logger.error(f"a job's process is gone, killed perhaps for want of memory or time: {one_line(error, stage)}")
        sweep.interrupted()
        return 2
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        return _failed(UserError(one_line(error, stage)))
    if sweep is not None:
        return sweep.end()
    for raised in job.errors:
        return _failed(raised if isinstance(raised, LostPeers) else refusal_of(raised, stage) or raised)
    return 0


def attempt(work: Callable[[], object]) -> int:
    """Do what needs no configuration and return the exit code, as `launch` does: 0, 2 (one line says what to mend) or
    130. Our bug is raised."""
    log_to_stderr()
    try:
        work()
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except (UserError, OSError) as error:
        refusal = refusal_of(error, "")
        if refusal is None:
            raise
        logger.error(refusal)
        return 2
    return 0


def _failed(error: Exception) -> int:
    """Say why a command without -m has failed. -> its exit code. Of several ranks that failed of the same, one says it.
    Raises what is our bug."""
    if isinstance(error, LostPeers):
        lost = f"rank {ranks.number()} lost the others: {error}; the one that failed, or the launcher, says why"
        (logger.info if ranks.number() else logger.error)(lost)
        ranks.await_launcher()
        return 1
    is_bug = not isinstance(error, UserError)
    if ranks.number():
        ranks.await_launcher()
        logger.error("crashed" if is_bug else str(error), exc_info=error if is_bug else None)
    elif not is_bug:
        logger.error(error)
    ranks.tell_launcher(f"{type(error).__name__}: {error}" if is_bug else str(error))
    if is_bug and not ranks.number():
        raise error
    return 1 if is_bug else 2


def _is_of_worker(error: RuntimeError) -> bool:
    """Whether a launcher says that the process of a job has ended before the job."""
    return isinstance(error, BrokenExecutor) or type(error).__module__.startswith("submitit.")


def _run_hydra(
    stage: str, request: Request, words: list[str], task: Callable[[DictConfig], None], more: dict[str, str]
) -> None:
    """more: settings of Hydra's own, which words of the same key replace."""
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    quiet = [f"{key}={value}" for key, value in (QUIET | more).items() if key not in keys]
    with tempfile.TemporaryDirectory(prefix="clt-sweep-") as folder, _swapped_argv_and_environment() as argv:
        if "hydra.sweep.dir" not in keys:
            quiet.append(f"hydra.sweep.dir={QuotedString(folder, Quote.single).with_quotes()}")  # its multirun.yaml
        argv[:] = request.argv(stage, [*quiet, *words])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=stage)(task)()


@contextmanager
def _swapped_argv_and_environment() -> Iterator[list[str]]:
    """hydra.main reads sys.argv, and with HYDRA_FULL_ERROR it raises its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [], "1"
    try:
        yield sys.argv
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
