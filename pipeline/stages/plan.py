"""`clt plan`: what a training run on many ranks would hold, send and take, without a cache and without the ranks.

clt plan model=llama-3.2-1b arch.d_features=65536 activation.k=64 train.batch_tokens=4096 dist.world=64
clt plan plan.n_layers=16 plan.d_model=2048 plan.expansion=32 dist=feature_shard dist.world=8
clt plan plan.models=[gpt2,llama-3.2-1b,llama-3.1-8b] plan.worlds=[8,64] plan.expansion=32

It takes the settings of `clt train`, and says of them what `clt train --dry-run dist.world=N` says.
"""

import logging
from dataclasses import replace
from pathlib import Path

from pipeline.arch.base import Dims
from pipeline.data.model_sizes import sizes
from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.files import write_report
from pipeline.stages import plan_say, train_plan
from pipeline.stages.plan_options import PlanConfig
from pipeline.stages.train_plan import Planned

logger = logging.getLogger(__name__)

SIZES = {"gpt2": Dims(12, 768), "llama-3.2-1b": Dims(16, 2048), "llama-3.1-8b": Dims(32, 4096)}
"""From the models' configurations."""


def run(cfg: PlanConfig) -> Path | None:
    """Print the plan, or a table of plans. -> the JSON file, where one was asked for"""
    _check(cfg)
    here = 1 if cfg.dist.world is None else cfg.dist.world
    if cfg.plan.models:
        worlds = cfg.plan.worlds or [here]
        found = {(name, world): _planned(cfg, SIZES[name], world) for name in cfg.plan.models for world in worlds}
        for line in plan_say.table(found):
            logger.info(line)
        logger.info("rates: %s", next(iter(found.values())).rates_from)
    else:
        dims, name = Dims(cfg.plan.n_layers or 0, cfg.plan.d_model or 0), "a model"
        if cfg.plan.n_layers is None:
            dims, name = Dims(*sizes(cfg.model)), cfg.model.name
        logger.info("%s: %d layers of %d; %s, %s", name, *dims, cfg.arch.name, cfg.activation.name)
        found = {(name, here): _planned(cfg, dims, here)}
        plan_say.say(found[name, here], cfg)
    if cfg.to is None:
        return None
    file = Path(cfg.to)
    write_report(file, {f"{name} on {world}": plan_say.report(one) for (name, world), one in found.items()})
    logger.info("%s", file)
    return file


def _check(cfg: PlanConfig) -> None:
    options = cfg.plan
    if (options.n_layers is None) != (options.d_model is None):
        raise UserError("plan.n_layers and plan.d_model go together; give both, or name a model=")
    for name in ("n_layers", "d_model", "expansion"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"plan.{name}={value} must be at least 1")
    for name in options.models:
        if name not in SIZES:
            raise UserError(
                f"plan.models: {name} is not written down; choose from {', '.join(SIZES)}, or name a model="
            )
    if options.models and options.n_layers is not None:
        raise UserError("plan.models and plan.n_layers both say what is planned for; leave one out")
    if options.worlds and not options.models:
        raise UserError("plan.worlds goes with plan.models; use dist.world, or -m dist.world=8,64")
    if not 0 <= options.dead <= 1:
        raise UserError(f"plan.dead={options.dead} is a share of the features and must lie in [0, 1]")
    if options.device not in ("cpu", "cuda"):
        raise UserError(f"plan.device={options.device} must be cpu or cuda")
    if cfg.train.batch_tokens < 1 or cfg.train.accumulate < 1 or cfg.train.batch_tokens % cfg.train.accumulate:
        raise UserError(
            f"train.accumulate={cfg.train.accumulate} must be 1 or more and divide "
            f"train.batch_tokens={cfg.train.batch_tokens}, into equal parts"
        )


def _for(cfg: PlanConfig, dims: Dims, world: int) -> PlanConfig:
    """The settings for a width and a number of ranks."""
    expansion = cfg.plan.expansion
    arch = cfg.arch if expansion is None else replace(cfg.arch, d_features=expansion * dims.d_model)
    return replace(cfg, arch=arch, dist=replace(cfg.dist, world=world))


def _planned(cfg: PlanConfig, dims: Dims, world: int) -> Planned:
    options = cfg.train
    if (options.n_tokens is None) == (options.n_steps is None):
        raise UserError("give the length of the run once: train.n_tokens or train.n_steps, the other null")
    n_steps = options.n_steps or max(1, count(options.n_tokens or "1") // options.batch_tokens)
    return train_plan.planned(_for(cfg, dims, world), dims, n_steps, cfg.plan)
