"""Which caches are there, in which state, and how much of the disk they take.

    <cache.dir>/<model>-<dataset>-<key>/    a cache, finished or not (`cache.py`, `journal.py`)
    <cache.dir>/<model>-merged-<key>/       a merged one (`merged.py`), which needs its parts
    <cache.dir>/.packing/<name>/            tokens that were packed for it before the model began
    <cache.dir>/.copying/<name>/            a copy of one that is not whole yet (`transfer.py`)
    <cache.dir>/.removed/<name>-<random>/   one that is being removed: moved here first, so that no reader sees half

What none of these is, is left alone and out of every list. In a store there are caches alone, whole or copied in part.
"""

import contextlib
import os
import re
import shutil
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.data import root
from pipeline.data.address import Local, Place, Remote, is_address, place_of
from pipeline.data.commands import is_conversion
from pipeline.data.condition import damage, is_finished, read_attributes, zarr_json
from pipeline.data.journal import read_state
from pipeline.data.layout import (
    COPYING,
    CRC_BYTES,
    JOURNAL,
    KIND,
    MERGED,
    PACKING,
    SCHEMA,
    Json,
    gb,
    key_of,
    prefix,
    stored,
    sums_shape,
    unchecked_attributes,
)
from pipeline.data.merged import part_problem
from pipeline.data.options import Codec
from pipeline.data.remote import Store
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.files import holder, remove_empty, remove_held, take_lock

REMOVED = ".removed"


class State(StrEnum):
    complete = "complete"
    unfinished = "unfinished"
    at_work = "at work"
    damaged = "damaged"
    other = "other schema"


class Found(NamedTuple):
    """A cache on disk or in a store, or what there is of one."""

    path: Place
    state: State
    detail: str
    """How much of it is done, by whom it is being made, or what is wrong; "" for a complete one."""
    about: Json
    """Attributes; of an unfinished cache those that are known so far; {} where they cannot be read."""

    @property
    def request(self) -> Json | None:
        request: Json | None = self.about.get("request")
        return request

    @property
    def key(self) -> str:
        """By the content where that can be read, else by the name."""
        return self.path.name[-12:] if self.request is None else key_of(self.request)

    @property
    def created(self) -> str | None:
        """ISO date and time, UTC; None before it is finished."""
        return self.about.get("created")

    @property
    def n_bytes(self) -> int:
        if isinstance(self.path, Remote):
            return sum(Store(self.path).sizes().values())
        return size_on_disk(self.path)


class Leftover(NamedTuple):
    """Something beside the caches: packed tokens, or the rest of a cache that was being removed."""

    path: Path
    kind: str
    """`packing`, `copying` or `removed`"""
    owner: str | None
    """Process that is at work on it."""

    @property
    def n_bytes(self) -> int:
        return size_on_disk(self.path)


def caches(cache_dir: Place) -> list[Found]:
    """Every cache under `cache_dir`, by name."""
    if isinstance(cache_dir, Remote):
        return [found for name in Store(cache_dir).children() if (found := look(cache_dir / name)) is not None]
    places = sorted(path for path in cache_dir.glob("*") if not path.name.startswith("."))
    return [found for path in places if (found := look(path)) is not None]


def leftovers(cache_dir: Place) -> list[Leftover]:
    if isinstance(cache_dir, Remote):
        return []
    copying = [Leftover(path, "copying", holder(path / JOURNAL)) for path in sorted((cache_dir / COPYING).glob("*"))]
    packing = [Leftover(path, "packing", holder(path)) for path in sorted((cache_dir / PACKING).glob("*"))]
    removed = [Leftover(path, "removed", holder(path / JOURNAL)) for path in sorted((cache_dir / REMOVED).glob("*"))]
    return [found for found in packing + copying + removed if found.path.is_dir()]


def look(path: Place) -> Found | None:
    """What stands at `path`; None when it is no cache of this program. Sizes of files only: what is inside them is for
    `verify.py`."""
    if isinstance(path, Remote):
        return _with_attributes(path) if is_finished(path) else _copied_in_part(path)
    if (path / root.NAME).is_file() or root.lost(path) is not None:
        return _with_attributes(path)
    return _with_journal(path) if (path / JOURNAL).is_dir() else None


