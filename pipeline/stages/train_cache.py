"""Which cache `clt train` trains on."""

import logging
from typing import Any

from pipeline.data import caches, inventory
from pipeline.data.address import Place, cache_place, is_address, local_of, resolved
from pipeline.data.cache import Cache
from pipeline.data.layout import MERGED, directory_of, request_of
from pipeline.data.options import Codec, DatasetOptions, ModelOptions, Targets
from pipeline.errors import UserError
from pipeline.plain import from_plain
from pipeline.stages.options import CompareConfig, TrainConfig
from pipeline.train import run as runs
from pipeline.train.inputs import Statistics

logger = logging.getLogger(__name__)


def find_cache(cfg: TrainConfig) -> Cache:
    """The cache that the settings name; with `newest_cache` (neither a model nor a dataset named) `cache.path`, that of
    the unfinished run of this name, or the newest.

    The settings take on the cache's model, dataset, codec and targets, so that config.yaml says what was used, in one
    spelling.
    """
    root = cache_place(cfg.cache)
    assert cfg.name is not None
    before = runs.saved(runs.RUNS / cfg.name) if cfg.newest_cache else None
    if before is not None:
        _take_on(cfg, before)
        cfg.cache.path = cfg.cache.path or before["cache"].get("path")
        cfg.cache.codec = Codec(before["cache"]["codec"]) if cfg.cache.codec is Codec.raw else cfg.cache.codec
        if cfg.cache.targets is Targets.stored:  # the default: nothing was said
            cfg.cache.targets = Targets(before["cache"].get("targets", Targets.stored))
    if cfg.cache.path is not None:
        cache = _named_cache(cfg, root, cfg.cache.path)
    else:
        cache = named_or_newest(cfg, newest=before is None and cfg.newest_cache)
    take_on(cfg, cache)
    return cache


def named_or_newest(cfg: TrainConfig | CompareConfig, newest: bool) -> Cache:
    """The cache of the model, dataset, codec and targets, or the newest. Raises UserError where there is none."""
    root = cache_place(cfg.cache)
    if not newest:
        return caches.find(root, cfg.model, cfg.dataset, cfg.cache.codec, cfg.cache.targets)
    asked = cfg.cache.targets if cfg.cache.targets is not Targets.stored else None
    found = caches.newest(root, asked)
    if found is None:
        kind, word = (f" with cache.targets={asked}", f" cache.targets={asked}") if asked else ("", "")
        fix = f"make one with clt extract model={cfg.model.name}{word}"
        raise UserError(f"no finished cache{kind} under {root}/; {fix}")
    logger.info("no model or dataset named: using the newest cache, %s", found.path)
    return found


def take_on(cfg: TrainConfig, cache: Cache) -> None:
    """Make the settings those of a cache, however it was found."""
    _take_on(cfg, cache.request)
    root = cache_place(cfg.cache)
    cfg.cache.path, cfg.cache.codec, cfg.cache.targets = _spelled(cache, root), cache.codec, cache.targets


def _named_cache(cfg: TrainConfig, root: Place, name: str) -> Cache:
    """Of `cache.path`. Raises UserError where a model, a dataset or a codec is named as well, and is another."""
    local = local_of(cfg.cache) if is_address(name) else None
    cache = Cache.open(inventory.find(root, name, local).path)
    if not cfg.newest_cache:
        asked = request_of(cfg.model, cfg.dataset)
        differ = [part for part in ("model", "dataset") if asked[part] != cache.request[part]]
        if differ:
            what = f"cache.path={name}: {cache.path} is of another {' and another '.join(differ)} than named"
            raise UserError(f"{what}; leave model and dataset out")
    if cfg.cache.codec not in (Codec.raw, cache.codec):
        raise UserError(f"cache.path={name}: {cache.path} is stored as {cache.codec}; leave cache.codec out")
    return cache


def _spelled(cache: Cache, root: Place) -> str | None:
    """`cache.path` as config.yaml has it: null for the cache that model, dataset and codec name."""
    path = resolved(cache.path)
    if path == resolved(directory_of(root, cache.request)) and MERGED not in cache.request:
        return None
    return path.name if path.parent == resolved(root) else str(path)


def _take_on(cfg: TrainConfig, saved: dict[str, Any]) -> None:
    cfg.model = from_plain(ModelOptions, saved["model"])
    cfg.dataset = from_plain(DatasetOptions, saved["dataset"])


def statistics(cache: Cache, site: str) -> Statistics:
    """Of a site over all training rows."""
    return Statistics(*cache.stats(site))
