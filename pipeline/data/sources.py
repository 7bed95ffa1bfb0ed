"""Records of one source in a fixed order, from any point on.

Files and hub data sets are read through the streaming builders of the `datasets` library, whose `state_dict` tells
where a reader stands. Lines of JSON are read as lines of text and parsed here: the library's own reader takes a text
such as 2020-01-01 for a date.
"""

import glob
import json
import logging
import lzma
import zlib
from collections.abc import Iterator
from gzip import BadGzipFile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data import hub
from pipeline.data.documents import Source, column_of
from pipeline.data.options import DatasetKind, SplitBy
from pipeline.data.text import COMPRESSED, files_of, find_line, not_utf8
from pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

Json = dict[str, Any]
Record = dict[str, Any]

BATCH_RECORDS = 1000
"""Records read at a time; no effect on the result. Memory: that many documents."""
DAMAGED = (EOFError, BadGzipFile, zlib.error, lzma.LZMAError)


class Batch(NamedTuple):
    records: list[Record]
    n_units: int
    """How much further the reader came, in its `unit`."""


class Reader:
    """Iterate over `batches()`; `state()` is where the next batch begins. Made with such a state it goes on there."""

    unit = "doc"
    total: int | None = None
    """Units in all, where that is known."""

    def batches(self) -> Iterator[Batch]:
        raise NotImplementedError

    def state(self) -> Json:
        """Plain values, for a file."""
        raise NotImplementedError


def reader_of(source: Source, label: str, seed: int, state: Json | None = None) -> Reader:
    """Raises UserError at once for files that are not there and for what the hub does not give."""
    if source.kind is DatasetKind.world:
        return _World(seed, state)
    assert source.path is not None  # by check
    if source.kind is DatasetKind.hub:
        return _Hub(source, label, state)
    files = files_of(source.path, source.kind, f"{label}.path")
    kinds: dict[DatasetKind, type[_Files]] = {
        DatasetKind.text: _Text,
        DatasetKind.jsonl: _Jsonl,
        DatasetKind.parquet: _Parquet,
    }
    return kinds[source.kind](source, label, files, state)


class _World(Reader):
    """Generated documents. They never end."""

    def __init__(self, seed: int, state: Json | None) -> None:
        self.seed = seed
        self.n = state["n"] if state else 0

    def batches(self) -> Iterator[Batch]:
        from pipeline.data import world

        documents = islice(world.documents(self.seed), self.n, None)
        while True:
            batch = [{"text": document.text} for document in islice(documents, BATCH_RECORDS)]
            self.n += len(batch)
            yield Batch(batch, len(batch))

    def state(self) -> Json:
        return {"n": self.n}


class _Streamed(Reader):
    """A streaming data set of the library."""

    def __init__(self, source: Source, label: str, state: Json | None) -> None:
        self.source, self.label = source, label
        self.column = column_of(source)
        self.columns = list(dict.fromkeys([self.column, *source.filter.where]))
        self.dataset = self.load().with_format("arrow")
        if state is not None:
            self.dataset.load_state_dict(state)

    def load(self) -> "IterableDataset":
        raise NotImplementedError

    def state(self) -> Json:
        # As JSON: the library goes on changing the dictionaries that it hands out.
        copy: Json = json.loads(json.dumps(self.dataset.state_dict()))
        return copy

    def batches(self) -> Iterator[Batch]:
        try:
            for table in self.dataset.iter(batch_size=BATCH_RECORDS):
                yield self.read(table)
        except UnicodeDecodeError as error:
            raise UserError(self.not_utf8()) from error
        except DAMAGED as error:
            what = f"{self.label}.path={self.source.path}: a compressed file is damaged ({error})"
            raise UserError(f"{what}; fetch it again, or compress it again") from error

    def read(self, table: Any) -> Batch:
        """Of an Arrow table of the builder."""
        if missing := [name for name in self.columns if name not in table.column_names]:
            raise UserError(_no_column(self.label, str(self.source.path), missing[0], table.column_names))
        columns = [table.column(name).to_pylist() for name in self.columns]
        records = [dict(zip(self.columns, values, strict=True)) for values in zip(*columns, strict=True)]
        return Batch(records, len(records))

    def not_utf8(self) -> str:
        return f"{self.label}.path={self.source.path}: its text is not UTF-8; use another copy or revision"


class _Hub(_Streamed):
    def load(self) -> "IterableDataset":
        return hub.load(self.source, self.label, self.columns)

    def batches(self) -> Iterator[Batch]:
        try:
            yield from super().batches()
        except hub.errors() as error:
            raise UserError(hub.refusal(self.source, self.label, error, is_reading=True)) from error


