"""The directory of features as it is made, so that a stopped run goes on and a reader sees a whole one or none.

.NAME.making/request.json    what is being made; another request begins anew
             A-B.notes       where the passes over features A to B of those that are asked for stand (`features.Notes`)
             A-B.done        they are written: their files in out/, their rows in A-B.*.parquet
             out/            what takes the name in the end

Ranks write different features into one such directory. What is done stays done, whatever number of ranks goes on.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.files import empty_held, remove_held, sync, take_lock, write_aside
from pipeline.interp.dashboards import feature_files
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.dashboards.feature_records import context_rows, feature_row, schemas
from pipeline.interp.dashboards.features import Notes

logger = logging.getLogger(__name__)

TABLES = ("features.parquet", "contexts.parquet")
RECORDS_AT_ONCE = 256
"""Features in memory, and in a row group of each table."""


class Making:
    """Context: the directory `target` while it is made by the ranks of a group, and by nobody else meanwhile
    (UserError)."""

    def __init__(self, target: Path, request: Record, group: Group = ALONE) -> None:
        """request: all that the result depends on, as JSON."""
        self.target, self._group = target, group
        self._work = target.with_name(f".{target.name}.making")
        self._request = json.loads(json.dumps(request))

    def __enter__(self) -> Self:
        if self._group.rank == 0:
            self._lock = take_lock(self._work, self.target)
            file = self._work / "request.json"
            if not file.exists() or json.loads(file.read_text()) != self._request:
                empty_held(self._work)
                write_aside(file, json.dumps(self._request).encode())
            (self._work / "out").mkdir(exist_ok=True)
            if self._group.size > 1:
                fcntl.flock(self._lock, fcntl.LOCK_SH)  # all hold it together, until the last one is gone
        self._group.barrier()
        if self._group.rank:
            self._lock = take_lock(self._work, self.target, shared=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def left(self, n: int, most: int) -> list[range]:
        """Which of n features are still to be written, at most so many at a time; the same on every rank."""
        found: list[range] = []
        at = 0
        for done in [*self._done(), range(n, n)]:
            while at < done.start:
                stop = min(done.start, (at // most + 1) * most)  # where others of the same size would end
                found.append(range(at, stop))
                at = stop
            at = done.stop
        spans = self._group.share([[some.start, some.stop] for some in found], "features that are left")
        return [range(*span) for span in spans]

    def _done(self) -> list[range]:
        names = (file.stem.split("-") for file in self._work.glob("*.done"))
        return sorted((range(int(start), int(stop)) for start, stop in names), key=lambda some: some.start)

    def notes(self, some: range) -> Notes:
        """Those of other features may still be there."""
        return Notes(self._file(some, "notes"))

    def _file(self, some: range, kind: str) -> Path:
        return self._work / f"{some.start}-{some.stop}.{kind}"

    def write(self, some: range, records: Iterable[Record]) -> None:
        """These features."""
        from pyarrow import Table  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

        files: list[Path] = []
        tables = [self._file(some, name) for name in TABLES]
        of_features, of_contexts = schemas()
        with ParquetWriter(tables[0], of_features) as features, ParquetWriter(tables[1], of_contexts) as contexts:
            every = iter(records)
            while few := list(islice(every, RECORDS_AT_ONCE)):
                for record in few:
                    name = f"{feature_files.cantor(record['layer'], record['index'])}.json"
                    files.append(self._work / "out" / name)
                    files[-1].write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
                features.write_table(Table.from_pylist([feature_row(record) for record in few], of_features))
                rows = list(chain.from_iterable(map(context_rows, few)))
                contexts.write_table(Table.from_pylist(rows, of_contexts))
        sync([*files, *tables, self._work / "out"])
        write_aside(self._file(some, "done"), b"")
        self._file(some, "notes").unlink(missing_ok=True)

    def finish(self, about: Record, packed: tuple[int, int] | None) -> None:
        """Put everything in its place, on rank 0, when all are done. packed: features of a layer and layers, where the
        files are to be packed."""
        self._group.barrier()
        if self._group.rank == 0:
            self._put(about, packed)
        self._group.barrier()

    def _put(self, about: Record, packed: tuple[int, int] | None) -> None:
        out = self._work / "out"
        finished = self._work / "finished"
        if not finished.exists():
            _join([[self._file(some, name) for name in TABLES] for some in self._done()], out)
            if packed is not None:
                feature_files.pack(out, *packed)
            write_aside(out / feature_files.ABOUT, (json.dumps(about, indent=2) + "\n").encode())
            sync([*(out / name for name in TABLES), out])
            write_aside(finished, b"")
        if out.exists() and any(out.iterdir()):
            if self.target.exists():
                shutil.rmtree(self.target)
            out.rename(self.target)
            sync([self.target.parent])
        remove_held(self._work)


def forget(target: Path) -> None:
    """Remove what a process left that ended just after it had finished."""
    work = target.with_name(f".{target.name}.making")
    if work.exists():
        lock = take_lock(work, target)
        remove_held(work)
        os.close(lock)


def _join(parts: list[list[Path]], out: Path) -> None:
    """The tables of all features from those of some, in order. Row groups are of RECORDS_AT_ONCE features wherever
    the parts begin."""
    from pyarrow import concat_tables
    from pyarrow.parquet import ParquetFile, ParquetWriter, read_schema

    every = concat_tables([ParquetFile(tables[0]).read(["layer", "feature"]) for tables in parts])
    edges = _identity(every)[RECORDS_AT_ONCE::RECORDS_AT_ONCE]
    for number, name in enumerate(TABLES):
        schema = read_schema(parts[0][number])
        waiting, done = schema.empty_table(), 0
        with ParquetWriter(out / name, schema) as writer:
            for tables in parts:
                with ParquetFile(tables[number]) as table:
                    for group in range(table.num_row_groups):
                        waiting = concat_tables([waiting, table.read_row_group(group)])
                        rows = _identity(waiting)
                        while done < len(edges) and len(rows) and rows[-1] >= edges[done]:
                            n = int(np.searchsorted(rows, edges[done]))
                            writer.write_table(waiting.slice(0, n).combine_chunks())
                            waiting, rows, done = waiting.slice(n), rows[n:], done + 1
            for n in [waiting.num_rows, *[0] * (len(edges) - done)]:  # features that never fired have no context
                writer.write_table(waiting.slice(0, n).combine_chunks())


def _identity(table: Any) -> NDArray[np.int64]:
    """One number of each row's feature, rising as features come. [n_rows]"""
    layer, feature = (table.column(name).to_numpy().astype(np.int64) for name in ("layer", "feature"))
    return layer << 32 | feature


def same(target: Path, request: Record) -> bool:
    """Whether what is there is what is asked for."""
    known: Any = feature_files.about(target)
    return known is not None and known.get("request") == json.loads(json.dumps(request))
