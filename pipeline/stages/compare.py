"""`clt compare`: experiments side by side, at equal parameters, L0 and tokens, several seeds each, on one cache.

clt compare name=all compare.experiments=[topk,batchtopk] compare.seeds=[0,1,2] compare.l0=64 train.n_tokens=400k

It trains runs/NAME/<experiment>-<seed> and evaluates it, one after the other, exactly as `clt train` and `clt eval`
would: what is finished is left as it is, so the same command goes on after any stop.
"""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.arch import init, size, table
from pipeline.arch.base import Dims
from pipeline.core import activations
from pipeline.data.cache import Cache
from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.stages import compare_table, evaluate, train
from pipeline.stages.compare_table import Row
from pipeline.stages.options import CompareConfig, EvalConfig, TrainConfig
from pipeline.stages.train_cache import named_or_newest, take_on
from pipeline.train import run as runs

logger = logging.getLogger(__name__)


def run(cfg: CompareConfig) -> Path:
    """Train and evaluate every experiment with every seed. -> runs/NAME/compare.md"""
    assert cfg.name is not None
    _check(cfg)
    cache = named_or_newest(cfg, cfg.newest_cache)
    dims = Dims(cache.n_layers, cache.d_model)
    jobs = {name: _matched(cfg, name, job, cache, dims) for name, job in cfg.jobs.items()}
    for name, job in jobs.items():
        logger.info("%s: %s", name, _said(job, dims))
    directory = runs.RUNS / cfg.name
    rows: list[Row] = []
    failed: list[str] = []
    for seed in cfg.compare.seeds:
        for name, job in jobs.items():
            try:
                rows.append(_one(cfg, name, job, seed, dims))
            except UserError as error:
                logger.error("%s-%d: %s", name, seed, error)
                failed.append(f"{name}-{seed}")
            if rows:
                _write(directory, rows, list(jobs))
    if failed:
        raise UserError(
            f"{', '.join(failed)} failed, the others are in {directory}; mend that and run the command again"
        )
    for line in compare_table.markdown(rows, list(jobs)).splitlines():
        logger.info(line)
    return directory / "compare.md"


def _check(cfg: CompareConfig) -> None:
    """UserError for settings that no comparison can be made of."""
    options = cfg.compare
    if not cfg.jobs:
        raise UserError("nothing to compare; name experiments, such as compare.experiments=[topk,batchtopk]")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise UserError(f"compare.seeds={options.seeds} must be different numbers, such as [0,1,2]")
    if cfg.train.n_tokens is None:
        raise UserError("experiments are compared at equal tokens; give train.n_tokens in place of train.n_steps")
    if options.l0 is not None and options.l0 < 1:
        raise UserError(f"compare.l0={options.l0} must be at least 1")


def _matched(cfg: CompareConfig, name: str, job: TrainConfig, cache: Cache, dims: Dims) -> TrainConfig:
    """The experiment with this cache, and the tokens, L0 and parameters of all."""
    job = copy.deepcopy(job)
    job.cache, job.newest_cache, job.experiment = replace(cfg.cache), False, name
    take_on(job, cache)
    job.train.n_tokens, job.train.n_steps = cfg.train.n_tokens, None
    if cfg.compare.l0 is not None:
        _match_l0(name, job, cfg.compare.l0, dims)
    if cfg.compare.parameters is not None:
        wanted = count(cfg.compare.parameters)
        job.arch.d_features = size.d_features_for(job.arch, dims, job.activation, wanted)
    with torch.device("meta"):  # refused now rather than when others are trained
        train.build(job, dims)
    if job.train.init_from is None:
        init.check(job.arch, job.activation.name, cache.n_rows)
    return job


def _match_l0(name: str, job: TrainConfig, l0: int, dims: Dims) -> None:
    """Set k, or the target of the penalty's controller, such that a token has l0 active features in all."""
    if not activations.ACTIVATIONS[job.activation.name].chooses:
        job.loss.target_l0 = l0
        return
    spaces = table.n_sources(job.arch, dims)
    if l0 % spaces:
        raise UserError(
            f"compare.l0={l0} does not divide by the {spaces} layers that {name} has a k for; "
            f"use {l0 - l0 % spaces or spaces} or {l0 - l0 % spaces + spaces}"
        )
    if job.activation.k_per_layer is not None:
        raise UserError(
            f"compare.l0={l0} sets activation.k, and {name} has activation.k_per_layer; leave one of them out"
        )
    job.activation.k = l0 // spaces


def _said(job: TrainConfig, dims: Dims) -> str:
    parameters = size.n_parameters(job.arch, dims, job.activation)
    return f"{job.arch.d_features:,} features, {parameters:,} parameters, L0: {basis(job, dims)}"


def basis(job: TrainConfig, dims: Dims) -> str:
    """What fixes the number of active features of this experiment, and over which feature spaces they are counted."""
    spaces = table.n_sources(job.arch, dims)
    where = f"{spaces} layers" if spaces == dims.n_layers else f"{spaces} space{'s' if spaces > 1 else ''} in all"
    if job.activation.k is not None:
        return f"k={job.activation.k} x {where}"
    if job.activation.k_per_layer is not None:
        return f"k={job.activation.k_per_layer} of {where}"
    target = job.loss.target_l0
    return f"target {target:g} over {where}" if target is not None else f"what the penalty makes of it, {where}"


def _one(cfg: CompareConfig, name: str, job: TrainConfig, seed: int, dims: Dims) -> Row:
    """Train and evaluate, or find that it is done."""
    job = copy.deepcopy(job)
    job.name, job.train.seed = f"{cfg.name}/{name}-{seed}", seed
    directory = train.run(job)
    file = directory / "eval" / "metrics.json"
    if not file.exists():
        evaluate.run(EvalConfig(cfg.cache, copy.deepcopy(cfg.eval), run=str(directory), device=job.train.device))
    parameters = size.n_parameters(job.arch, dims, job.activation)
    return compare_table.row(directory, name, seed, job.arch.name, parameters, basis(job, dims))


def _write(directory: Path, rows: list[Row], order: list[str]) -> None:
    """compare.json, .csv and .md, whole or not at all."""
    about: dict[str, Any] = {"rows": rows, "summary": compare_table.summary(rows, order)}
    texts = {
        "json": json.dumps(about, indent=2) + "\n",
        "csv": compare_table.csv_text(rows),
        "md": compare_table.markdown(rows, order),
    }
    for kind, text in texts.items():
        write_aside(directory / f"compare.{kind}", text.encode())