def find(cache_dir: Place, name: str, local: Local | None = None) -> Found:
    """The cache that a person means: the name of a directory, a path, an address, or the beginning of one name or key.
    local: where files of an address are kept; None: where they usually are. Raises UserError for none and for
    several."""
    if not name:
        raise UserError(f"an empty name names no cache; clt cache ls --cache-dir {cache_dir} lists them")
    places = [place_of(name, local)] if is_address(name) else [cache_dir / name, Path(name)]
    for path in places:
        if path.name not in ("", ".", "..") and (found := look(path)) is not None:
            return found
    if is_address(name):
        raise UserError(f"{name} is no cache of this program; clt cache ls --cache-dir ADDRESS lists those of a folder")
    there = caches(cache_dir)
    matches = [found for found in there if found.path.name.startswith(name) or found.key.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(found.path.name for found in matches)
        raise UserError(f"{name} is the beginning of several caches; give more of one of: {names}")
    if Path(name).exists():
        raise UserError(f"{name} is no cache of this program; name a directory that clt extract made")
    names = ", ".join(found.path.name for found in there)
    hint = "; another directory is named with --cache-dir" if "=" in name else ""
    raise UserError(f"no cache {name} under {cache_dir}/{hint}; there are: {names or 'none (clt extract makes one)'}")


def newest(cache_dir: Place) -> Found:
    """The finished cache that was made last, whole or damaged. Raises UserError when there is none."""
    finished = [found for found in caches(cache_dir) if found.created is not None]
    if not finished:
        raise UserError(f"no finished cache under {cache_dir}/; make one with clt extract model=world")
    return max(finished, key=lambda found: str(found.created))


def size_on_disk(path: Path) -> int:
    """Bytes that a directory and all in it take, as the file system counts them."""
    total = 0
    for place, _, names in os.walk(path):
        for name in [".", *names]:
            with contextlib.suppress(FileNotFoundError):  # it is at work: files come and go
                total += os.lstat(Path(place, name)).st_blocks * 512
    return total


def remove(found: Found) -> int:
    """Remove a cache and the tokens that were packed for it. -> bytes freed

    To a reader it is there as a whole or not at all. Raises UserError when an extraction of it is at work, and for a
    link.
    """
    path = found.path
    assert look(path) is not None, path
    if isinstance(path, Remote):
        return _remove_remote(path)
    if path.is_symlink():
        raise UserError(f"{path} is a link; remove {path.resolve()}, then the link")
    packing = path.parent / PACKING / path.name
    freed = remove_packing(packing, path) if packing.is_dir() else 0
    lock = take_lock(path / JOURNAL, path)
    try:
        freed += size_on_disk(path)
        (path.parent / REMOVED).mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=path.parent / REMOVED))
        path.rename(aside)  # onto the empty directory
        _delete(aside)
    finally:
        os.close(lock)
    return freed


def _remove_remote(path: Remote) -> int:
    """The group's zarr.json first: then it is no cache. What says of which content it is a copy goes last."""
    store = Store(path, "later")
    sizes = store.sizes()
    store.delete([root.NAME] if root.NAME in sizes else [])
    store.delete(sizes.keys() - {root.NAME, COPYING})
    store.delete([COPYING] if COPYING in sizes else [])
    return sum(sizes.values())


def remove_packing(folder: Path, what: Path) -> int:
    """Remove packed tokens. -> bytes freed. Raises UserError when somebody is at work on them."""
    lock = take_lock(folder, what)
    try:
        freed = size_on_disk(folder)
        remove_held(folder)
    finally:
        os.close(lock)
    remove_empty([folder.parent])
    return freed


def remove_removed(folder: Path) -> int:
    """Finish a removal that was interrupted, or remove a copy that is not whole. -> bytes freed"""
    freed = size_on_disk(folder)
    lock = take_lock(folder / JOURNAL, folder)
    try:
        _delete(folder)
    finally:
        os.close(lock)
    return freed


def _delete(aside: Path) -> None:
    """The lock goes last: as long as there is anything else, it says that somebody is at work."""
    for child in aside.iterdir():
        if child.is_dir() and not child.is_symlink() and child.name != JOURNAL:
            shutil.rmtree(child)
        elif child.name != JOURNAL:
            child.unlink()
    shutil.rmtree(aside)
    remove_empty([aside.parent])


def _copied_in_part(path: Remote) -> Found | None:
    """An upload that was stopped: there are files of a cache, and not the last one."""
    if not re.search(r"-[0-9a-f]{12}$", path.name) or not (sizes := Store(path).sizes()):
        return None
    what = f"{gb(sum(sizes.values()))} of a copy; the command that began it goes on, clt cache rm removes it"
    return Found(path, State.unfinished, what, {})


