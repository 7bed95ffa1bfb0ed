"""Whether a directory holds a finished cache, and whether its files are whole."""

import json
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from pipeline.data import root
from pipeline.data.address import Place, Remote
from pipeline.data.chunk_files import Files, files_of, repair
from pipeline.data.commands import command_of, command_to_go_on
from pipeline.data.journal import read_state
from pipeline.data.layout import KIND, SCHEMA, Json, file_bytes, spec_of
from pipeline.data.remote import Store
from pipeline.errors import UserError


def is_finished(path: Place) -> bool:
    """Whether it has been called finished, even if its zarr.json has gone since."""
    if isinstance(path, Remote):
        return zarr_json(path) is not None
    return (path / root.NAME).exists() or root.lost(path) is not None


def read_attributes(path: Place) -> Json:
    """The attributes of a finished cache. Raises UserError for anything else."""
    file, data = path / root.NAME, zarr_json(path)
    if not isinstance(path, Remote) and (kept := root.lost(path)) is not None:
        what = "is missing" if data is None else "is damaged"
        raise UserError(f"{file} {what}; put it back with: {command_of(kept['request'], path.parent)}")
    if data is None:
        state = None if isinstance(path, Remote) else read_state(path)
        if state is None:
            raise UserError(f"{path} is no cache (it has no zarr.json); make one with clt extract")
        raise UserError(f"the cache {path} is not finished; go on with: {command_to_go_on(state, path.parent)}")
    again = f"remove {path} and make it again with clt extract"
    try:
        attributes: Json = dict(json.loads(data)["attributes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; {again}") from error
    if attributes.get("kind") != KIND:
        raise UserError(f"{path} is a Zarr group, but no cache of this program; name a directory that clt extract made")
    if attributes.get("schema") != SCHEMA:
        has = f"schema {attributes.get('schema')}, this version reads {SCHEMA}"
        raise UserError(f"{path} has {has}; make a new cache with clt extract (it gets a directory of its own)")
    if root.attributes_in(data) is None:
        raise UserError(f"{file} is damaged (its checksum is wrong); {again}")
    return attributes


def zarr_json(path: Place) -> bytes | None:
    """The group's own; None where there is none."""
    try:
        return Store(path).get(root.NAME) if isinstance(path, Remote) else (path / root.NAME).read_bytes()
    except FileNotFoundError:
        return None


def damage(path: Place, attributes: Json, files: Files | None = None) -> Iterator[tuple[str, int, str]]:
    """(array, chunk, what is wrong) for every chunk file that is not there or has another size, and ("", 0, what) for
    metadata. Sizes only: what is inside is checked when it is read. In a store one listing tells them; of its metadata,
    which readers of this program do not need, it says whether it is there."""
    files = files or files_of(path, attributes)
    for name, entry in attributes["manifest"]["arrays"].items():
        spec = spec_of(entry)
        for chunk in range(spec.n_chunks):
            size = files.size(spec.file(Path(), name, chunk).as_posix())
            if size is None:
                yield name, chunk, "is missing"
            elif size != (whole := file_bytes(entry, chunk)):
                what = "truncated" if size < whole else "too long"
                yield name, chunk, f"is {what} ({size:,} bytes, not {whole:,})"
    for name, expected in attributes["manifest"]["metadata"].items():
        if isinstance(path, Remote):
            is_there = files.size(name) is not None
        else:
            is_there = (path / name).exists() and google_crc32c.value((path / name).read_bytes()) == expected
        if not is_there:
            yield "", 0, f"{path / name} is missing or damaged"


def refusal(path: Place, request: Json, name: str, chunk: int, what: str) -> UserError:
    subject = f"{path}: chunk {chunk} of {name} {what}" if name else what
    fix = repair(path, request) if isinstance(path, Remote) else command_of(request, path.parent)
    return UserError(f"{subject}; make it again: {fix}")
