"""The directory of features as it is made, so that a stopped run goes on and a reader sees a whole one or none.

.NAME.making/request.json    what is being made; another request begins anew
             group-N.notes   where the passes over group N of the features stand (`features.Notes`)
             group-N.done    features of group N are written: their files in out/, their rows in group-N.*.parquet
             out/            what takes the name in the end
"""

import json
import logging
import os
import shutil
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.files import sync, take_lock, write_aside
from pipeline.interp.dashboards import feature_files
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.dashboards.feature_records import context_rows, feature_row, schemas
from pipeline.interp.dashboards.features import Notes

logger = logging.getLogger(__name__)

TABLES = ("features.parquet", "contexts.parquet")
RECORDS_AT_ONCE = 256
"""In memory, and in a row group of features.parquet."""


class Making:
    """Context: the directory `target` while it is made, which no other process makes meanwhile (UserError)."""

    def __init__(self, target: Path, request: Record) -> None:
        """request: all that the result depends on, as JSON."""
        self.target = target
        self._work = target.with_name(f".{target.name}.making")
        self._request = json.loads(json.dumps(request))

    def __enter__(self) -> Self:
        self._lock = take_lock(self._work, self.target)
        file = self._work / "request.json"
        if not file.exists() or json.loads(file.read_text()) != self._request:
            self._clear()
            write_aside(file, json.dumps(self._request).encode())
        (self._work / "out").mkdir(exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def notes(self, group: int) -> Notes:
        """Of a group's own name: those of the one before may still be there."""
        return Notes(self._notes(group))

    def _notes(self, group: int) -> Path:
        return self._work / f"group-{group}.notes"

    def has(self, group: int) -> bool:
        return (self._work / f"group-{group}.done").exists()

    def write(self, group: int, records: Iterable[Record]) -> None:
        """The features of a group."""
        from pyarrow import Table  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetWriter  # type: ignore[import-untyped]

        files: list[Path] = []
        tables = [self._work / f"group-{group}.{name}" for name in TABLES]
        of_features, of_contexts = schemas()
        with ParquetWriter(tables[0], of_features) as features, ParquetWriter(tables[1], of_contexts) as contexts:
            every = iter(records)
            while some := list(islice(every, RECORDS_AT_ONCE)):
                for record in some:
                    name = f"{feature_files.cantor(record['layer'], record['index'])}.json"
                    files.append(self._work / "out" / name)
                    files[-1].write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
                features.write_table(Table.from_pylist([feature_row(record) for record in some], of_features))
                rows = list(chain.from_iterable(map(context_rows, some)))
                contexts.write_table(Table.from_pylist(rows, of_contexts))
        sync([*files, *tables, self._work / "out"])
        write_aside(self._work / f"group-{group}.done", b"")
        self._notes(group).unlink(missing_ok=True)

    def finish(self, n_groups: int, about: Record, packed: tuple[int, int] | None) -> None:
        """Put everything in its place. packed: features of a layer and layers, where the files are to be packed."""
        out = self._work / "out"
        finished = self._work / "finished"
        if not finished.exists():
            for name in TABLES:
                _concatenate([self._work / f"group-{group}.{name}" for group in range(n_groups)], out / name)
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
        shutil.rmtree(self._work)

    def _clear(self) -> None:
        for path in self._work.iterdir():
            if path.name == "lock":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def forget(target: Path) -> None:
    """Remove what a process left that ended just after it had finished."""
    work = target.with_name(f".{target.name}.making")
    if work.exists():
        lock = take_lock(work, target)
        shutil.rmtree(work)
        os.close(lock)


def _concatenate(parts: list[Path], whole: Path) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(whole, parquet.read_schema(parts[0])) as out:
        for part in parts:
            with parquet.ParquetFile(part) as file:
                for group in range(file.num_row_groups):
                    out.write_table(file.read_row_group(group))


def same(target: Path, request: Record) -> bool:
    """Whether what is there is what is asked for."""
    known: Any = feature_files.about(target)
    return known is not None and known.get("request") == json.loads(json.dumps(request))
