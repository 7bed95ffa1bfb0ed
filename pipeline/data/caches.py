"""Which cache of a directory is meant: that of some options, of a request, or the newest."""

import logging

from pipeline.data import root
from pipeline.data.address import Place, Remote
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.condition import is_finished
from pipeline.data.layout import JOURNAL, MERGED, Json, found_at, key_of, request_of
from pipeline.data.options import Codec, DatasetOptions, ModelOptions, Targets
from pipeline.data.remote import Store
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def find(
    cache_dir: Place,
    model: ModelOptions,
    dataset: DatasetOptions,
    codec: Codec = Codec.raw,
    targets: Targets = Targets.stored,
) -> Cache:
    """The finished cache of these options. Raises UserError, with the command that makes it, when there is none."""
    request = request_of(model, dataset, codec, targets)
    return with_key(cache_dir, key_of(request), request)


def with_key(cache_dir: Place, key: str, request: Json) -> Cache:
    """The finished cache of a request that was made earlier. Raises UserError, with the command that makes it."""
    if MERGED in request and isinstance(cache_dir, Remote):
        raise UserError(f"a merged cache is asked for, which no store holds ({cache_dir}); name the folder: cache.dir=")
    path = found_at(cache_dir, request)
    if key_of(request) != key or not is_finished(path):
        begun = not isinstance(path, Remote) and (path / JOURNAL).exists()
        state = "is not finished" if begun else "does not exist"
        raise UserError(f"the cache {path} {state}; run: {command_of(request, cache_dir)}")
    return Cache.open(path)


def newest(cache_dir: Place, targets: Targets | None = None) -> Cache | None:
    """The finished cache that was made last, of those with such targets; None: of all. What cannot be used is passed
    over, with a warning that says why."""
    found: list[Cache] = []
    for path in finished(cache_dir):
        try:
            found.append(Cache.open(path))
        except UserError as error:
            logger.warning("passed over: %s", error)
    found = [cache for cache in found if targets in (None, cache.targets)]
    return max(found, key=lambda cache: str(cache.attributes["created"]), default=None)


def finished(cache_dir: Place) -> list[Place]:
    """What has been called finished in a cache directory, by name."""
    if isinstance(cache_dir, Remote):
        return [path for name in Store(cache_dir).children() if is_finished(path := cache_dir / name)]
    return [file.parent for file in sorted(cache_dir.glob(f"[!.]*/{root.NAME}"))]
