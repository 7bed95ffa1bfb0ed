"""The same documents in every container, and a tokenizer of one token a character, for the tests of packing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import tokens
from pipeline.data.options import DatasetKind, DatasetOptions
from pipeline.data.tokens import Split
from pipeline.errors import UserError

BOS, EOS = 0, 1

Records = list[dict[str, Any]]


class Characters:
    """A tokenizer: one token a character. Its chat template puts a BOS first and an EOS after each message."""

    bos_token_id, eos_token_id = BOS, EOS
    chat_template = "{role}:{content}"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        self.seen += texts
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        assert not tokenize
        return chr(BOS) + "".join(f"{m['role'][0]}:{m['content']}{chr(EOS)}" for m in messages)


def tokenizer() -> Any:
    return Characters()


def words(n: int, start: int = 0x4E00) -> list[str]:
    """Documents of one to five characters, none twice."""
    return [f"{chr(start + i)}{'x' * (i * i % 5)}" for i in range(n)]


def records(texts: Iterable[str]) -> Records:
    return [{"text": text, "n": i, "lang": "en" if i % 3 else "fr"} for i, text in enumerate(texts)]


def to_text(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("\n\n".join(texts))
    return path


def to_jsonl(path: Path, rows: Records) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def to_parquet(path: Path, rows: Records, row_group_size: int = 50) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


class FakeHub:
    """Stands in for the hub: a data set of files of one kind, at a commit that a revision is resolved to."""

    def __init__(self, files: Path | list[Path], monkeypatch: pytest.MonkeyPatch, kind: str = "parquet") -> None:
        self.files, self.kind = [str(file) for file in (files if isinstance(files, list) else [files])], kind
        self.asked: list[tuple[str, str | None]] = []
        self.loaded: list[tuple[Any, ...]] = []
        import datasets
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        self.load_dataset = datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def dataset_info(self, path: str, revision: str | None) -> Any:
        self.asked.append((path, revision))
        return type("Info", (), {"sha": f"commit of {revision}"})

    def load(self, path: str, *args: Any, **settings: Any) -> Any:
        if path in {"parquet", "text"}:
            return self.load_dataset(path, *args, **settings)
        self.loaded.append((path, *args, settings["split"], settings["revision"]))
        return self.load_dataset(self.kind, data_files=self.files, split="train", streaming=True)


def options(path: Path | str | None, kind: str = "jsonl", **fields: Any) -> DatasetOptions:
    given = {"name": "mine", "n_tokens": "all", "context": 7, "held_out": 3, "path": path and str(path)}
    return DatasetOptions(kind=DatasetKind(kind), **(given | fields))


def packed(asked: DatasetOptions, **more: Any) -> str:
    return tokens.fingerprint(tokens.pack(asked, tokenizer(), BOS, **more))


def stream(asked: DatasetOptions, split: Split = Split.train) -> list[int]:
    """Tokens of a split in order, without the BOS of each context and the padding."""
    contexts, n_rows = tokens.pack(asked, tokenizer(), BOS)[split]
    found: list[int] = contexts[:, 1:].ravel()[:n_rows].tolist()
    return found


def refused(asked: DatasetOptions, match: str) -> None:
    """Packing ends with one line that names the cause and the fix."""
    with pytest.raises(UserError, match=match) as error:
        packed(asked)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)
