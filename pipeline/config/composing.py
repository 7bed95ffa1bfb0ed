"""From prepared words to the typed configuration of a command.

`typed` merges what Hydra composed into the dataclass of the command, so that a wrong key, type or choice is caught
here, once, and gives a run its name. `with_jobs` and `with_own_settings` add what other commands and earlier runs say:
the runs that a comparison trains, the settings that a continued run was begun with.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline import ranks
from pipeline.config.refusals import one_line
from pipeline.config.table import CONF, STAGES, Config, WithoutCache
from pipeline.config.words import prepare
from pipeline.errors import UserError
from pipeline.stages.options import CompareConfig, TrainConfig


def compose(stage: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> Config:
    """The configuration that `clt <stage> <overrides>` would run with, for Python callers and tests.

    Raises UserError where the command line would print its one line.
    """
    try:
        words = prepare(stage, overrides, config_dir)
        words += [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose(stage, words, return_hydra_config=True)
            choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                del cfg["hydra"]
            config = typed(stage, cfg, choices, job=None, bases={})
        return with_own_settings(with_jobs(config, words), words)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(one_line(error, stage)) from error


def typed(
    stage: str,
    cfg: DictConfig,
    choices: dict[str, str | None],
    job: int | None,
    bases: dict[str, str],
    base: str | None = None,
) -> Config:
    """The command's dataclass, with its run's name filled in. base: that of a sweep's runs, where it is decided."""
    # Merged once more, since `+key=value` and a root without the schema in its defaults pass Hydra unchecked.
    try:
        checked = OmegaConf.merge(OmegaConf.structured(STAGES[stage].schema), OmegaConf.to_container(cfg))
        config: Config = OmegaConf.to_object(checked)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(one_line(error, stage)) from error
    if isinstance(config, TrainConfig):
        config.experiment = config.experiment or choices.get("experiment")
        config.name = base if config.name is None else config.name
        if config.name is None and ranks.world() > 1 and not (config.resume or config.dry_run):
            raise UserError(
                "a run of several ranks needs a name, so that they, and a restart, find the same; add name=..."
            )
        if config.name is None:
            label = config.experiment or choices.get("arch") or config.arch.name
            label = re.sub(r"[^\w.+-]+", "-", "compare" if isinstance(config, CompareConfig) else label)
            config.name = bases.setdefault(label, free_name(label))
        if job is not None:
            config.name = f"{config.name}/{job}"
    elif isinstance(config, WithoutCache):
        pass
    elif config.cache.path is not None:
        raise UserError(f"cache.path names what clt train reads, not clt {stage.replace('_', ' ')}; leave it out")
    return config


def with_jobs(config: Config, words: Sequence[str]) -> Config:
    """A comparison with what `clt train +experiment=X` and the same words, as Hydra sees them, would run with."""
    if not isinstance(config, CompareConfig):
        return config
    own = {"compare", "eval", "name", "jobs", "experiment", "newest_cache"}
    shared = [word for word in words if word.lstrip("+~").partition("=")[0].split(".")[0] not in own]
    for name in config.compare.experiments:
        begun = GlobalHydra.instance().is_initialized()  # on a command line, not in Python
        try:
            with nullcontext() if begun else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                composed = hydra.compose("train", [f"+experiment={name}", *shared])
            job = typed("train", composed, {"experiment": name}, job=None, bases={})
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"compare.experiments: {one_line(error, 'train')}") from error
        assert isinstance(job, TrainConfig)
        config.jobs[name] = job
    return config


def with_own_settings(config: Config, words: Sequence[str]) -> Config:
    """A training run that is named and no more, in the place of what the defaults say."""
    if type(config) is not TrainConfig:
        return config
    if not config.resume and not Path("runs", str(config.name), "config.yaml").exists():
        return config
    # Not before: what it needs takes as long to import as all that is needed here.
    from pipeline.stages.train_resume import continued

    return continued(config, words)


def free_name(label: str) -> str:
    n = 0
    while Path("runs", f"{label}-{n}").exists():
        n += 1
    return f"{label}-{n}"
