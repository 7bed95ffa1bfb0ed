"""`clt cache merge A B`: finished caches read as one, beside them. No training row is copied."""

import logging
import shlex

from pipeline.data import inventory
from pipeline.data.address import Place, Remote
from pipeline.data.cache import Cache
from pipeline.data.layout import gb
from pipeline.data.merged import Merged
from pipeline.data.merging import merge
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


def run(names: list[str], cache_dir: Place, name: str | None = None, allow_repeats: bool = False) -> str:
    """-> the path of the merged cache. Says what it holds. Raises UserError for a name that names no cache, and for
    caches that do not go together or lie in a store."""
    places = [inventory.find(cache_dir, given).path for given in names]
    for place in (cache_dir, *places):
        if isinstance(place, Remote):
            fix = "clt cache copy the parts to one, and merge them there"
            raise UserError(f"{place} lies in a store, and caches are merged on a disk; {fix}")
    assert not isinstance(cache_dir, Remote)
    caches = [Cache.open(place) for place in places]
    cache = Cache.open(merge(caches, cache_dir, name, allow_repeats))
    assert isinstance(cache, Merged)
    rows = " + ".join(f"{part.n_rows:,}" for part in cache.parts)
    assert not isinstance(cache.path, Remote)
    own = gb(inventory.size_on_disk(cache.path))
    logger.info("%s: %s rows (%s), %s of its own", cache.path, f"{cache.n_rows:,}", rows, own)
    words = [f"cache.path={cache.path.name}"] + ([f"cache.dir={cache_dir}"] if str(cache_dir) != "cache" else [])
    logger.info("next: clt train +experiment=batchtopk_across %s", " ".join(map(shlex.quote, words)))
    return str(cache.path)
