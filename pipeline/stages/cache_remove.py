"""`clt cache rm` and `clt cache prune`: make room, and say how much."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.data import inventory
from pipeline.data.address import Place, Remote, resolved
from pipeline.data.inventory import Found, Leftover, State
from pipeline.data.layout import PACKING, gb
from pipeline.data.merged import merged_of
from pipeline.errors import UserError
from pipeline.stages.cache_list import LEFTOVERS
from pipeline.stages.cache_use import Runs

logger = logging.getLogger(__name__)


class _Item(NamedTuple):
    """Something that nobody needs."""

    path: Place
    what: str
    n_bytes: int
    remove: Callable[[], int]


def rm(names: list[str], cache_dir: Place, runs_dir: Path, force: bool = False) -> str:
    """Removes the caches that are named. -> what was freed. Raises UserError, before anything is removed, for a name
    that names no cache, for a cache that a run or a merged cache uses (unless `force`), and for one that is being made.
    A merged cache goes without its parts."""
    chosen = {resolved(found.path): found for found in (inventory.find(cache_dir, name) for name in names)}
    caches = list(chosen.values())
    for found in caches:
        if found.state is State.at_work:
            raise UserError(f"{found.path} is {found.detail}; stop that process first, or wait for it to end")
    if not force:
        Runs(runs_dir).refuse(caches)
        _refuse_parts(caches, cache_dir)
    freed = 0
    for found in caches:
        n_bytes = inventory.remove(found)
        freed += n_bytes
        logger.info("removed %s, %s", found.path, gb(n_bytes))
    return f"{gb(freed)} freed"


def _refuse_parts(caches: list[Found], cache_dir: Place) -> None:
    """Raises UserError for a part of a merged cache that is to stay."""
    going = {resolved(found.path) for found in caches}
    for found in caches:
        left = [path for path in merged_of(found.path, cache_dir) if resolved(path) not in going]
        if left:
            names = ", ".join(map(str, left))
            raise UserError(f"{found.path} is a part of {names}, which cannot be read without it; --force removes it")


def prune(cache_dir: Place, runs_dir: Path, yes: bool = False) -> str:
    """Removes what was begun and not finished, unless somebody is at work on it or a run uses it. Without `yes` it only
    says what it would remove. -> the sum"""
    if isinstance(cache_dir, Remote):
        fix = f"clt cache ls --cache-dir {cache_dir} lists what was copied in part, clt cache rm removes it by name"
        raise UserError(f"clt cache prune cannot tell who else is copying to {cache_dir}; {fix}")
    items = list(_items(cache_dir, Runs(runs_dir)))
    if not items:
        return f"nothing to remove under {cache_dir}/"
    freed = 0
    for item in items:
        n_bytes = item.remove() if yes else item.n_bytes
        freed += n_bytes
        logger.info("%s %s, %s, %s", "removed" if yes else "would remove", item.path, item.what, gb(n_bytes))
    return f"{gb(freed)} freed" if yes else f"{gb(freed)} would be freed; clt cache prune --yes removes this"


def _items(cache_dir: Path, runs: Runs) -> list[_Item]:
    items, covered = [], set()
    for found in inventory.caches(cache_dir):
        if found.state is not State.unfinished:
            continue
        covered.add(found.path.name)
        if names := runs.of(found) + [str(path) for path in merged_of(found.path, cache_dir)]:
            logger.info("kept %s: it is used by %s", found.path, ", ".join(names))
            continue
        items.append(_cache(found, cache_dir))
    idle = [left for left in inventory.leftovers(cache_dir) if left.owner is None]
    return items + [_leftover(left) for left in idle if left.kind != "packing" or left.path.name not in covered]


def _cache(found: Found, cache_dir: Path) -> _Item:
    """With the tokens that were packed for it."""
    packing = cache_dir / PACKING / found.path.name
    n_bytes = found.n_bytes + (inventory.size_on_disk(packing) if packing.is_dir() else 0)
    return _Item(found.path, f"unfinished, {found.detail}", n_bytes, lambda: inventory.remove(found))


def _leftover(left: Leftover) -> _Item:
    if left.kind == "packing":
        what = LEFTOVERS[left.kind]
        return _Item(left.path, what, left.n_bytes, lambda: inventory.remove_packing(left.path, left.path))
    return _Item(left.path, LEFTOVERS[left.kind], left.n_bytes, lambda: inventory.remove_removed(left.path))
