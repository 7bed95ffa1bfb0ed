"""The end of an extraction and of a conversion: metadata, everything on disk, and the root last. And its repair."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import google_crc32c

from pipeline.data import root
from pipeline.data.layout import JOURNAL, Json, Spec, checksum, gb, key_of
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.zarr_files import zarr_metadata
from pipeline.errors import UserError
from pipeline.files import sync, take_lock

logger = logging.getLogger(__name__)


def publish(path: Path, specs: dict[str, Spec], about: Json, crcs: Mapping[str, Mapping[int, int]]) -> None:
    """All chunks are there, with these checksums: then it is a cache. about: the attributes but for the manifest, the
    date and the checksum."""
    data = metadata_of(path, specs, about, crcs)
    sync(Path(place, name) for place, _, names in os.walk(path) for name in [".", *names])
    root.write(path, data)


def metadata_of(path: Path, specs: dict[str, Spec], about: Json, crcs: Mapping[str, Mapping[int, int]]) -> bytes:
    """Writes the metadata of all arrays. -> that of the root, which is to be written when all else is on disk"""
    children = zarr_metadata(specs, {})
    del children[root.NAME]
    for name, data in children.items():
        (path / name).write_bytes(data)
    metadata = {name: google_crc32c.value(data) for name, data in children.items()}
    attributes = {key: value for key, value in about.items() if key not in ("manifest", "created", "checksum")}
    attributes |= {"manifest": {"arrays": manifest(path, specs, crcs), "metadata": metadata}}
    attributes = json.loads(json.dumps(attributes | {"created": datetime.now(UTC).isoformat()}))
    attributes["checksum"] = checksum(attributes)
    return zarr_metadata({}, attributes)[root.NAME]


def manifest(path: Path, specs: dict[str, Spec], crcs: Mapping[str, Mapping[int, int]]) -> Json:
    """Shape and checksums of every array, and the sizes of compressed chunks; null for a chunk that is not finished."""
    arrays: Json = {}
    for name, spec in specs.items():
        known = crcs.get(name, {})
        arrays[name] = spec._asdict() | {"crc32c": [known.get(i) for i in range(spec.n_chunks)]}
        if spec.compressor is not None:
            files = [spec.file(path, name, i) for i in range(spec.n_chunks)]
            arrays[name]["bytes"] = [file.stat().st_size if i in known else None for i, file in enumerate(files)]
    plain: Json = json.loads(json.dumps(arrays))
    return plain


def mend_root(path: Path, request: Json) -> None:
    """Put back the zarr.json of a finished cache of this request from its copy, or the copy from the zarr.json, when
    one of them has gone or is damaged, and say so. Waits for whoever is at work on it. Raises UserError when zarr.json
    cannot be written; a cache without its copy is a whole one."""
    harm = _harm(path, request)
    if harm is None:
        return
    try:
        _mend(path, request)
    except OSError as error:
        if harm == root.NAME:
            with disk_errors(path):
                raise
        logger.warning("%s is missing or damaged and could not be written (%s)", path / harm, error.strerror)


def _mend(path: Path, request: Json) -> None:
    with ExitStack() as locks:
        for name in ("setup", "lock"):  # parts begin under the first, whole extractions under the second
            if _harm(path, request) is None:
                return  # others were faster
            lock = take_lock(path / JOURNAL, path, name, wait=f"{root.NAME} is to be mended")
            locks.callback(os.close, lock)
        harm, there = _harm(path, request), path / root.NAME
        if harm == root.NAME:
            data = root.copied(path)
            assert data is not None
            root.write(path, data)
            logger.warning("%s was missing or damaged: put back from its copy", there)
        elif harm is not None:
            root.write_copy(path, there.read_bytes())
            logger.warning("%s was missing or damaged: made again from %s", path / harm, root.NAME)
        if not (path / JOURNAL / "state.json").exists():
            shutil.rmtree(path / JOURNAL, ignore_errors=True)  # another process may just be trying for the lock


def _harm(path: Path, request: Json) -> str | None:
    """Which of the two is to be written again, from the other."""
    if (kept := root.lost(path)) is not None:
        return root.NAME if key_of(kept["request"]) == key_of(request) else None
    try:
        data = (path / root.NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return root.COPY if root.attributes_in(data) is not None and root.copied(path) != data else None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the operating system says about a disk, as one line."""
    try:
        yield
    except OSError as error:
        where = f"{path} on {disk_of(path)} ({gb(free_bytes(path))} free)"
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        fix = f"{remedy} and run the same command again, which goes on from what was done"
        raise UserError(f"cannot write {where}: {error.strerror or error}; {fix}") from error
