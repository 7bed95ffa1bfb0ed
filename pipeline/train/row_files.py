"""Tensors in several safetensors files, by ranges of rows, and one index that says which rows lie where.

    model-00001-of-00004.safetensors, ...   what rank 0 and the others wrote, by the tensors' own names
    index.json                      {"schema": 1, "features": ranks, "data": ranks, "files": {"model": {name: entry}}}

An entry has dtype, shape (of the whole tensor), axis (of the features, or null) and pieces: each with a file and the
`rows` on the axis that it holds, as [start, stop] in the order in which they lie there; without an axis there is one
piece, or, with `each` ("world"), one for every rank, whose number is its `rank`. (`each` was "features" for moments of
8 bits in earlier versions: one piece, of the one feature rank that there could be.)

A single safetensors file is read through the same `Stored`. Only what is asked for is read: files are mapped into
memory, and pieces are slices of them.
"""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.arch.rows import joined
from pipeline.dist.mesh import Mesh
from pipeline.errors import UserError
from pipeline.files import save_tensors
from pipeline.train.mapped_file import MappedFile

INDEX = "index.json"
SCHEMA = 1

WORLD = "world"
"""`each` of a tensor that has a content of each rank's own."""

Entry = dict[str, Any]
Entries = dict[str, Entry]
"""By the tensors' names."""


@dataclass(frozen=True)
class Held:
    """A tensor of this rank, and what it is of the whole one: without an axis all of it."""

    tensor: Tensor
    axis: int | None = None
    rows: tuple[range, ...] = ()
    """What of the axis this is, in the order in which it lies here."""
    length: int = 0
    """Of the axis, in the whole tensor."""
    each: str | None = None
    """WORLD: the tensor is this rank's own,"""
    number: int = 0
    """which is so many."""

    @property
    def n_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def shape(self) -> list[int]:
        """Of the whole tensor."""
        sizes = list(self.tensor.shape)
        if self.axis is not None:
            assert sizes[self.axis] == sum(map(len, self.rows)), "rows of another number than the tensor has"
            sizes[self.axis] = self.length
        return sizes


def shared_out(held: Mapping[Any, Held], mesh: Mesh) -> dict[Any, Held]:
    """Those of a rank's tensors that it writes. Data ranks, which hold the same, share the bytes; what is of all is
    written by the first feature rank, and what is of each rank in the world by each."""
    found, load = {}, [0] * mesh.data.size
    for key, one in sorted(held.items(), key=lambda item: (-item[1].n_bytes, item[0])):
        if one.each == WORLD:
            found[key] = one
        elif one.axis is not None or mesh.features.rank == 0:
            rank = load.index(min(load))
            load[rank] += one.n_bytes
            if rank == mesh.data.rank:
                found[key] = one
    return found


def file_name(stem: str, rank: int, n_ranks: int) -> str:
    """Numbers begin at 1, as in the hub's files."""
    return f"{stem}-{rank + 1:05d}-of-{n_ranks:05d}.safetensors"


def write(folder: Path, stem: str, held: Mapping[str, Held], rank: int, n_ranks: int) -> Entries:
    """Write one rank's file; none where it has nothing. -> its part of the index"""
    if not held:
        return {}
    name = file_name(stem, rank, n_ranks)
    save_tensors({key: one.tensor.detach().contiguous().cpu() for key, one in held.items()}, folder / name)
    return {key: _entry(name, one) for key, one in held.items()}


