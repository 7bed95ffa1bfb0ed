"""`clt eval`: run + held-out text + base model -> runs/NAME/eval/metrics.json.

clt eval run=runs/demo
clt eval run=runs/demo dataset=text dataset.path=other.txt
torchrun --nproc-per-node=4 -m pipeline eval run=runs/demo
torchrun --nproc-per-node=4 -m pipeline eval run=runs/wide dist=feature_shard

Several ranks divide the text, or the transcoder's features, or both, and come by the same sums; rank 0 makes the
numbers of them, and the files.
"""

import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site, Target
from pipeline.core import metrics_weights
from pipeline.core.metrics import Tree
from pipeline.core.normalize import MlpNorm
from pipeline.data import caches, tokens
from pipeline.data.address import cache_place
from pipeline.data.harvest import Buffers, harvest
from pipeline.data.model_files import BUILTIN
from pipeline.data.model_loading import resolve_device
from pipeline.data.models import LanguageModel
from pipeline.data.options import DatasetKind
from pipeline.data.tokens import Packed, Split
from pipeline.dist import pieces
from pipeline.dist.wire import Group
from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.interp import contexts, curves, evaluation, faithfulness, opening, replacement, world_truth
from pipeline.interp.contexts import Contexts
from pipeline.interp.evaluation import HeldOut
from pipeline.progress import Progress
from pipeline.ranks import log_into
from pipeline.stages import evaluate_ranks
from pipeline.stages.evaluate_table import table
from pipeline.stages.options import Documents, EvalConfig
from pipeline.train import inputs
from pipeline.train import run as runs
from pipeline.train.artifact import Trained
from pipeline.train.calibrate import shuffled_batches

logger = logging.getLogger(__name__)

SCHEMA = 2
"""Of metrics.json."""

OTHER_TOKENS = "this rule looks at other tokens of a batch, so it cannot run live"
"""Why there is no replacement under a BatchTopK rule."""


def run(cfg: EvalConfig) -> Path:
    """Measure a finished run; print a table and write metrics.json. -> its path"""
    start = time.perf_counter()
    if cfg.eval.curve_contexts < 1:
        fix = "give 1 or more, or leave the curves out with eval.curves=false"
        raise UserError(f"eval.curve_contexts={cfg.eval.curve_contexts} measures nothing; {fix}")
    if cfg.eval.bootstrap < 0:
        raise UserError(
            f"eval.bootstrap={cfg.eval.bootstrap} is no number of resamples; give 2000, or 0 for no intervals"
        )
    directory = runs.chosen(cfg.run)
    file = _file(cfg, directory)
    device = pieces.own_device(cfg.device)
    with pieces.grid(cfg.dist, resolve_device(device)) as mesh:
        trained, ranks = evaluate_ranks.read(directory, cfg.transcoder, device, mesh)
        log_into(directory)
        cached = _cached(cfg, trained) if cfg.dataset is None else None
        lm = opening.base_model(trained, device)
        exact = evaluate_ranks.opened(trained, ranks, lm.device)
        held_out, split = cached or _other_text(cfg, trained, lm, mesh.world)
        metrics, sums = _measure(cfg, trained, exact, lm, held_out, mesh.data)
        if mesh.speaks:
            about = {"n_tokens": held_out.n_rows, "n_contexts": len(held_out.contexts), "split": split}
            metrics = {"schema": SCHEMA, **about, "seconds": round(time.perf_counter() - start, 2), **metrics}
            n_tokens = sums["threshold"]["n_tokens"].numpy()
            _write(file, metrics, Contexts(contexts.hashes(held_out.contexts, n_tokens), sums))
            for line in table(metrics):
                logger.info(line)
            logger.info('%s\nnext: clt report %s, or clt generate run=%s prompt="..."', file, directory, directory)
        mesh.world.barrier()
    return file


