"""`clt features`: run + its cache -> runs/NAME/features/, what each feature responds to and writes.

clt features run=runs/demo features.n=1000
clt features run=runs/demo features.ids=[0/12,1/7]
clt features run=runs/demo search=France
clt features run=runs/demo prompt='The capital of France is'
torchrun --nproc-per-node=4 -m pipeline features run=runs/demo

Several ranks divide the features; each reads the text for its own.
"""

import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import ranks
from pipeline.core.activations import FixedThreshold
from pipeline.data import caches
from pipeline.data import tokens as counts
from pipeline.data.address import cache_place
from pipeline.data.cache import Cache
from pipeline.data.models import LanguageModel
from pipeline.dist import pieces
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.errors import UserError
from pipeline.interp import naming, opening
from pipeline.interp.dashboards import feature_activity, feature_files, feature_sums, feature_writer, features
from pipeline.interp.dashboards.feature_options import Choose, FeatureOptions
from pipeline.interp.dashboards.feature_records import Records, weights
from pipeline.interp.dashboards.feature_text import FeatureText, Words
from pipeline.interp.dashboards.feature_weights import has_logits
from pipeline.interp.dashboards.features import Chosen
from pipeline.plain import to_plain
from pipeline.progress import Progress, clock_time
from pipeline.stages import features_listed
from pipeline.stages.features_options import FeaturesConfig
from pipeline.train import artifact, finished
from pipeline.train import run as runs
from pipeline.train.artifact import Trained

logger = logging.getLogger(__name__)

SCHEMA = 1
NAME = "features"

NO_EFFECT = {"memory_mb", "shown"}
"""Options that the files do not depend on."""

CONVENTIONS = {
    "activation_frequency": "share of the tokens at positions 1 and later",
    "act_min, quantile_values": "of activations above 0",
    "top_logits": "decoder rows summed over target layers, through the final norm's gain and the unembedding; "
    "the norm's denominator left out",
    "related.decoder": "cosine of decoder rows, concatenated over target layers",
    "related.active": "tokens with both / root of the product of tokens with each; at least "
    f"{feature_activity.MEETINGS} tokens with both",
}


def run(cfg: FeaturesConfig) -> Path | None:
    """Describe features, or list described ones. -> the directory, or the JSON file of a list that was asked for"""
    check(cfg)
    directory = runs.chosen(cfg.run)
    lists = cfg.search is not None or cfg.prompt is not None or cfg.dry_run
    if lists and ranks.number():
        return None  # the first rank's business
    if cfg.search is not None:
        return features_listed.found(cfg, cfg.search, directory / NAME)
    if cfg.prompt is not None:
        return features_listed.on_prompt(cfg, cfg.prompt, directory / NAME)
    if cfg.dry_run:
        return _of_rank(cfg, directory, ALONE)
    with pieces.ranks() as group:
        return _of_rank(cfg, directory, group)


def _of_rank(cfg: FeaturesConfig, directory: Path, group: Group) -> Path | None:
    trained = finished.read(directory, cfg.transcoder, pieces.own_device(cfg.device))
    ranks.log_into(directory)
    key, asked = trained.config["cache"]["key"], trained.config["cache"]["request"]
    cache = caches.with_key(cache_place(cfg.cache), key, asked)
    target = directory / NAME if cfg.to is None else Path(cfg.to)
    request = _request(cfg.features, trained)
    if group.share(feature_writer.same(target, request), "whether they are there"):
        if group.rank == 0:
            feature_writer.forget(target)
        logger.info("%s has been made from this run with these settings already", target)
        return target
    if target.exists() and feature_files.about(target) is None:
        raise UserError(f"{target} exists and holds no features; name another directory with to=")
    return _describe(cfg, trained, cache, target, request, group)


def check(cfg: FeaturesConfig) -> None:
    """Raises UserError for settings that mean nothing, before anything is loaded."""
    if cfg.search is not None and cfg.prompt is not None:
        raise UserError("search= and prompt= are two questions; ask one at a time")
    options = cfg.features
    if options.n != "all":
        counts.count(options.n)
    least = {"top": 1, "bins": 1, "sample": 1, "memory_mb": 1, "shown": 1, "batch_tokens": 1}
    for field in fields(options):
        value, low = getattr(options, field.name), least.get(field.name, 0)
        if isinstance(value, int) and not isinstance(value, bool) and value < low:
            raise UserError(f"features.{field.name}={value} must be {low} or more")
    if options.ids is not None and (options.layers is not None or options.n != "all"):
        raise UserError("features.ids names the features; leave features.layers and features.n out")


