"""`clt eval`: run + held-out text + base model -> runs/NAME/eval/metrics.json.

clt eval run=runs/demo
clt eval run=runs/demo dataset=text dataset.path=other.txt
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

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
from pipeline.interp import evaluation, replacement
from pipeline.interp.evaluation import HeldOut
from pipeline.plain import from_plain
from pipeline.stages.options import Documents, EvalConfig
from pipeline.train import artifact, inputs
from pipeline.train import run as runs
from pipeline.train.artifact import Trained
from pipeline.train.calibrate import shuffled_batches

logger = logging.getLogger(__name__)


def run(cfg: EvalConfig) -> Path:
    """Measure a finished run; print a table and write metrics.json. -> its path"""
    directory = runs.chosen(cfg.run)
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
    basis = replacement.basis(trained.transcoder)
    models_of = {} if basis is None else {"threshold": replacement.replacement(lm, trained.transcoder)}
    in_order = iter(torch.arange(held_out.n_rows).split(batch))
    metrics = evaluation.features_and_reconstruction(trained.transcoder, held_out, in_order)
    by_rule = {}
    if exact is not None:
        shuffled = shuffled_batches(held_out.n_rows, batch, seed=0)
        by_rule = evaluation.features_and_reconstruction(exact, held_out, shuffled)
        if basis is not None and exact.activation.per_token:
            models_of["exact"] = replacement.replacement(lm, exact)
    replaced = evaluation.replacements(lm, models_of, trained.y_mean)
    results = evaluation.divergences(lm, replaced, held_out.contexts, held_out.n_rows, cfg.eval.batch_tokens)
    if basis is None:
        metrics |= {"replacement": None, "no_replacement": replacement.no_basis(trained.transcoder.options)}
    else:
        metrics["replacement"] = evaluation.replacement_metrics(results, "threshold", basis)
    if basis is not None and "exact" in models_of:
        by_rule["replacement"] = evaluation.replacement_metrics(results, "exact", basis)
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
    x, y = inputs.pair(trained.site, trained.target, cache.norm, resid_mid.float(), mlp_out.float())
    return HeldOut(contexts, x.shape[0], x, y), Split.evaluation


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
    x, y = inputs.pair(trained.site, trained.target, lm.mlp_norm(), resid_mid, mlp_out)
    return HeldOut(packed.contexts, packed.n_rows, x, y), f"{cfg.dataset.name}/{split or 'all'}"


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
    replaced, exact = metrics["replacement"] or {}, metrics.get("exact", {})
    exactly = exact.get("replacement", {})
    rows: list[tuple[str, float | None, float | None]] = [
        ("L0, all layers", metrics["l0"]["total"], exact.get("l0", {}).get("total")),
        ("dead features", metrics["dead_fraction"]["total"], exact.get("dead_fraction", {}).get("total")),
        ("explained variance", _pooled(metrics), _pooled(exact) if exact else None),
    ]
    if replaced:
        rows += [
            ("KL, nats per token", replaced["kl"], exactly.get("kl")),
            ("top-1 agreement", replaced["top1"], exactly.get("top1")),
            ("delta CE, nats", replaced["delta_ce"], exactly.get("delta_ce")),
            ("KL of zero ablation", replaced["kl_zero_ablation"], None),
            ("KL of mean ablation", replaced["kl_mean_ablation"], None),
        ]
    if replaced and "tasks" in metrics:
        mean = metrics["tasks"]["mean"]
        rows += [
            ("task accuracy", mean["threshold"], mean.get("exact")),
            ("  of the model itself", mean["original"], None),
        ]
    lines = [f"{metrics['n_tokens']:,} tokens, split {metrics['split']}"]
    lines.append(f"{'':24}{'thresholds':>12}" + (f"{'exact rule':>12}" if exact else ""))
    for label, value, other in rows:
        lines.append(f"{label:24}{_shown(value):>12}" + (f"{_shown(other):>12}" if exact else ""))
    if not replaced:
        lines.append(f"no replacement: {metrics['no_replacement']}")
    if "note" in replaced:
        lines.append(f"replacement is {replaced['basis']}: {replaced['note']}")
    explained, l0 = metrics["explained_variance"]["per_layer"], metrics["l0"]["per_layer"]
    if len(l0) == len(explained):
        by_layer = [f"{fires:.1f} / {_shown(ev)}" for fires, ev in zip(l0, explained, strict=True)]
        lines.append("by layer, L0 / explained variance: " + ", ".join(by_layer))
    else:  # one feature space over all layers
        lines.append("by layer, explained variance: " + ", ".join(map(_shown, explained)))
    return lines


def _pooled(metrics: dict[str, Any]) -> float | None:
    return metrics["explained_variance"]["pooled"]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
