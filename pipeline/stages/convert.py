"""`clt convert`: a finished run whose rule ranks features -> a run with the same weights that is JumpReLU.

clt convert run=runs/demo to=demo-jumprelu
clt convert run=runs/demo convert.thresholds=per_layer
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.core.activations import FixedThreshold
from pipeline.core.options import ActivationOptions
from pipeline.data import caches
from pipeline.data.address import cache_place
from pipeline.data.cache import Cache
from pipeline.data.models import resolve_device
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.plain import to_plain
from pipeline.stages.options import ConvertConfig, Thresholds
from pipeline.train import artifact, calibrate, inputs
from pipeline.train import run as runs
from pipeline.train.artifact import Trained

logger = logging.getLogger(__name__)


def run(cfg: ConvertConfig) -> Path:
    """Calibrate, measure before and after, and write a run directory. -> it"""
    source = runs.chosen(cfg.run)
    trained = artifact.read(source)
    rule = trained.exact()
    if rule is None:
        name = trained.config["activation"]["name"]
        raise UserError(
            f"{source} was trained with activation={name}, whose thresholds are its own; "
            "only topk, batchtopk and batchtopk_across are converted"
        )
    request = trained.config["cache"]["request"]
    cache = caches.with_key(cache_place(cfg.cache), trained.config["cache"]["key"], request)
    device = resolve_device(cfg.device)
    cfg.run = str(source)
    cfg.to = cfg.to or f"{source.name}-jumprelu"
    target = runs.begin(runs.place(cfg.to), cfg, key="to")
    if runs.finished(target):
        logger.info("%s is finished already\nnext: clt eval run=%s", target, target)
        return target
    batch, seed = trained.config["train"]["batch_tokens"], trained.config["train"]["seed"]
    rule.to(device)
    x, _ = _rows(trained, cache, Split.calibration, device)
    theta = THRESHOLDS[cfg.convert.thresholds](rule, x, batch, seed)
    converted = rule.under(FixedThreshold(theta)).eval()
    n_tokens = x.shape[0]
    x, y = _rows(trained, cache, Split.evaluation, device)
    unit = torch.ones((), device=device)
    before = calibrate.measure(rule, x, y, unit, batch, seed)
    after = calibrate.measure(converted, x, y, unit, batch, seed)
    name = trained.config["activation"]["name"]
    logger.info("held out   %s: L0 %.2f, FVU %.4f", name, before["l0"], before["fvu"])
    logger.info("           jumprelu, %s: L0 %.2f, FVU %.4f", cfg.convert.thresholds, after["l0"], after["fvu"])
    calibration = {
        "calibration_tokens": n_tokens, "evaluation_tokens": x.shape[0], "exact": before, "threshold": after
    }  # fmt: skip
    artifact.save(target, converted, theta, trained.y_mean, _described(trained, cfg, calibration))
    logger.info(
        "%s\nnext: clt eval run=%s, or clt train activation=jumprelu train.init_from=%s", target, target, target
    )
    return target


THRESHOLDS = {Thresholds.per_feature: calibrate.thresholds, Thresholds.per_layer: calibrate.layer_thresholds}
"""(transcoder with its rule, calibration inputs, batch, seed) -> theta [L, F]"""


def _rows(trained: Trained, cache: Cache, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """x, y [n, L, D] of a held-out split in the model's units, on the device."""
    _, resid_mid, mlp_out = cache.held_out(split)
    x, y = inputs.pair(trained.site, trained.target, cache.norm, resid_mid.float(), mlp_out.float())
    return x.to(device), y.to(device)


def _described(trained: Trained, cfg: ConvertConfig, calibration: dict[str, Any]) -> dict[str, Any]:
    """config.json of the new run: that of the old one, with the rule that it has now and where it came from."""
    kept = {key: value for key, value in trained.config.items() if key != "schema"}
    return kept | {
        "activation": to_plain(ActivationOptions("jumprelu")),
        "calibration": calibration,
        "converted": {
            "from": str(trained.path),
            "activation": trained.config["activation"],
            "thresholds": cfg.convert.thresholds.value,
        },
    }
