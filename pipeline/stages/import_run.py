"""`clt import`: transcoders of others -> a finished run, which eval, generate, graph and features take.

clt import path=DIR model=gpt2 name=theirs
clt import path=owner/name model=gemma-2-2b name=theirs

A run needs to know a text besides its weights: how a context begins, what is held out, and the mean MLP output, by
which MLPs are ablated. All of it comes from the cache of this model and data set where there is one (`clt extract` with
the same words), else from `read.contexts` held-out contexts of the data set, which the model runs over now.
"""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions, Site
from pipeline.core.normalize import MlpNorm
from pipeline.core.options import ActivationOptions
from pipeline.data import models, tokens
from pipeline.data.address import cache_place
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.condition import is_finished
from pipeline.data.harvest import Buffers, harvest
from pipeline.data.layout import HOOKS, found_at, key_of, request_of
from pipeline.data.plan import about_model
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.interp.exchange import import_files, import_hub
from pipeline.interp.exchange.import_files import Found
from pipeline.plain import to_plain
from pipeline.stages.export_options import ImportConfig
from pipeline.train import artifact
from pipeline.train import run as runs
from pipeline.train.options import TrainOptions

logger = logging.getLogger(__name__)

SITES = {"hook_resid_mid": Site.resid_mid, "mlp.hook_in": Site.mlp_in, "ln2.hook_normalized": Site.mlp_in}
"""What is read, by its name in transformer_lens. ln2.hook_normalized, before the gain, becomes mlp_in."""

NORM_BEHIND = ("Gemma2", "Gemma3", "Olmo2", "Olmo3", "Glm4")
"""Architectures with a norm behind the MLP: there mlp.hook_out is not what is added to the residual stream."""

BATCH_TOKENS = 4096


class Setting(NamedTuple):
    """What a run says about its model and text."""

    model: dict[str, Any]
    dataset: dict[str, Any]
    hooks: dict[str, str]
    dims: Dims
    norm: MlpNorm
    y_mean: Tensor
    """[L, D], float64"""
    measured: str
    """What the mean is of."""


def run(cfg: ImportConfig) -> Path:
    """Read, check, and write runs/NAME. -> it"""
    if not cfg.path or not cfg.name:
        raise UserError(
            "clt import needs path= (a directory, or a name on the hub) and name= (of the new run); add both"
        )
    if cfg.read.contexts < 1:
        raise UserError(f"read.contexts={cfg.read.contexts} must be at least 1")
    found = import_files.read(import_hub.fetched(cfg.path, cfg.read.revision))
    site = _site(cfg, found)
    request = request_of(cfg.model, cfg.dataset, cfg.cache.codec, cfg.cache.targets)
    place = cache_place(cfg.cache)
    cache = found_at(place, request)
    setting = _of_cache(Cache.open(cache)) if is_finished(cache) else _of_text(cfg)
    _check(cfg, found, setting)
    weights = _before_gain(found, setting.norm) if found.input_hook == "ln2.hook_normalized" else found.weights
    arch = ArchOptions(found.arch, d_features=found.d_features, site=site, skip=found.arch == "skip")
    table.check(arch)
    directory = runs.start(cfg.name, cfg)
    rule = ActivationOptions("jumprelu" if bool(found.threshold.any()) else "relu")
    config = {
        **artifact.describe(arch, setting.dims, rule),
        "units": "model",
        "hooks": setting.hooks,
        "model": setting.model,
        "dataset": setting.dataset,
        "cache": {"key": key_of(request), "path": str(cache), "request": request},
        "train": to_plain(TrainOptions()),
        "imported": {
            "path": cfg.path,
            "revision": cfg.read.revision,
            "input_hook": found.input_hook,
            "output_hook": found.output_hook,
            "model_name": found.model_name,
            "y_mean": setting.measured,
            "clt_pipeline": found.about,
        },
    }
    # Not through a transcoder, which would be a second copy of weights that may fill most of the memory.
    artifact.write(directory, weights | {"threshold": found.threshold, "y_mean": setting.y_mean}, config)
    _say(cfg, found, directory, None if is_finished(cache) else command_of(request, place))
    return directory


