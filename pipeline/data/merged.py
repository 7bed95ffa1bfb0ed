"""Several caches read as one, with one order over all of their rows.

A merged cache is a directory with a `zarr.json`, statistics, norms and held-out contexts of its own (`merging.py` makes
it). Its training rows are those of its parts, in their files: row r of part p is row N_0 + ... + N_(p-1) + r here, and
contexts are counted in the same way.

What a trainer reads at a time, and the epoch shuffles, is one of V groups (attribute `n_groups`, about as many as the
parts have chunks): group g is rows [N_p * g // V, N_p * (g + 1) // V) of each part p, in order of the parts. Rows of a
part are stored in random order, so a group is a random sample of all parts, each with its share, and a batch of its
rows mixes contexts as an ideal shuffle over everything would.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.data.address import Place, Remote
from pipeline.data.cache import Cache
from pipeline.data.chunk_files import Files
from pipeline.data.codecs import Int8
from pipeline.data.commands import command_of
from pipeline.data.layout import MERGED, Json, SomePlace, canonical, little, stored_bytes
from pipeline.data.options import Codec, Targets
from pipeline.data.pieces import Piece, Shard, Source
from pipeline.errors import UserError


def content_of(attributes: Json) -> int:
    """crc32c of what a part's manifest says about its arrays: another date, or chunks made again with the same bytes,
    leave it as it is."""
    return int(google_crc32c.value(canonical(attributes["manifest"]["arrays"])))


def places_of(path: SomePlace, attributes: Json) -> list[SomePlace]:
    """Where the parts of a merged cache lie; [] of a plain one."""
    return [path.parent / part["path"] for part in attributes.get("parts", [])]


def open_parts(path: Place, attributes: Json) -> list[Cache]:
    """The parts of a merged cache. Raises UserError for one that is missing, damaged or another than was merged, with
    the command that mends it, and for a merged cache in a store."""
    if isinstance(path, Remote):
        fix = "clt cache copy its parts to one, and clt cache merge them there"
        raise UserError(f"{path}: merged caches are read from a disk; {fix}")
    parts = []
    for place, about, request in zip(
        places_of(path, attributes), attributes["parts"], attributes["request"][MERGED], strict=True
    ):
        if not place.exists():
            raise UserError(f"{path}: its part {place} is missing; make it again: {command_of(request, place.parent)}")
        try:
            part = Cache.open(place)
        except UserError as error:
            raise UserError(f"{path}: its part cannot be read: {error}") from error
        if content_of(part.attributes) != about["crc32c"]:
            again = command_of(attributes["request"], path.parent)
            raise UserError(f"{path}: its part {place} is another than was merged; merge again: {again}")
        parts.append(part)
    return parts


def part_problem(path: Place, attributes: Json) -> str:
    """What is wrong with the parts of a merged cache, "" for nothing, and of a plain one."""
    try:
        if "parts" in attributes:
            open_parts(path, attributes)
    except UserError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def merged_of(part: Place, cache_dir: Place) -> list[Path]:
    """The merged caches under `cache_dir`, and beside it, that a cache is a part of. In a store there are none."""
    if isinstance(part, Remote):
        return []
    found = []
    folders = [folder for folder in (part.parent, cache_dir) if not isinstance(folder, Remote)]
    for folder in {folder.resolve(): folder for folder in folders}.values():
        for file in sorted(folder.glob("[!.]*/zarr.json")):
            with suppress(ValueError, KeyError, TypeError):  # no JSON, or no cache: it has no parts
                places = places_of(file.parent, json.loads(file.read_bytes())["attributes"])
                found += [file.parent] if part.resolve() in [place.resolve() for place in places] else []
    return found


class Merged(Cache):
    """A merged cache, opened for reading. `specs` and arrays are its own, which are all but those of training rows."""

    def __init__(self, path: Place, attributes: Json, files: Files | None = None) -> None:
        super().__init__(path, attributes, files)
        self.parts = open_parts(path, attributes)
        self._first_row = np.cumsum([0, *(part.n_rows for part in self.parts)])
        self._first_context = np.cumsum([0, *(part.specs["tokens"].shape[0] for part in self.parts)])

    @property
    def n_rows(self) -> int:
        return int(self._first_row[-1])

    @property
    def n_layers(self) -> int:
        return self.parts[0].n_layers

    @property
    def d_model(self) -> int:
        return self.parts[0].d_model

    @property
    def context(self) -> int:
        return self.parts[0].context

    @property
    def n_bytes(self) -> int:
        """Size of all chunk files, those of the parts included."""
        return stored_bytes(self.attributes["manifest"]["arrays"]) + sum(part.n_bytes for part in self.parts)

    @property
    def codec(self) -> Codec:
        return self.parts[0].codec

    @property
    def targets(self) -> Targets:
        return self.parts[0].targets

    @property
    def stored(self) -> tuple[str, ...]:
        return self.parts[0].stored

    def code(self, name: str) -> Int8 | None:
        raise NotImplementedError("each part has its own; see Source")

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The training contexts of all parts, int32 [n_contexts, T]."""
        if self._tokens is None:
            self._tokens = np.concatenate([part.tokens for part in self.parts])
        return self._tokens

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """(context, position, token id) of training rows, each [k]."""
        rows = np.asarray(rows)
        if rows.size and (int(rows.min()) < 0 or int(rows.max()) >= self.n_rows):
            raise IndexError(f"row outside [0, {self.n_rows})")
        owner = np.searchsorted(self._first_row, rows, side="right") - 1
        context, position = np.empty(rows.shape, np.int64), np.empty(rows.shape, np.int64)
        token = np.empty(rows.shape, np.int32)
        for number, part in enumerate(self.parts):
            own = owner == number
            context[own], position[own], token[own] = part.locate(rows[own] - self._first_row[number])
        return context + self._first_context[owner], position, token

    def shards(self) -> list[Shard]:
        """The groups: of each part a range of rows, in the chunks in which it lies."""
        n_groups = self.attributes["n_groups"]
        found = []
        for group in range(n_groups):
            pieces: list[Piece] = []
            for number, part in enumerate(self.parts):
                start, stop = (part.n_rows * edge // n_groups for edge in (group, group + 1))
                pieces += _pieces(number, part, start, stop, int(self._first_row[number]))
            found.append(Shard(group, tuple(pieces)))
        return found

    def buffer(self, name: str) -> NDArray[Any]:
        n_groups = self.attributes["n_groups"]
        spec = self.parts[0].specs[name]
        most = sum(-(-part.n_rows // n_groups) for part in self.parts)
        return np.empty((most, *spec.shape[1:]), little(spec.dtype))

    def owner(self, piece: Piece) -> Cache:
        return self.parts[piece.part]

    def bring(self, shard: Shard, name: str, out: NDArray[Any] | None) -> list[Source]:
        sources, done = [], 0
        for piece in shard.pieces:
            part = self.owner(piece)
            if out is None:
                rows = part.map_chunk(name, piece.chunk)[piece.start : piece.start + piece.n_rows]
            else:
                rows = out[done : done + piece.n_rows]
                part.read_rows(name, piece.chunk, piece.start, rows)
                done += piece.n_rows
            sources.append(Source(rows, part.code(name)))
        if out is not None and self.codec is Codec.raw:
            return [Source(out[:done], None)]  # gathered from at once, which is twice as fast
        return sources


def _pieces(number: int, part: Cache, start: int, stop: int, first: int) -> list[Piece]:
    """Rows [start, stop) of a part, chunk by chunk. first: number of the part's row 0 in the merged cache."""
    length, pieces = part.specs["resid_mid"].chunk_rows, []
    while start < stop:
        chunk, inside = divmod(start, length)
        n = min(stop - start, length - inside)
        pieces.append(Piece(number, chunk, inside, n, first + start))
        start += n
    return pieces