class _Files(_Streamed):
    builder = "text"

    def __init__(self, source: Source, label: str, files: list[Path], state: Json | None) -> None:
        self.files = files
        super().__init__(source, label, state)

    def load(self) -> "IterableDataset":
        from datasets import load_dataset

        # Escaped: the library reads every name as a pattern, and a pattern that matches nothing is no error there.
        names = [glob.escape(str(file.resolve())) for file in self.files]
        dataset = load_dataset(self.builder, data_files=names, split="train", streaming=True, **self.settings())
        assert dataset.num_shards == len(names), f"{len(names)} files, the library sees {dataset.num_shards}"
        return dataset

    def settings(self) -> Json:
        return {}

    def not_utf8(self) -> str:
        return not_utf8(self.files) if self.builder == "text" else super().not_utf8()


class _Text(_Files):
    """Documents of text files, without the blank lines around them: lines, paragraphs (separated by empty lines) or
    whole files. Memory: one file for `document`, else some 10 MB."""

    unit = "B"

    def __init__(self, source: Source, label: str, files: list[Path], state: Json | None) -> None:
        super().__init__(source, label, files, state)
        self.total = _n_bytes(files)

    def settings(self) -> Json:
        return {"sample_by": (self.source.split_by or SplitBy.paragraph).value}

    def read(self, table: Any) -> Batch:
        texts = table.column("text").to_pylist()
        return Batch([{"text": text.strip("\n")} for text in texts], sum(map(len, texts)))


class _Jsonl(_Files):
    """A record a line; or, where the first file begins with a bracket, a list of records in each file."""

    unit = "B"

    def __init__(self, source: Source, label: str, files: list[Path], state: Json | None) -> None:
        self.whole = _begins_with_bracket(files[0])
        super().__init__(source, label, files, state)
        self.total = _n_bytes(files)

    def settings(self) -> Json:
        return {"sample_by": "document" if self.whole else "line"}

    def read(self, table: Any) -> Batch:
        texts = table.column("text").to_pylist()
        parsed = [self._parse(text) for text in texts if text.strip()]
        records = [record for part in parsed for record in part] if self.whole else parsed
        for record in records:
            if not isinstance(record, dict):
                raise UserError(f"{self._find(_is_no_object)}: not a record ({{...}}); give one JSON object a line")
            if missing := [name for name in (self.column,) if name not in record]:
                place = self._find(lambda line: missing[0] not in json.loads(line))
                raise UserError(_no_column(self.label, place, missing[0], list(record)))
        return Batch(records, sum(map(len, texts)))

    def _parse(self, text: str) -> Any:
        try:
            value = json.loads(text.removeprefix("\ufeff"))
            json.dumps(value, ensure_ascii=False).encode() if "\\ud" in text.lower() else None
        except UnicodeEncodeError as error:  # \ud800 alone: half a character, which no text can hold
            fix = "write the character itself, or both of its halves"
            raise UserError(f"{self._find(_is_half)}: half of a surrogate pair in the JSON; {fix}") from error
        except ValueError as error:
            raise UserError(f"{self._find(_is_no_json)}: not JSON; give one JSON object a line") from error
        return value

    def _find(self, is_wrong: Any) -> str:
        return (
            find_line(self.files, lambda line: bool(line.strip()) and is_wrong(line))
            if not self.whole
            else str(self.files[0] if len(self.files) == 1 else f"a file of {self.source.path}")
        )


class _Parquet(_Files):
    unit = "rec"
    builder = "parquet"

    def load(self) -> "IterableDataset":
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.parquet as pq  # type: ignore[import-untyped]

        # The library logs the errors that it raises, and a mistake is to be one line.
        logging.getLogger("datasets.packaged_modules.parquet.parquet").setLevel(logging.CRITICAL)
        self.total = 0
        for file in self.files:
            try:
                about = pq.ParquetFile(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{file} is no parquet file ({error}); check it, or fetch it again") from error
            with about:
                names = about.schema_arrow.names
                if missing := [name for name in self.columns if name not in names]:
                    raise UserError(_no_column(self.label, str(file), missing[0], names))
                self.total += about.metadata.num_rows
        return super().load()

    def settings(self) -> Json:
        return {"columns": self.columns}

    def batches(self) -> Iterator[Batch]:
        import pyarrow as pa

        try:
            yield from super().batches()
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:  # other types, damaged pages
            reason = " ".join(str(error).split())[:300]
            fix = "all files need the same types; check them, or fetch them again"
            raise UserError(f"{self.label}.path={self.source.path}: {reason}; {fix}") from error


def _no_column(label: str, place: str, missing: str, names: list[str]) -> str:
    return f"{place}: no column '{missing}', only {', '.join(names)}; name one by {label}.column="


def _is_no_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _is_no_object(line: str) -> bool:
    return not isinstance(json.loads(line), dict)


def _is_half(line: str) -> bool:
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _begins_with_bracket(file: Path) -> bool:
    if file.suffix in COMPRESSED:
        return False
    with file.open("rb") as stream:
        return stream.read(64).lstrip()[:1] == b"["


def _n_bytes(files: list[Path]) -> int | None:
    """None where a compressed file hides its size."""
    return None if any(file.suffix in COMPRESSED for file in files) else sum(file.stat().st_size for file in files)
