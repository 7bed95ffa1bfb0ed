"""What `clt train` says as it begins and ends."""

import json
import logging
from pathlib import Path

import torch

from pipeline.arch.base import Transcoder
from pipeline.core import products
from pipeline.data.cache import Cache
from pipeline.data.layout import gb
from pipeline.data.mlps import Mlps
from pipeline.stages.options import TrainConfig
from pipeline.train.run_plan import Plan

logger = logging.getLogger(__name__)


def beginning(
    cfg: TrainConfig, cache: Cache, plan: Plan, model: Transcoder, device: torch.device, last: Path | None
) -> None:
    """What is trained, on what, for how long."""
    parameters = sum(p.numel() for p in model.parameters())
    logger.info("cache      %s: %s rows, %d layers of %d", cache.path, f"{cache.n_rows:,}", *model.dims)
    logger.info(
        "transcoder %s, %s x %d features, %s to %s, %s parameters, on %s",
        cfg.arch.name,
        cfg.activation.name,
        model.d_features,
        cfg.arch.site,
        cfg.arch.writes,
        f"{parameters:,}",
        device,
    )
    tokens = plan.n_steps * plan.batch_tokens
    logger.info(
        "run        runs/%s: %s steps of %s tokens, %.1f passes over the cache",
        cfg.name,
        f"{plan.n_steps:,}",
        f"{plan.batch_tokens:,}",
        tokens / cache.n_rows,
    )
    if last is not None:
        logger.info("continuing from %s", last)


def kernels(last: Path) -> None:
    """Say so when a run that began with other kernels is continued, on a machine without a compiler, say."""
    before, now = json.loads((last / "state.json").read_text()).get("kernels"), str(products.active())
    if before not in (None, now):
        logger.warning(
            "%s was made with train.kernels=%s and goes on with %s, which round differently: the result will differ in "
            "last bits from that of a run which was never stopped", last, before, now,
        )  # fmt: skip


def targets(mlps: Mlps, batch_tokens: int) -> None:
    """What recomputing costs, timed on a batch."""
    logger.info(
        "targets    recomputed from resid_mid: %s MFLOP a token, %s tokens/s alone, %s of weights, %s",
        f"{mlps.flops / 1e6:,.3g}",
        f"{mlps.rows_per_second(batch_tokens):,.0f}",
        gb(mlps.n_bytes),
        str(mlps.dtype).removeprefix("torch."),
    )


def share_of_targets(directory: Path) -> None:
    """How much of the steps it was, at the end."""
    lines = [json.loads(line) for line in (directory / "timings.jsonl").read_text().splitlines()]
    targets, steps = (sum(line[key] for line in lines if "targets_ms" in line) for key in ("targets_ms", "step_ms"))
    if steps:
        logger.info("targets    recomputing them took %.0f %% of the training steps", 100 * targets / steps)
