"""The end of `clt train`: thresholds, folding, `runs/NAME/final/`."""

import logging
from pathlib import Path

from torch import Tensor

from pipeline.core import activations
from pipeline.data.cache import Cache
from pipeline.data.tokens import Split
from pipeline.dist.sharded import Ranks
from pipeline.plain import to_plain
from pipeline.stages.options import TrainConfig
from pipeline.stages.train_cache import statistics
from pipeline.stages.train_ranks import first
from pipeline.train import artifact, calibrate, checkpoint, precision
from pipeline.train.held_out import HeldOut
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.optimisers import settle
from pipeline.train.run_log import METRICS, last_line
from pipeline.train.run_plan import Plan

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""How far held-out L0 may lie from loss.target_l0 before the run says so."""


def finish(cfg: TrainConfig, cache: Cache, trainer: Trainer, metrics: dict[str, object]) -> None:
    """Thresholds from the calibration split, their L0 and FVU on the evaluation split, folding, runs/NAME/final."""
    settle(trainer.optimizer)
    precision.restore(trainer.model)
    model, prepare, batch, ranks = trainer.model.eval(), trainer.inputs, trainer.plan.part_tokens, trainer.ranks
    x = _held_out(cache, Split.calibration, prepare)[0]
    rank_norms = model.rank_norms()
    threshold = calibrate.thresholds(model, x, batch, cfg.train.seed)
    measured_x, measured_y = _held_out(cache, Split.evaluation, prepare)
    y_scale = prepare.scaling.y_scale
    before = calibrate.measure(model, measured_x, measured_y, y_scale, batch, cfg.train.seed, ranks)
    model.activation = activations.FixedThreshold(threshold)
    after = calibrate.measure(model, measured_x, measured_y, y_scale, batch, cfg.train.seed, ranks)
    logger.info("held out   %s: L0 %.2f, FVU %.4f", cfg.activation.name, before["l0"], before["fvu"])
    logger.info("           fixed thresholds: L0 %.2f, FVU %.4f", after["l0"], after["fvu"])
    _compare(cfg.loss.target_l0, after["l0"])
    model.fold(prepare.scaling)
    y_mean = statistics(cache, "mlp_out").mean  # ablation is of the MLPs, whatever is reconstructed
    config = {
        **artifact.describe(cfg.arch, model.dims, cfg.activation),
        "units": "model",
        "hooks": cache.hooks,
        "model": cache.model,
        "dataset": cache.dataset,
        "cache": {"key": cache.key, "path": str(cache.path), "request": cache.request},
        "train": to_plain(cfg.train),
        "calibration": {
            "calibration_tokens": x.shape[0],
            "evaluation_tokens": measured_x.shape[0],
            "exact": before,
            "threshold": after,
        },
        "metrics": metrics,
    }
    artifact.save(trainer.directory, model, threshold, y_mean, config, rank_norms, ranks.mesh, ranks.shard)


def _compare(target: float | None, l0: float | None) -> None:
    """Say so when a run missed the L0 that it aimed at."""
    if target is not None and l0 is not None and abs(l0 / target - 1) > TOLERANCE:
        other = "larger loss.sparsity" if l0 > target else "smaller loss.sparsity or a larger arch.init_firing"
        fix = f"a longer run, or a {other} to begin with, comes closer"
        logger.warning("held-out L0 is %.1f, loss.target_l0 was %g; %s", l0, target, fix)


def _held_out(cache: Cache, split: Split, prepare: Inputs) -> tuple[Tensor, Tensor]:
    _, resid_mid, mlp_out = cache.held_out(split)
    return prepare(resid_mid, mlp_out)


def held_out(cfg: TrainConfig, cache: Cache, plan: Plan, prepare: Inputs, ranks: Ranks) -> HeldOut:
    """What a run is measured on as it goes on, and its best checkpoints chosen by: the calibration split, since the
    evaluation split is neither looked at nor chosen by."""
    return HeldOut(
        lambda n: cache.held_out_rows(Split.calibration, n),
        prepare,
        cfg.log.held_out_rows,
        plan.part_tokens,
        plan.seed,
        ranks,
    )


def use_best(trainer: Trainer) -> dict[str, object]:
    """Put the weights of the best checkpoint into the model. -> what was logged of its steps last"""
    chosen = Path(first(trainer.ranks.mesh, lambda: str(checkpoint.best(trainer.directory)[0])))
    step = trainer.writer.load(chosen, trainer.model, trainer.optimizer).step
    trainer.ranks.bare(trainer.model)
    trainer.model.activation.at((step - 1) / trainer.plan.n_steps)
    logger.info("best       %s", chosen)
    return last_line(chosen / METRICS)