def _site(cfg: ImportConfig, found: Found) -> Site:
    if found.input_hook not in SITES:
        known = ", ".join(SITES)
        raise UserError(
            f"path={cfg.path} reads {found.input_hook}, and only {known} are known here; nothing to be done"
        )
    if found.output_hook not in {"hook_mlp_out", "mlp.hook_out"}:
        raise UserError(
            f"path={cfg.path} writes {found.output_hook}, and only the MLPs' outputs (hook_mlp_out, "
            "mlp.hook_out) can be "
            "replaced here; nothing to be done"
        )
    return SITES[found.input_hook]


def _of_cache(cache: Cache) -> Setting:
    mean = cache.stats("mlp_out")[0]
    dims = Dims(cache.n_layers, cache.d_model)
    return Setting(cache.model, cache.dataset, cache.hooks, dims, cache.norm, mean, f"training rows of {cache.path}")


def _of_text(cfg: ImportConfig) -> Setting:
    """The model runs over some contexts of the calibration split: no evaluation looks at that."""
    lm = models.load(cfg.model)
    dataset = replace(cfg.dataset, held_out=cfg.read.contexts)
    lm.check_context(dataset.context)
    packed = tokens.pack_other(dataset, lm.tokenizer, tokens.bos_of(dataset, lm.tokenizer), Split.calibration)
    total, n = torch.zeros(lm.n_layers, lm.d_model, dtype=torch.float64), 0
    buffers = Buffers(lm, packed.contexts.shape[1], BATCH_TOKENS, n=1)
    for rows in harvest(lm, packed, range(len(packed.contexts)), buffers):
        total += rows.mlp_out.double().sum(dim=0).cpu()
        n += rows.mlp_out.shape[0]
    described = json.loads(json.dumps(asdict(cfg.dataset))) | {"resolved": tokens.resolved(cfg.dataset)}
    measured = f"{n} tokens of {cfg.dataset.name}'s calibration split"
    return Setting(about_model(lm), described, HOOKS, Dims(lm.n_layers, lm.d_model), lm.mlp_norm(), total / n, measured)


def _check(cfg: ImportConfig, found: Found, setting: Setting) -> None:
    name, sizes = setting.model["name"], (found.n_layers, found.d_model)
    if sizes != tuple(setting.dims):
        raise UserError(
            f"path={cfg.path} has (n_layers, d_model) = {sizes}, the layers that are read of model={name} have "
            f"{tuple(setting.dims)}; name the model that the transcoders were made for"
        )
    architecture = str(setting.model["architecture"])
    if found.output_hook == "mlp.hook_out" and architecture.startswith(NORM_BEHIND):
        raise UserError(
            f"path={cfg.path} writes mlp.hook_out, which in {architecture} comes before another norm; only "
            "what is added "
            "to the residual stream (hook_mlp_out) can be replaced here"
        )
    base = found.about.get("base_model") or {}
    expected = base.get("weights_sha256")
    if expected and expected != setting.model["weights_sha256"]:
        raise UserError(
            f"path={cfg.path} was made for other weights of {base.get('name')} ({expected[:12]}, model={name} has "
            f"{setting.model['weights_sha256'][:12]}); name that model"
        )


def _before_gain(found: Found, norm: MlpNorm) -> dict[str, Tensor]:
    """Encoders that read n, where mlp_in = gain n + bias, for mlp_in: W / gain, and b - (W / gain) bias."""
    gain, bias = norm.gain.double(), norm.bias.double()
    if bool((gain == 0).any()):
        raise UserError(
            "the encoders read ln2.hook_normalized, before the norm's gain, which is 0 in places here, so "
            "that what they "
            "read cannot be had from mlp_in; nothing to be done"
        )
    W_enc = found.weights["W_enc"].double() / gain[:, None]
    b_enc = found.weights["b_enc"].double() - torch.einsum("lfd,ld->lf", W_enc, bias)
    return found.weights | {"W_enc": W_enc.float(), "b_enc": b_enc.float()}


def _say(cfg: ImportConfig, found: Found, directory: Path, extract: str | None) -> None:
    rule = "thresholds" if bool(found.threshold.any()) else "ReLU"
    logger.info(
        "%s   %s, %d layers, %s features each, %s", directory, found.arch, found.n_layers, f"{found.d_features:,}", rule
    )
    if extract is None:
        logger.info('next: clt eval run=%s, or clt generate run=%s prompt="..."', directory, directory)
        return
    dataset = cfg.dataset.name
    logger.info("there is no cache of this model and text, which clt eval and clt features read: %s", extract)
    logger.info(
        'next: that, or clt eval run=%s dataset=%s, or clt generate run=%s prompt="..."', directory, dataset, directory
    )
