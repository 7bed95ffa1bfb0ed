"""The root metadata of a cache, `zarr.json`, which says that it is finished and what is in it; and its copy.

    zarr.json            written last, in one step
    tokens/.manifest     the same bytes, then their crc32c. In the directory of an array, where Zarr lists nothing.

A cache is finished: the copy is written, then zarr.json, then the journal's state is removed. One that is mended: the
journal's state is written, then the copy is removed, then zarr.json. So while zarr.json is there, damaged or not, the
copy tells the truth; where it is not there, the copy does so only when no journal says that work is left.
"""

import json
from pathlib import Path

import google_crc32c

from pipeline.data.layout import CRC_BYTES, JOURNAL, KIND, Json, checksum
from pipeline.files import sync, write_aside

NAME = "zarr.json"
COPY = "tokens/.manifest"
_KEYS = {"attributes", "zarr_format", "node_type"}
_MORE_KEYS = {"consolidated_metadata"}  # which a user of Zarr may add


def write(path: Path, data: bytes) -> None:
    """Finish a cache: all else is on disk."""
    write_copy(path, data)
    write_aside(path / NAME, data)


def write_copy(path: Path, data: bytes) -> None:
    (path / COPY).parent.mkdir(exist_ok=True)
    write_aside(path / COPY, sealed(data))


def forget(path: Path) -> None:
    """It is finished no more."""
    for file in (path / COPY, path / NAME):
        if file.exists():
            file.unlink()
            sync([file.parent])


def sealed(data: bytes) -> bytes:
    """What the copy holds."""
    return data + int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def attributes_in(data: bytes) -> Json | None:
    """The attributes in the bytes of a zarr.json, of any schema; None when they are not those of a whole one."""
    try:
        root = json.loads(data)
        keys, attributes = set(root), root["attributes"]
        is_group = (root["zarr_format"], root["node_type"]) == (3, "group") and keys - _MORE_KEYS == _KEYS
        whole = is_group and attributes["kind"] == KIND and attributes["checksum"] == checksum(attributes)
    except (ValueError, KeyError, TypeError):
        return None
    return dict(attributes) if whole else None


def copied(path: Path) -> bytes | None:
    """The zarr.json that the copy holds; None when there is no whole copy."""
    try:
        stored = (path / COPY).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    data = stored[:-CRC_BYTES]
    return data if stored == sealed(data) and attributes_in(data) is not None else None


def lost(path: Path) -> Json | None:
    """The attributes of a finished cache whose zarr.json has gone or is damaged, by its copy. None: it is not so, or
    no copy is left."""
    try:
        if attributes_in((path / NAME).read_bytes()) is not None:
            return None
    except FileNotFoundError:
        if (path / JOURNAL / "state.json").exists():
            return None
    except NotADirectoryError:
        return None
    data = copied(path)
    return None if data is None else attributes_in(data)