def _describe(
    cfg: FeaturesConfig, trained: Trained, cache: Cache, target: Path, request: dict[str, Any], group: Group
) -> Path | None:
    options = cfg.features
    lm = opening.base_model(trained, pieces.own_device(cfg.device))
    transcoder = trained.transcoder.to(lm.device)
    assert isinstance(transcoder.activation, FixedThreshold)
    text = FeatureText(cache, trained, lm, options.split, options.n_tokens, options.batch_tokens)
    chosen = choose(options, trained, text, group)
    n, n_ranks = len(chosen.source), ranks.world()
    most = min((options.memory_mb << 20) // features.bytes_of(options), -(-n // n_ranks))
    parts = [chosen.part(range(first, first + max(1, most))) for first in range(0, n, max(1, most))]
    for line in sized(options, trained, text, parts, n_ranks):
        logger.info(line)
    if cfg.dry_run:
        return None
    if transcoder.directions and not has_logits(transcoder):
        logger.warning("the transcoder writes %s: its features have no top logits", transcoder.options.writes)
    if not transcoder.directions:
        logger.warning("arch=%s: features write no fixed direction, so they have no logits", transcoder.options.name)
    replaced = feature_files.about(target)
    if replaced is not None:
        logger.warning("%s held %s features of other settings, which are replaced", target, replaced["n_features"])
    about = {
        "schema": SCHEMA, "run": str(trained.path), "n_features": n, "n_tokens": text.n_rows,
        "n_contexts": len(text.contexts), "split": str(text.split), "conventions": CONVENTIONS, "request": request,
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    with feature_writer.Making(target, request, group) as making:
        left = making.left(n, max(1, most))[group.rank :: group.size]
        _write_parts(making, options, trained, lm, text, {some: chosen.part(some) for some in left})
        sizes = (transcoder.d_features, transcoder.n_sources) if options.packed else None
        making.finish(about, sizes)
    written = sum(file.stat().st_size for file in target.iterdir())
    logger.info("%s: %s features, %.1f MB", target, f"{n:,}", written / 1e6)
    logger.info("next: clt features run=%s search=..., or prompt=...", trained.path)
    return target


def _write_parts(
    making: feature_writer.Making, options: FeatureOptions, trained: Trained, lm: LanguageModel, text: FeatureText,
    parts: dict[range, Chosen],
) -> None:  # fmt: skip
    """The features that are left to this rank."""
    transcoder, words = trained.transcoder, Words(lm.tokenizer)
    met = None
    if options.related and parts:
        met = feature_activity.activity(transcoder, text, counts.count(options.related_tokens))
    with Progress(2 * text.n_rows * len(parts), unit="tok", desc="features") as progress:
        for some, part in parts.items():
            measured = features.measure(transcoder, text, part, options, making.notes(some), progress.update)
            found = weights(lm, transcoder, part, met, options)
            name = runs.name_of(trained.path)
            making.write(some, Records(name, text, words, part, measured, found, transcoder.d_features, options))


def choose(options: FeatureOptions, trained: Trained, text: FeatureText, group: Group = ALONE) -> Chosen:
    """The features that the options name. Raises UserError for those that there are not."""
    n_sources, d_features = trained.transcoder.n_sources, trained.transcoder.d_features
    if options.ids is not None:
        pairs = naming.features(options.ids, "features.ids")
        naming.check_there(pairs, n_sources, d_features, "features.ids: ")
        identity = np.unique([layer * d_features + feature for layer, feature in pairs])
        return Chosen(*np.divmod(identity, d_features))
    layers = range(n_sources) if options.layers is None else sorted(set(options.layers))
    if wrong_layers := [layer for layer in layers if layer not in range(n_sources)]:
        raise UserError(f"features.layers={wrong_layers}: the transcoder's layers are 0 to {n_sources - 1}")
    identity = np.concatenate([np.arange(layer * d_features, (layer + 1) * d_features) for layer in layers])
    every = Chosen(*np.divmod(identity, d_features))
    n = len(identity) if options.n == "all" else counts.count(options.n)
    if n >= len(identity):
        return every
    if options.choose is Choose.random:
        generator = torch.Generator().manual_seed(options.seed)
        identity = identity[torch.randperm(len(identity), generator=generator)[:n].numpy()]
    else:
        with Progress(text.n_rows, unit="tok", desc="most active") as progress:
            active = features.counts(trained.transcoder, text, every, progress.update, group)
        identity = identity[np.argsort(-active, kind="stable")[:n]]
    return Chosen(*np.divmod(np.sort(identity), d_features))


@torch.inference_mode()
def sized(options: FeatureOptions, trained: Trained, text: FeatureText, parts: list[Chosen], n_ranks: int) -> list[str]:
    """What it will take, from a timed block. parts: features that are described at once, by one of the ranks."""
    n = sum(len(part.source) for part in parts)
    if not n or not text.n_rows:
        raise UserError("there is no feature or no token to describe; ask for at least one of each")
    blocks = text.blocks()
    encode = features.Encoder(trained.transcoder, parts[0])
    start = time.perf_counter()
    for first, activations in encode(text.read(blocks[0])):
        feature_sums.pairs(activations, first, 0)
    seconds = 2 * len(parts) * len(blocks) * 1.5 * (time.perf_counter() - start) + 0.003 * n
    examples = options.top + options.quantiles * options.per_quantile
    size = n * (2500 + examples * (100 + 11 * (options.before + options.after + 1)))
    memory = max(len(part.source) for part in parts) * features.bytes_of(options)
    passes = f"2 passes{f' for each of {len(parts)} groups' if len(parts) > 1 else ''}"
    if n_ranks > 1:
        passes += f" by {n_ranks} ranks"
    return [
        f"{n:,} features of {trained.path}; {text.n_rows:,} tokens of the {text.split} split, {passes}",
        f"at most {size / 1e6:,.0f} MB of files and {memory / 1e6:,.0f} MB of memory"
        f"{' a rank' if n_ranks > 1 else ''}; about {clock_time(seconds / n_ranks)}",
    ]


def _request(options: FeatureOptions, trained: Trained) -> dict[str, Any]:
    """All that the files depend on."""
    digest = artifact.weights_sha256(artifact.folder(trained.path))
    plain = {name: value for name, value in to_plain(options).items() if name not in NO_EFFECT}
    if options.ids is not None:
        pairs = sorted(set(naming.features(options.ids, "features.ids")))
        plain["ids"] = [f"{layer}/{feature}" for layer, feature in pairs]
    return {"schema": SCHEMA, "transcoder_sha256": digest, "cache": trained.config["cache"]["key"], "features": plain}
