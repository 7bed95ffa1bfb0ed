"""What `clt train` continues: a run under a name, or the unfinished one that was at work last."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from pipeline.dist import mesh as meshes
from pipeline.dist.mesh import Mesh
from pipeline.errors import UserError
from pipeline.files import take_lock
from pipeline.plain import from_plain
from pipeline.stages.options import TrainConfig
from pipeline.stages.train_ranks import first
from pipeline.train import run as runs
from pipeline.train.options import LogOptions

logger = logging.getLogger(__name__)

SHOWN = {key for key in runs.NO_EFFECT if key.startswith("log.")}
"""What `log=wandb` means to a run that goes on: where its lines are shown."""

BESIDE = (runs.NO_EFFECT | {"name", "log"}) - {"experiment"}
"""Settings that may be given when a run goes on with its own; an experiment brings others."""


def continued(cfg: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """What the command line means: where it names a run and nothing that changes one, that run's own settings.

    words: the overrides, as Hydra saw them. Raises UserError for resume=true without a name where no run is unfinished,
    or where settings are given.
    """
    keys = {word.lstrip("+~").partition("=")[0] for word in words}
    given = sorted(key for key in keys - BESIDE if not key.startswith("hydra"))
    if "name" not in keys:
        if not cfg.resume:
            return cfg
        if given:
            raise UserError(
                f"resume=true without name= continues the newest unfinished run with its own settings; leave out "
                f"{', '.join(given)}, or name the run"
            )
        cfg.name = runs.name_of(runs.newest_unfinished())
        logger.info("no run named: continuing the newest unfinished one, %s", runs.RUNS / cfg.name)
    assert cfg.name is not None
    saved = runs.saved(runs.RUNS / cfg.name)
    if saved is None or given or saved.keys() - {field.name for field in fields(TrainConfig)}:
        return cfg
    own = from_plain(TrainConfig, saved)
    if "log" in keys and _changes_lines(cfg, own):
        return cfg
    for key in (keys & BESIDE - {"log"}) | (SHOWN if "log" in keys else set()):
        _copy(key, cfg, own)
    own.name, own.dry_run, own.resume = cfg.name, cfg.dry_run, cfg.resume
    return own


def check_resume(cfg: TrainConfig) -> None:
    """UserError where `resume` insists on a run, or on none, and it is otherwise."""
    assert cfg.name is not None
    directory = runs.RUNS / cfg.name
    exists = runs.saved(directory) is not None
    if cfg.resume is True and not exists:
        raise UserError(f"resume=true: there is no {directory} to continue; leave resume out to begin it")
    if cfg.resume is False and exists:
        raise UserError(f"resume=false: {directory} exists already; choose another name=, or leave resume out")


@contextmanager
def alone(directory: Path, mesh: Mesh | None = None) -> Iterator[None]:
    """Hold a run directory, for all ranks of the mesh. Raises UserError while another process trains there; being
    killed releases it."""
    mesh = mesh or meshes.alone()
    held: list[int] = []
    first(mesh, lambda: held.append(take_lock(directory, directory)))
    try:
        yield
    finally:
        for lock in held:
            (directory / "lock").unlink(missing_ok=True)
            os.close(lock)


def _changes_lines(cfg: TrainConfig, own: TrainConfig) -> bool:
    """Whether a file of one's own for `log` says other things than where lines are shown."""
    usual = LogOptions()
    names = [field.name for field in fields(LogOptions) if f"log.{field.name}" not in SHOWN]
    return any(getattr(cfg.log, name) not in (getattr(own.log, name), getattr(usual, name)) for name in names)


def _copy(key: str, source: object, target: object) -> None:
    """One setting, by its dotted key."""
    *path, name = key.split(".")
    for part in path:
        source, target = getattr(source, part), getattr(target, part)
    setattr(target, name, getattr(source, name))
