"""`clt extract cache.dir=s3://bucket/prefix`: made on this machine's disk, then sent to the store.

1. The cache is made in `<cache.local_dir>/.making/`, as any other; a stopped extraction goes on there.
2. When it is finished it is sent, `zarr.json` last; a stopped one goes on with what is not there yet.
3. Its files become copies in `cache.local_dir`, so that the training that follows fetches nothing; when they are more
   than `cache.local_gb`, they are removed.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.data import local_copies
from pipeline.data.address import Remote
from pipeline.data.cache import Cache
from pipeline.data.commands import overrides_of
from pipeline.data.layout import Json, directory_of, gb, request_of
from pipeline.data.parts import Part
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.publish import mend_root
from pipeline.data.remote import Store
from pipeline.data.transfer import copy, is_whole
from pipeline.errors import UserError
from pipeline.files import remove_empty, remove_held, take_lock
from pipeline.stages.options import ExtractConfig

logger = logging.getLogger(__name__)

SENDING = ".sending"
PROBE = ".copying-probe"

Make = Callable[[ExtractConfig, Part | None, Json, Path], bool]


def run(cfg: ExtractConfig, parent: Remote, part: Part | None, make: Make) -> Remote:
    """Make the cache in the store, or go on with it, or say that it is there. make: what makes it in a folder."""
    if part is not None:
        fix = "extract onto a file system that all see, then clt cache copy"
        raise UserError(f"part {part} of a cache cannot be made in {parent}: each machine has a disk of its own; {fix}")
    request = request_of(cfg.model, cfg.dataset, cfg.cache.codec, cfg.cache.targets)
    target = directory_of(parent, request)
    store = Store(target)
    next_command = f"next: clt train +experiment=batchtopk_across {overrides_of(request, parent)}"
    work = parent.local.root / local_copies.MAKING / local_copies.store_folder(target, store.server) / target.name
    if cfg.dry_run and not is_whole(target):
        make(_in_folder(cfg, work), None, request, work)
        logger.info("it would be made there, and then sent to %s", target)
        return target
    lock = take_lock(work.parent / SENDING / work.name, target)
    try:
        if is_whole(target):
            if work.exists():  # stopped after it was sent
                shutil.rmtree(work)
            logger.info("already there, nothing to do: %s\n%s", target, next_command)
            return target
        _check_writable(store)
        _say(target, work)
        mend_root(work, request)
        is_finished = make(_in_folder(cfg, work), None, request, work)
        assert is_finished
        made = Cache.open(work)
        copy(work, target)
        folder = local_copies.folder_of(target, store.server, made.attributes["checksum"])
        is_kept = local_copies.adopt(parent.local, work, folder)
        kept = f"copies are kept in {parent.local.root}" if is_kept else "no copies are kept (cache.local_gb)"
        logger.info("%s: %s, %s\n%s", target, gb(made.n_bytes), kept, next_command)
        return target
    finally:
        remove_held(work.parent / SENDING / work.name)
        os.close(lock)
        remove_empty([work.parent / SENDING, work.parent, work.parent.parent])


def _in_folder(cfg: ExtractConfig, work: Path) -> ExtractConfig:
    return replace(cfg, cache=replace(cfg.cache, dir=str(work.parent)))


def _check_writable(store: Store) -> None:
    """Now, not after hours of work."""
    store.put(PROBE, b"")
    store.delete([PROBE])


def _say(target: Remote, work: Path) -> None:
    free = f"{gb(free_bytes(work))} free on {disk_of(work)} for all of it"
    logger.info("to %s: made in %s first (cache.local_dir; %s), then sent", target, work, free)
