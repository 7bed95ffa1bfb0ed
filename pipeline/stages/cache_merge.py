"""`clt cache merge A B`: finished caches read as one, beside them. No training row is copied."""

import logging
import shlex
from pathlib import Path

from pipeline.data import inventory
from pipeline.data.cache import Cache
from pipeline.data.layout import gb
from pipeline.data.merged import Merged
from pipeline.data.merging import merge

logger = logging.getLogger(__name__)


def run(names: list[str], cache_dir: Path, name: str | None = None, allow_repeats: bool = False) -> str:
    """-> the path of the merged cache. Says what it holds. Raises UserError for a name that names no cache, and for
    caches that do not go together."""
    caches = [Cache.open(inventory.find(cache_dir, given).path) for given in names]
    cache = Cache.open(merge(caches, cache_dir, name, allow_repeats))
    assert isinstance(cache, Merged)
    rows = " + ".join(f"{part.n_rows:,}" for part in cache.parts)
    own = gb(inventory.size_on_disk(cache.path))
    logger.info("%s: %s rows (%s), %s of its own", cache.path, f"{cache.n_rows:,}", rows, own)
    words = [f"cache.path={cache.path.name}"] + ([f"cache.dir={cache_dir}"] if str(cache_dir) != "cache" else [])
    logger.info("next: clt train +experiment=batchtopk_across %s", " ".join(map(shlex.quote, words)))
    return str(cache.path)
