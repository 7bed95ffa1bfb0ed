"""Where caches live: a folder, or an address in an object store (s3://bucket/prefix). No library is needed here."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.options import CacheOptions
from pipeline.errors import UserError

SCHEMES = {"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "file"}
"""What obstore takes for an address of a store that one can write to."""


@dataclass(frozen=True)
class Local:
    """The folder in which files of remote caches are kept."""

    root: Path
    n_bytes: int
    """Most bytes of files that are kept there. A cache that is being extracted is not counted."""


@dataclass(frozen=True)
class Remote:
    """A folder of an object store, with as much of a path as is needed: `/`, `name`, `parent`, `str`."""

    address: str
    """Without a slash at the end."""
    local: Local = field(compare=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.address}/{name}", self.local)

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        return Remote(self.address.rpartition("/")[0], self.local)


Place = Path | Remote


def is_address(text: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", text) is not None


def place_of(text: str, local: Local | None = None) -> Place:
    """A folder or an address. Raises UserError for an address that names no store."""
    if not is_address(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme.lower() not in SCHEMES:
        raise UserError(f"{text}: not a kind of store; use s3://, gs://, az:// or a folder")
    if not rest.strip("/"):
        raise UserError(f"{text} names no bucket; write {scheme}://BUCKET/FOLDER")
    return Remote(text.rstrip("/"), local or local_of(CacheOptions()))


def resolved(place: Place) -> Place:
    """The same, however it is spelled."""
    return place if isinstance(place, Remote) else place.resolve()


def cache_place(options: CacheOptions) -> Place:
    """`cache.dir`. Raises UserError for an address that names no store, and for a bound that is none."""
    return place_of(options.dir, local_of(options) if is_address(options.dir) else None)


def folder_of(options: CacheOptions, what: str) -> Path:
    """`cache.dir` for what works on a disk alone. Raises UserError for an address."""
    if is_address(options.dir):
        raise UserError(f"cache.dir={options.dir}: {what} works on a disk; use cache.dir=FOLDER")
    return Path(options.dir)


def local_of(options: CacheOptions) -> Local:
    """`cache.local_dir` and `cache.local_gb`."""
    if not options.local_gb > 0:
        raise UserError(f"cache.local_gb={options.local_gb:g} keeps nothing; use a number of GB such as 50")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    root = Path(options.local_dir).expanduser() if options.local_dir else home / "clt"
    return Local(root.absolute(), int(options.local_gb * 1e9))