def _with_attributes(path: Place) -> Found | None:
    if not _is_ours(path):
        return None
    owner = None if isinstance(path, Remote) else _owner(path)
    try:
        attributes = read_attributes(path)
    except UserError as error:
        raw = _raw_attributes(path)
        if raw is not None and raw.get("schema") != SCHEMA:
            return Found(path, State.other, f"has schema {raw.get('schema')}, this version reads {SCHEMA}", {})
        return Found(path, State.damaged, str(error), {})
    if owner is not None:
        return Found(path, State.at_work, f"being made by process {owner}", attributes)
    broken = list(damage(path, attributes))
    if not broken:
        problem = part_problem(path, attributes)
        return Found(path, State.damaged if problem else State.complete, problem, attributes)
    array, chunk, what = broken[0]
    first = f"chunk {chunk} of {array} {what}" if array else what
    more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    return Found(path, State.damaged, first + more, attributes)


def _with_journal(path: Path) -> Found | None:
    owner, about = _owner(path), {}
    state, by = (
        State.unfinished if owner is None else State.at_work,
        f"being made by process {owner}, " if owner else "",
    )
    try:
        about = read_state(path) or {}
    except UserError as error:
        return Found(path, state, f"{by}{error}", {}) if _is_ours(path) else None
    if not about:
        return Found(path, state, f"{by}0 %", {}) if _is_barely_begun(path) else None
    if about.get("kind") != KIND:
        return None
    if about["schema"] != SCHEMA:
        return Found(path, State.other, f"has schema {about['schema']}, this version reads {SCHEMA}", {})
    return Found(path, state, by + _progress(path, about), about)


def _owner(path: Path) -> str | None:
    """The extraction that is at work on a cache: it packs, or it writes."""
    return holder(path / JOURNAL) or holder(path.parent / PACKING / path.name)


def _is_ours(path: Place) -> bool:
    """Whether a directory with a zarr.json, or with a journal that cannot be read, was made by this program: it says
    so, or (where it is damaged) it is named and furnished as a cache is."""
    raw = _raw_attributes(path)
    if raw is not None:
        return raw.get("kind") == KIND
    if not re.search(r"-[0-9a-f]{12}$", path.name):
        return False
    furniture = ("stats", "evaluation") if f"-{MERGED}-" in path.name else ("tokens", "resid_mid", "calibration")
    return isinstance(path, Remote) or all((path / name).is_dir() for name in furniture)


def _is_barely_begun(path: Path) -> bool:
    """Nothing but a journal, and nothing but a lock in that."""
    inside = [*path.iterdir(), *(path / JOURNAL).iterdir()]
    return {child.name for child in inside} <= {JOURNAL, "lock", "state.json.aside"}


def _raw_attributes(path: Place) -> Json | None:
    """Of zarr.json, unchecked; None where there is none or it is no JSON."""
    return unchecked_attributes(zarr_json(path) or b"")


def _progress(path: Path, about: Json) -> str:
    """Of the blocks that an extraction has to do: 37 %. Of a cache that is being mended: its chunks."""
    if is_conversion(about):
        done = sum(file.is_file() for file in path.rglob("c/**/*") if file.suffix != ".aside")
        return f"{100 * done // about['n_chunks']} %"
    arrays = about["manifest"]["arrays"]
    shards = [
        crc for split in Split for name in stored(arrays, split) for crc in arrays[prefix(split) + name]["crc32c"]
    ]
    lost = shards.count(None)
    if lost < len(shards):
        return f"{lost:,} of {len(shards):,} shards to be made again"
    contexts = [arrays[prefix(split) + "tokens"]["shape"][0] for split in Split]
    n_blocks = sum(-(-n // about["block_contexts"]) for n in contexts)
    shape = sums_shape(Codec(about["request"]["codec"]), *arrays["resid_mid"]["shape"][1:])
    entry = 8 * (1 + int(np.prod(shape)))
    done = sum(_size(file) // entry for file in (path / JOURNAL).glob("blocks-*") if file.suffix != ".aside")
    return f"{100 * done // n_blocks} %"


def _size(file: Path) -> int:
    try:
        return file.stat().st_size - CRC_BYTES
    except FileNotFoundError:
        return 0