def _entry(file: str, held: Held) -> Entry:
    piece: dict[str, Any] = {"file": file}
    if held.axis is not None:
        piece["rows"] = [[one.start, one.stop] for one in held.rows]
    if held.each is not None:
        piece["rank"] = held.number
    dtype = str(held.tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": held.shape(), "axis": held.axis, "each": held.each, "pieces": [piece]}


def merged(parts: Iterable[Mapping[str, Entries]], features: int, data: int) -> dict[str, Any]:
    """The index of what all ranks wrote: of each its entries by stem."""
    files: dict[str, Entries] = {}
    for part in parts:
        for stem, entries in part.items():
            known = files.setdefault(stem, {})
            for name, entry in entries.items():
                if name not in known:
                    known[name] = {**entry, "pieces": []}
                alike = ("dtype", "axis", "each") if entry["each"] else ("dtype", "axis", "each", "shape")
                assert all(known[name][key] == entry[key] for key in alike), f"{name} differs by rank"
                known[name]["pieces"] += entry["pieces"]
    for entries in files.values():
        for name, entry in entries.items():
            _check_whole(name, entry)
    return {"schema": SCHEMA, "features": features, "data": data, "files": files}


def _check_whole(name: str, entry: Entry) -> None:
    """Every row is there, and once."""
    if entry["each"] is not None:
        return
    if entry["axis"] is None:
        assert len(entry["pieces"]) == 1, f"{name} was written by {len(entry['pieces'])} ranks"
        return
    rows = sorted((a, b) for piece in entry["pieces"] for a, b in piece["rows"])
    expected = [range(entry["shape"][entry["axis"]])] if entry["shape"][entry["axis"]] else []
    disjoint = all(before[1] <= after[0] for before, after in pairwise(rows))
    assert disjoint, f"{name} has rows twice: {rows}"
    assert joined([range(a, b) for a, b in rows]) == expected, f"{name} is not whole: {rows}"


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder; None where there is none. UserError for one of another version."""
    file = folder / INDEX
    if not file.exists():
        return None
    index: dict[str, Any] = json.loads(file.read_text())
    if index.get("schema") != SCHEMA:
        raise UserError(f"{file} has schema {index.get('schema')}, this version reads {SCHEMA}; read it with its own")
    return index


def files_of(folder: Path, stem: str) -> list[Path]:
    """The files that hold a stem's tensors: one, or those that the index names, in order."""
    index = read_index(folder)
    if index is None:
        return [folder / f"{stem}.safetensors"]
    entries = index["files"].get(stem, {})
    return [folder / name for name in sorted({piece["file"] for e in entries.values() for piece in e["pieces"]})]


class Stored:
    """The tensors of one stem in a folder, to be read by rows. Context: closing it leaves what was read as it is."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._files = folder, dict[str, MappedFile]()
        index = read_index(folder)
        self.ranks: tuple[int, int] | None = None
        """Ranks along (features, data) that wrote it; None for a single file."""
        if index is None:
            self._entries = self._of_one(f"{stem}.safetensors")
        else:
            self._entries, self.ranks = index["files"].get(stem, {}), (index["features"], index["data"])
        self.slices = deque[tuple[str, str, int]](maxlen=10_000)
        """What was read of the files last: (file, tensor, elements)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._entries[name]["shape"])

    def each(self, name: str) -> str | None:
        """WORLD where each rank wrote a content of its own; "features" in earlier versions."""
        each: str | None = self._entries[name]["each"]
        return each

    def read(self, name: str, axis: int | None = None, rows: Sequence[range] = (), layer: int | None = None) -> Tensor:
        """A tensor; with `axis` these rows of it, in this order; with `layer` one entry of axis 0, where that is not
        the features'. What lies in one piece is a view of the mapped file. KeyError where there is no such tensor."""
        entry = self._entries[name]
        assert entry["each"] is None, f"{name} is of each rank alone; ask for one rank's"
        stored, fixed = entry["axis"], {} if layer is None else {0: range(layer, layer + 1)}
        assert axis is None or stored in (None, axis), f"{name} is stored by its axis {stored}, not {axis}"
        if axis is None and stored is not None:
            axis, rows = stored, [range(entry["shape"][stored])]
        if axis is None:
            found = self._slice(entry["pieces"][0]["file"], name, fixed)
        else:
            assert layer is None or axis > 0
            places = [place for one in joined(rows) for place in _places(name, entry, axis, one)]
            parts = [self._slice(file, name, fixed | {axis: rows}) for file, rows in places]
            found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
        return found if layer is None else found[0]

    def pick(self, name: str, axis: int, rows: Tensor | range, at: int | None = None) -> Tensor:
        """Single rows of a tensor (`arch/on_disk.Rows`): int64 [n], or a range, which is a view where it lies in one
        piece."""
        entry = self._entries[name]
        assert entry["each"] is None
        assert entry["axis"] in (None, axis)
        if isinstance(rows, range):
            places = list(_places(name, entry, axis, rows))
            parts = [self._part(file, name, axis, at, part) for file, part in places]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis if at is None else 0)
        pieces = _pieces(entry, axis)
        if len(pieces) == 1:
            return self._part(pieces[0][1], name, axis, at, rows)
        found, along = None, axis if at is None else 0
        for held, file, first in pieces:
            here = ((rows >= held.start) & (rows < held.stop)).nonzero().flatten()
            if len(here) or found is None:
                part = self._part(file, name, axis, at, rows[here] - held.start + first)
                if found is None:
                    found = part.new_empty([*part.shape[:along], len(rows), *part.shape[along + 1 :]])
                found.index_copy_(along, here, part)
        assert found is not None
        return found

    def __deepcopy__(self, memo: object) -> Self:
        """A copy of what reads from here reads from here."""
        return self

    def own(self, name: str, rank: int) -> Tensor | None:
        """What this rank wrote of a tensor that each has; None where it did not."""
        entry = self._entries[name]
        assert entry["each"] is not None
        files = [piece["file"] for piece in entry["pieces"] if piece["rank"] == rank]
        return self._slice(files[0], name, {}) if files else None

    def _part(self, file: str, name: str, axis: int, at: int | None, rows: Tensor | range) -> Tensor:
        """`pick` within one file, rows by their places in it."""
        tensor = self._file(file).tensor(name)
        if at is not None:
            tensor, axis = tensor.select(1 - axis, at), 0
        if isinstance(rows, range):
            tensor = tensor.narrow(axis, rows.start, len(rows))
        else:
            tensor = tensor.index_select(axis, rows)
        self.slices.append((file, name, tensor.numel()))
        return tensor

    def _file(self, file: str) -> MappedFile:
        if file not in self._files:
            self._files[file] = MappedFile(self._folder / file)
        return self._files[file]

    def _slice(self, file: str, name: str, places: dict[int, range]) -> Tensor:
        tensor = self._file(file).tensor(name)
        for axis, rows in places.items():
            tensor = tensor.narrow(axis, rows.start, len(rows))
        self.slices.append((file, name, tensor.numel()))
        return tensor

    def _of_one(self, file: str) -> Entries:
        shapes = self._file(file).shapes()
        return {
            name: {"shape": shape, "axis": None, "each": None, "pieces": [{"file": file}]}
            for name, shape in shapes.items()
        }


def _places(name: str, entry: Entry, axis: int, wanted: range) -> Iterator[tuple[str, range]]:
    """Where the rows of a range lie: (file, rows of the tensor in it)."""
    at = wanted.start
    for rows, file, first in _pieces(entry, axis):
        if rows.start <= at < rows.stop and at < wanted.stop:
            stop = min(rows.stop, wanted.stop)
            yield file, range(first + at - rows.start, first + stop - rows.start)
            at = stop
    assert at >= wanted.stop, f"{name}: row {at} is in no file"


def _pieces(entry: Entry, axis: int) -> list[tuple[range, str, int]]:
    """The ranges of rows by number: (rows, file, where they begin in its tensor)."""
    found: list[tuple[range, str, int]] = []
    for piece in entry["pieces"]:
        first = 0
        for start, stop in piece.get("rows", [[0, entry["shape"][axis]]]):
            found.append((range(start, stop), piece["file"], first))
            first += stop - start
    return sorted(found, key=lambda one: one[0].start)