def _measure(
    cfg: EvalConfig, trained: Trained, exact: Transcoder | None, lm: LanguageModel, held_out: HeldOut, group: Group
) -> tuple[Tree, dict[str, dict[str, Tensor]]]:
    """(metrics.json, the sums of each context by rule and baseline). metrics.json is whole on rank 0 of `group`, those
    that share the text, alone. exact: the transcoder under the rule of training, where that is another."""
    batch, n_rows = trained.config["train"]["batch_tokens"], held_out.n_rows
    resamples = cfg.eval.bootstrap if group.rank == 0 else 0
    transcoder = trained.transcoder
    basis = replacement.basis(transcoder)
    fits = {"threshold": evaluation.fit(transcoder, held_out, iter(torch.arange(n_rows).split(batch)), group)}
    models_of: evaluation.Models = {} if basis is None else {"threshold": replacement.replacement(lm, transcoder)}
    if exact is not None:
        fits["exact"] = evaluation.fit(exact, held_out, shuffled_batches(n_rows, batch, seed=0), group)
        if basis is not None and exact.activation.per_token:
            models_of["exact"] = replacement.replacement(lm, exact)
    replaced = evaluation.replacements(lm, models_of, trained.y_mean)
    results = evaluation.divergences(lm, replaced, held_out.contexts, n_rows, cfg.eval.batch_tokens, group)
    sums = {rule: fit.sums() for rule, fit in fits.items()}
    for name, result in results.items():
        sums[name] = sums.get(name, {}) | result.sums()
    drawn = contexts.resample(sums, resamples) if resamples and len(held_out.contexts) > 1 else None
    by_rule = {}
    for rule, fit in fits.items():
        numbers = contexts.numbers(contexts.totals(sums), rule)
        intervals = None if drawn is None else contexts.intervals(contexts.numbers(drawn, rule))
        own = results.get(rule) if rule in models_of else None
        by_rule[rule] = evaluation.rule_metrics(fit, own, basis, numbers, intervals)
        worst = None if own is None else evaluation.worst_contexts(own, held_out.contexts, lm.tokenizer)
        by_rule[rule]["worst_contexts"] = worst
        if own is None:
            by_rule[rule]["no_replacement"] = OTHER_TOKENS if basis else replacement.no_basis(transcoder.options)
    more, ci95 = _more(cfg, trained, lm, held_out, models_of, resamples, group)
    metrics = {**by_rule["threshold"], **_weights(transcoder), **more, "exact": by_rule.get("exact")}
    if ci95:
        metrics["ci95"] = (metrics["ci95"] or {}) | ci95
    return metrics, sums


def _more(
    cfg: EvalConfig, trained: Trained, lm: LanguageModel, held_out: HeldOut, models_of: evaluation.Models,
    resamples: int, group: Group,
) -> tuple[Tree, Tree]:  # fmt: skip
    """The groups that other files measure, each None where it is not asked for or has no meaning, and their intervals
    where they have any. models_of: the replacement under each rule that can run live."""
    ci95: Tree = {}
    more: Tree = dict.fromkeys(("replacement_curves", "faithfulness", "tasks", "world"))

    transcoder, batch = trained.transcoder, cfg.eval.batch_tokens

    if cfg.eval.curves and replacement.basis(transcoder) is not None:
        args = (held_out.contexts, held_out.n_rows, batch, cfg.eval.curve_contexts)
        more["replacement_curves"] = curves.measure(lm, transcoder, *args, group)

    if cfg.eval.faithfulness:
        n_contexts, length = held_out.contexts.shape
        scored = evaluation.valid_positions(n_contexts, length, held_out.n_rows)
        text = (held_out.contexts, lambda rows: held_out.read(rows)[0], scored)
        found = faithfulness.measure(lm, transcoder, *text, batch, resamples, group)
        more["faithfulness"], ci95["faithfulness"] = found

    if cfg.eval.world and lm.path == BUILTIN:
        rules = {name: partial(model.logits, last=True) for name, model in models_of.items()}
        more["tasks"] = world_truth.world_tasks(lm, rules, batch, group)
        if group.rank == 0:  # seconds
            more["world"], ci95["world"] = world_truth.measure(lm, transcoder, batch, resamples)

    return more, {name: intervals for name, intervals in ci95.items() if intervals}


def _weights(transcoder: Transcoder) -> Tree:
    """Numbers of the weights alone."""
    threshold = transcoder.activation.threshold
    assert isinstance(threshold, Tensor)
    with torch.no_grad():
        norms = transcoder.decoder_norms()
    return {
        "decoder_norm_histogram": metrics_weights.decoder_norm_histogram(norms),
        "threshold_histogram": metrics_weights.threshold_histogram(threshold),
    }


