"""Sweeps (`-m`): what they are called, where their jobs are noted, and what a launcher of other machines is told."""

import logging
import re
import shlex
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from pipeline.config.composing import free_name
from pipeline.config.refusals import refusal_of
from pipeline.config.request import Request
from pipeline.config.table import CONF
from pipeline.config.words import choices_of, experiment_bodies, named_in, read_yaml
from pipeline.stages import slurm
from pipeline.stages.sweep import Sweep

logger = logging.getLogger(__name__)


def new_sweep(stage: str, request: Request, words: list[str]) -> Sweep:
    """The jobs of -m. Those of training that write anything are noted in runs/NAME/sweep.yaml."""
    flags = ["--config-dir", str(request.config_dir)] if request.config_dir else []
    flags += ["--config-name", request.config_name] if request.config_name else []
    given = list(request.overrides)
    is_dry = [word.partition("=")[2] for word in given if word.lstrip("+").startswith("dry_run=")][-1:] == ["true"]
    directory = None
    if stage == "train" and not is_dry:
        name = sweep_name(request, words)
        if Path("runs").resolve() in Path("runs", name).resolve().parents:  # else each job is refused
            directory = Path("runs", name)
        given += [] if named_in(given, "name") else [f"name={name}"]
    again = shlex.join(["clt", *stage.split("_"), "-m", *flags, *given])
    now = datetime.now().isoformat(timespec="microseconds")
    return Sweep(again, tuple(words), partial(refusal_of, stage=stage), directory, now)


def sweep_name(request: Request, words: list[str]) -> str:
    """`name`, wherever it is given; else one after the experiment or the architecture, if there is but one, that is
    free."""
    for word in reversed(request.overrides):
        if word.lstrip("+").startswith("name="):
            return word.partition("=")[2]
    bodies = [
        read_yaml(request.config_name or "train", request.config_dir),
        *experiment_bodies(words, request.config_dir),
    ]
    for body in reversed(bodies):
        if isinstance(body.get("name"), str):
            return str(body["name"])
    labels = choices_of(words, "experiment") or choices_of(words, "arch") or ["clt"]
    return free_name(re.sub(r"[^\w.+-]+", "-", labels[0]) if len(labels) == 1 else "sweep")


def of_launcher(words: list[str], directory: Path, name: str) -> dict[str, str]:
    """Settings for a launcher that hands jobs to other machines: its folder is to be where the runs are, and with Slurm
    a task that fails ends the others of its job, as torchrun does."""
    chosen = choices_of(words, "hydra/launcher")
    if chosen not in (["submitit_slurm"], ["submitit_local"]):
        return {}
    logger.info(f"the jobs write to {directory / '.submitit'}/*/*_log.err")
    own = {"submitit_folder": str(directory / ".submitit" / "%j"), "name": name}
    settings = {
        f"hydra.launcher.{key}": str(QuotedString(value, Quote.single).with_quotes()) for key, value in own.items()
    }
    if chosen == ["submitit_slurm"]:
        settings["hydra.launcher.setup"] = "['export SLURM_KILL_BAD_EXIT=1']"
    return settings


def is_of_launcher(word: str) -> bool:
    return re.match(r"\+{0,2}hydra[/.]launcher\b", word) is not None


def tasks(stage: str, words: list[str]) -> int:
    """Processes that a launcher starts for a job."""
    if choices_of(words, "hydra/launcher") not in (["submitit_slurm"], ["submitit_local"]):
        return 1
    settings = _launcher(stage, words)
    return int(settings.get("nodes") or 1) * int(settings.get("tasks_per_node") or 1)


def show_sbatch(stage: str, words: list[str], directory: Path, name: str, n_jobs: int) -> None:
    """Say what Slurm would be given for the jobs of a sweep."""
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    more = [f"{key}={value}" for key, value in of_launcher(words, directory, name).items() if key not in keys]
    logger.info("for Slurm, as sbatch is given it:\n%s", slurm.sbatch_text(_launcher(stage, [*words, *more]), n_jobs))


def _launcher(stage: str, words: list[str]) -> dict[str, Any]:
    """The settings of Hydra's launcher."""
    given = [word for word in words if is_of_launcher(word)]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = hydra.compose(stage, given, return_hydra_config=True).hydra.launcher
    return {str(key): value for key, value in OmegaConf.to_container(launcher).items()}  # type: ignore[union-attr]
