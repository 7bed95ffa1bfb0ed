"""`clt cache convert NAME codec=int8`: the same cache in another codec, beside it."""

import logging

from pipeline.data import inventory
from pipeline.data.address import Place, Remote
from pipeline.data.cache import Cache
from pipeline.data.commands import overrides_of
from pipeline.data.convert import convert, describe
from pipeline.data.layout import gb
from pipeline.data.merged import Merged
from pipeline.data.options import Codec
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def run(name: str, setting: str, cache_dir: Place) -> str:
    """-> the path of the new cache. Says what it takes, and what it loses. Raises UserError for a codec that there is
    not."""
    key, _, value = setting.partition("=")
    if key != "codec" or value not in [codec.value for codec in Codec]:
        raise UserError(f"{setting}: not a codec; give codec=X, X one of {', '.join(Codec)}")
    path = inventory.find(cache_dir, name).path
    if isinstance(path, Remote):
        fix = f"clt cache copy {path} FOLDER, clt cache convert there, and copy the result back"
        raise UserError(f"{path} lies in a store, and caches are converted on a disk; {fix}")
    source = Cache.open(path)
    if isinstance(source, Merged):
        parts = ", ".join(str(part.path) for part in source.parts)
        raise UserError(
            f"{source.path} is merged and has no rows of its own; convert its parts and merge those: {parts}"
        )
    cache = Cache.open(convert(source, Codec(value)))
    for line in describe(cache):
        logger.info(line)
    logger.info("%s: %s, %s before", cache.path, gb(cache.n_bytes), gb(source.n_bytes))
    logger.info("next: clt train +experiment=batchtopk_across %s", overrides_of(cache.request, cache.path.parent))
    return str(cache.path)
