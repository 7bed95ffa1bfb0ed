"""`clt eval`: run + held-out text + base model -> runs/NAME/eval/metrics.json.

clt eval run=runs/demo
clt eval run=runs/demo dataset=text dataset.path=other.txt
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.core.normalize import MlpNorm
from pipeline.data import cache as caches
from pipeline.data import models, tokens
from pipeline.data.address import cache_place
from pipeline.data.harvest import Buffers, harvest
from pipeline.data.model_files import BUILTIN
from pipeline.data.models import LanguageModel
from pipeline.data.options import DatasetKind, ModelOptions
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.interp import evaluation
from pipeline.interp.evaluation import HeldOut
from pipeline.interp.replacement import ReplacementModel
from pipeline.plain import from_plain
from pipeline.stages.options import Documents, EvalConfig
from pipeline.train import artifact
from pipeline.train import run as runs
from pipeline.train.artifact import Trained
from pipeline.train.calibrate import shuffled_batches

logger = logging.getLogger(__name__)


def run(cfg: EvalConfig) -> Path:
    """Measure a finished run; print a table and write metrics.json. -> its path"""
    directory = runs.named(cfg.run) if cfg.run else runs.newest()
    if not cfg.run:
        logger.info("no run named: using the newest, %s", directory)
    trained = artifact.read(directory)
    asked = trained.config["cache"]["request"]["model"]
    revision = trained.config["model"]["revision"] or asked["revision"]  # the commit, where a branch was asked for
    lm_options = from_plain(ModelOptions, {**asked, "device": cfg.device, "revision": revision})
    cached = _cached(cfg, trained) if cfg.dataset is None else None
    lm = models.load(lm_options)
    _same_model(trained, lm)
    trained.transcoder.to(lm.device)
    held_out, split = cached or _other_text(cfg, trained, lm)
    held_out = _limit(held_out, cfg.eval.n_contexts)
    metrics = {**_measure(cfg, trained, lm, held_out), "n_tokens": held_out.n_rows, "split": split}
    file = _write(directory, metrics, cfg)
    for line in table(metrics):
        logger.info(line)
    logger.info("%s\nnext: clt train with other settings, or in Python: pipeline.load(%r)", file, str(directory))
    return file


def _measure(cfg: EvalConfig, trained: Trained, lm: LanguageModel, held_out: HeldOut) -> dict[str, Any]:
    batch = trained.config["train"]["batch_tokens"]
    exact = trained.exact()
    live = {"threshold": ReplacementModel(lm, trained.transcoder, trained.site)}
    in_order = iter(torch.arange(held_out.n_rows).split(batch))
    metrics = evaluation.features_and_reconstruction(trained.transcoder, held_out, in_order)
    by_rule = {}
    if exact is not None:
        shuffled = shuffled_batches(held_out.n_rows, batch, seed=0)
        by_rule = evaluation.features_and_reconstruction(exact, held_out, shuffled)
        if exact.activation.per_token:
            live["exact"] = ReplacementModel(lm, exact, trained.site)
    replaced = evaluation.replacements(lm, live, trained.y_mean)
    results = evaluation.divergences(lm, replaced, held_out.contexts, held_out.n_rows, cfg.eval.batch_tokens)
    metrics["replacement"] = evaluation.replacement_metrics(results, "threshold")
    if "exact" in live:
        by_rule["replacement"] = evaluation.replacement_metrics(results, "exact")
    if by_rule:
        metrics["exact"] = by_rule
    if lm.path == BUILTIN:
        metrics["tasks"] = evaluation.world_tasks(lm, replaced)
    return metrics


def _cached(cfg: EvalConfig, trained: Trained) -> tuple[HeldOut, str]:
    """The evaluation split of the cache that the run was trained on."""
    key, request = trained.config["cache"]["key"], trained.config["cache"]["request"]
    cache = caches.with_key(cache_place(cfg.cache), key, request)
    contexts, resid_mid, mlp_out = cache.held_out(Split.evaluation)
    x = _site(trained.site, resid_mid.float(), cache.norm)
    return HeldOut(contexts, x.shape[0], x, mlp_out.float()), Split.evaluation


def _other_text(cfg: EvalConfig, trained: Trained, lm: LanguageModel) -> tuple[HeldOut, str]:
    """Another text, its activations collected now."""
    assert cfg.dataset is not None
    lm.check_context(cfg.dataset.context)
    held_out_only = cfg.eval.documents == Documents.held_out or cfg.dataset.kind == DatasetKind.world
    split = Split.evaluation if held_out_only else None
    packed = tokens.pack_other(cfg.dataset, lm.tokenizer, tokens.bos_of(cfg.dataset, lm.tokenizer), split)
    buffers = Buffers(lm, packed.contexts.shape[1], cfg.eval.batch_tokens, n=1)
    rows = harvest(lm, packed, range(len(packed.contexts)), buffers)
    kept = [(block.resid_mid.float().cpu(), block.mlp_out.float().cpu()) for block in rows]
    resid_mid, mlp_out = (torch.cat(site) for site in zip(*kept, strict=True))
    x = _site(trained.site, resid_mid, lm.mlp_norm())
    return HeldOut(packed.contexts, packed.n_rows, x, mlp_out), f"{cfg.dataset.name}/{split or 'all'}"


def _site(site: Site, resid_mid: Tensor, norm: MlpNorm) -> Tensor:
    return norm(resid_mid) if site == Site.mlp_in else resid_mid


def _limit(held_out: HeldOut, n_contexts: int | None) -> HeldOut:
    if n_contexts is None or n_contexts >= held_out.contexts.shape[0]:
        return held_out
    if n_contexts < 1:
        raise UserError(f"eval.n_contexts={n_contexts} must be at least 1")
    n_rows = min(held_out.n_rows, n_contexts * (held_out.contexts.shape[1] - 1))
    return HeldOut(held_out.contexts[:n_contexts], n_rows, held_out.x[:n_rows], held_out.y[:n_rows])


def _same_model(trained: Trained, lm: LanguageModel) -> None:
    expected, found = trained.config["model"]["weights_sha256"], lm.weights_hash()
    if expected != found:
        raise UserError(
            f"{trained.path} was trained on other weights of {lm.name} ({expected[:12]}, now {found[:12]}); "
            "restore those weights or extract and train again"
        )


def _write(directory: Path, metrics: dict[str, Any], cfg: EvalConfig) -> Path:
    name = "metrics.json" if cfg.dataset is None else f"metrics-{cfg.dataset.name}.json"
    file = directory / "eval" / name
    file.parent.mkdir(exist_ok=True)
    write_aside(file, (json.dumps(metrics, indent=2) + "\n").encode())
    return file


def table(metrics: dict[str, Any]) -> list[str]:
    """The headline numbers as lines of text."""
    replacement, exact = metrics["replacement"], metrics.get("exact", {})
    rows: list[tuple[str, float | None, float | None]] = [
        ("L0, all layers", metrics["l0"]["total"], exact.get("l0", {}).get("total")),
        ("dead features", metrics["dead_fraction"]["total"], exact.get("dead_fraction", {}).get("total")),
        ("explained variance", _pooled(metrics), _pooled(exact) if exact else None),
        ("KL, nats per token", replacement["kl"], exact.get("replacement", {}).get("kl")),
        ("top-1 agreement", replacement["top1"], exact.get("replacement", {}).get("top1")),
        ("delta CE, nats", replacement["delta_ce"], exact.get("replacement", {}).get("delta_ce")),
        ("KL of zero ablation", replacement["kl_zero_ablation"], None),
        ("KL of mean ablation", replacement["kl_mean_ablation"], None),
    ]
    if "tasks" in metrics:
        mean = metrics["tasks"]["mean"]
        rows += [
            ("task accuracy", mean["threshold"], mean.get("exact")),
            ("  of the model itself", mean["original"], None),
        ]
    lines = [f"{metrics['n_tokens']:,} tokens, split {metrics['split']}"]
    lines.append(f"{'':24}{'thresholds':>12}" + (f"{'exact rule':>12}" if exact else ""))
    for label, value, other in rows:
        lines.append(f"{label:24}{_shown(value):>12}" + (f"{_shown(other):>12}" if exact else ""))
    per_layer = zip(metrics["l0"]["per_layer"], metrics["explained_variance"]["per_layer"], strict=True)
    lines.append("by layer, L0 / explained variance: " + ", ".join(f"{l0:.1f} / {_shown(ev)}" for l0, ev in per_layer))
    return lines


def _pooled(metrics: dict[str, Any]) -> float | None:
    return metrics["explained_variance"]["pooled"]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