class Stored(NamedTuple):
    """Rows as a cache holds them; what is made of them is made when they are asked for, some at a time."""

    site: Site
    target: Target
    norm: MlpNorm
    resid_mid: Tensor
    """bfloat16 [n_rows, L, D]"""
    mlp_out: Tensor
    """The same."""

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `evaluation.Rows`."""
        return inputs.pair(self.site, self.target, self.norm, self.resid_mid[rows].float(), self.mlp_out[rows].float())


def _cached(cfg: EvalConfig, trained: Trained) -> tuple[HeldOut, str]:
    """The evaluation split of the cache that the run was trained on: as many of its contexts as are asked for."""
    key, request = trained.config["cache"]["key"], trained.config["cache"]["request"]
    cache = caches.with_key(cache_place(cfg.cache), key, request)
    texts = _first(cache.held_out_tokens(Split.evaluation), cfg.eval.n_contexts)
    rows = cache.held_out_rows(Split.evaluation, texts.shape[0] * (texts.shape[1] - 1))
    stored = Stored(trained.site, trained.target, cache.norm, *rows)
    return HeldOut(texts, len(stored.resid_mid), stored.read), Split.evaluation


def _other_text(cfg: EvalConfig, trained: Trained, lm: LanguageModel, group: Group) -> tuple[HeldOut, str]:
    """Another text, its activations collected now."""
    assert cfg.dataset is not None
    lm.check_context(cfg.dataset.context)
    held_out_only = cfg.eval.documents == Documents.held_out or cfg.dataset.kind == DatasetKind.world
    split = Split.evaluation if held_out_only else None
    packed = tokens.pack_other(cfg.dataset, lm.tokenizer, tokens.bos_of(cfg.dataset, lm.tokenizer), split)
    few = _first(packed.contexts, cfg.eval.n_contexts)
    n_rows = min(packed.n_rows, few.shape[0] * (few.shape[1] - 1))
    sites = _collected(lm, packed._replace(contexts=few, n_rows=n_rows), cfg.eval.batch_tokens, group)
    stored = Stored(trained.site, trained.target, lm.mlp_norm(), *sites)
    return HeldOut(few, n_rows, stored.read), f"{cfg.dataset.name}/{split or 'all'}"


def _collected(lm: LanguageModel, packed: Packed, batch_tokens: int, group: Group) -> tuple[Tensor, Tensor]:
    """Both sites' activations at the rows of some contexts, whose passes are divided over the ranks. bfloat16
    [n_rows, L, D] each"""
    n, width = len(packed.contexts), packed.contexts.shape[1] - 1
    buffers = Buffers(lm, width + 1, batch_tokens, n=1)
    passes = pieces.mine(-(-n // buffers.n_contexts), group)
    own = range(passes.start * buffers.n_contexts, min(n, passes.stop * buffers.n_contexts))
    first = min(own.start * width, packed.n_rows)
    n_rows = min(own.stop * width, packed.n_rows) - first
    resid_mid, mlp_out = torch.empty(2, n_rows, lm.n_layers, lm.d_model, dtype=torch.bfloat16)
    with Progress(n_rows, "tok", "collect") as bar:
        for block in harvest(lm, packed, own, buffers):
            place = slice(block.first - first, block.first - first + len(block.resid_mid))
            resid_mid[place], mlp_out[place] = block.resid_mid, block.mlp_out
            bar.update(len(block.resid_mid))
    if group.size == 1:
        return resid_mid, mlp_out
    # As bytes: gloo has no bfloat16.
    every = [torch.cat(group.gather_ragged(site.view(torch.uint8), "collect")) for site in (resid_mid, mlp_out)]
    return every[0].view(torch.bfloat16), every[1].view(torch.bfloat16)


def _first(contexts: np.ndarray, n: int | None) -> np.ndarray:
    if n is not None and n < 1:
        raise UserError(f"eval.n_contexts={n} must be at least 1")
    return contexts[:n]


def _file(cfg: EvalConfig, directory: Path) -> Path:
    suffix = "" if cfg.dataset is None else f"-{cfg.dataset.name}"
    return directory / "eval" / f"metrics{suffix}.json"


def _write(file: Path, metrics: Tree, by_context: Contexts) -> None:
    file.parent.mkdir(exist_ok=True)
    contexts.write(file.with_name(f"contexts{file.stem.removeprefix('metrics')}.npz"), by_context)
    write_aside(file, (json.dumps(metrics, indent=2) + "\n").encode())
