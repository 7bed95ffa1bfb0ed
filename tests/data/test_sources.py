"""The same documents give the same rows whatever the container; what cannot be read is one line."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import hub, tokens
from pipeline.data.options import Content, FilterOptions, SplitBy
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data.corpus import (
    BOS,
    EOS,
    FakeHub,
    options,
    packed,
    records,
    refused,
    stream,
    to_jsonl,
    to_parquet,
    to_text,
    tokenizer,
    words,
)

ODD = [
    "2020-01-01",
    "2021-12-31T00:00:00",
    " padded ",
    "a\r\nb",
    "\u2028 line",
    '"quoted"',
    "\\n",
    "1",
    "null",
    "é\x00",
]
"""Texts that readers of tables are known to take for something else."""


@pytest.fixture(autouse=True)
def _no_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_commits", {})


def test_text_jsonl_parquet_and_the_hub_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = words(600)
    rows = records(texts)
    expected = packed(options(to_text(tmp_path / "a.txt", texts), "text"))
    (tmp_path / "j").mkdir()
    (tmp_path / "p").mkdir()
    for part, start in enumerate(range(0, 600, 250)):
        to_jsonl(tmp_path / "j" / f"{part}.jsonl", rows[start : start + 250])
        to_parquet(tmp_path / "p" / f"{part}.parquet", rows[start : start + 250])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(to_jsonl(tmp_path / "b.jsonl", rows).read_bytes()))
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    fake = FakeHub(to_parquet(tmp_path / "whole.parquet", rows), monkeypatch)
    for asked in (
        options(tmp_path / "j"),
        options(tmp_path / "a.jsonl.gz"),
        options(tmp_path / "list.json"),
        options(tmp_path / "p", "parquet"),
        options("some/name", "hub", subset="en", split="valid"),
    ):
        assert packed(asked) == expected, asked
    assert fake.loaded == [("some/name", "en", "valid", "commit of None")]


def test_text_of_records_is_kept_exactly(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ODD * 3]
    for asked in (
        options(to_jsonl(tmp_path / "a.jsonl", rows)),
        options(to_parquet(tmp_path / "a.p", rows), "parquet"),
    ):
        assert list(tokens.documents(asked)) == ODD * 3


def test_the_text_of_a_record_may_be_split_further(tmp_path: Path) -> None:
    asked = options(to_jsonl(tmp_path / "a.jsonl", [{"text": "one\r\ntwo\n\n\nthree\n"}, {"text": "four"}]))
    assert list(tokens.documents(asked)) == ["one\r\ntwo\n\n\nthree\n", "four"]
    by_paragraph = replace(asked, split_by=SplitBy.paragraph)
    assert list(tokens.documents(by_paragraph)) == ["one\ntwo", "three", "four"]
    assert list(tokens.documents(replace(asked, split_by=SplitBy.line))) == ["one", "two", "three", "four"]


def test_null_text_is_skipped_as_empty_text_is(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}, {"text": None}, {"text": " \n"}, {"text": "b"}]
    for asked in (
        options(to_jsonl(tmp_path / "a.jsonl", rows)),
        options(to_parquet(tmp_path / "a.p", rows), "parquet"),
    ):
        assert list(tokens.documents(asked)) == ["a", "b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_filter_sees_length_patterns_and_other_columns(tmp_path: Path, kind: str) -> None:
    texts = ["short", "a long text", "a longer text", "drop this text", "a text in French"]
    rows = [{"text": t, "lang": "fr" if "French" in t else "en", "n": i} for i, t in enumerate(texts)]
    path = (to_jsonl if kind == "jsonl" else to_parquet)(tmp_path / "a", rows)

    def kept(**rules: Any) -> list[str]:
        return list(tokens.documents(options(path, kind, filter=FilterOptions(**rules))))

    assert kept(min_characters=11) == texts[1:]
    assert kept(max_characters=11) == texts[:2]
    assert kept(keep="^a .*text$") == texts[1:3]
    assert kept(drop="drop|French") == texts[:3]
    assert kept(where={"lang": "en", "n": 3}) == texts[3:4]
    assert kept(where={"n": "3"}) == []


def test_the_filter_moves_no_document_to_another_split(tmp_path: Path) -> None:
    path = to_jsonl(tmp_path / "a.jsonl", records(words(600)))
    some = stream(options(path, filter=FilterOptions(drop="xxx")), Split.evaluation)
    assert set(some) & set(stream(options(path), Split.evaluation)) > {EOS, ord("x")}
    assert set(some) & set(stream(options(path), Split.train)) == {EOS, ord("x")}


# What cannot be read


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"text": "caf\xe9"}', r"b\.jsonl is not UTF-8 \(byte 31\); convert it"),
        (b'{"text": "x"', r"b\.jsonl line 3: not JSON; "),
        (b'["x"]', r"b\.jsonl line 3: not a record"),
        (b'{"txt": "x", "id": 3}', r"b\.jsonl line 3: no column 'text', only txt, id; name one by dataset\.column="),
        (b'{"text": "\\ud800x"}', r"b\.jsonl line 3: half of a surrogate pair"),
        (b'{"text": 5}', r"record 4 of .*: column 'text' holds int, not text; "),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    to_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, {"text": "good too"}])
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    refused(options(tmp_path), match)


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    to_parquet(tmp_path / "a.parquet", records(words(9)))
    refused(options(tmp_path, "parquet", column="txt"), r"a\.parquet: no column 'txt', only text, n, lang; name one by")
    refused(options(tmp_path, "parquet", filter=FilterOptions(where={"tag": 1})), "no column 'tag', only text, n, lang")
    refused(options(tmp_path, "parquet", column="n"), r"record 1 of .*: column 'n' holds int, not text; ")
    (tmp_path / "b.parquet").write_text("hello")
    refused(options(tmp_path, "parquet"), r"b\.parquet is no parquet file \(.*\); check it, or fetch it again")


def test_a_parquet_file_that_is_cut_short_or_of_another_type_is_one_line(tmp_path: Path) -> None:
    to_parquet(tmp_path / "a.parquet", records(words(900)))
    to_parquet(tmp_path / "b.parquet", [{"text": {"a": 1}}])
    refused(options(tmp_path, "parquet"), r"; all files need the same types")
    (tmp_path / "b.parquet").unlink()
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:200] + bytes(400) + whole[600:])
    refused(options(tmp_path, "parquet"), r"dataset\.path=.*; ")


def test_a_table_whose_text_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    latin = pa.array([b"caf\xe9", b"tea"], pa.binary())
    pq.write_table(pa.table({"text": latin.view(pa.string())}), tmp_path / "a.parquet")
    refused(options(tmp_path, "parquet"), r"dataset\.path=.*: its text is not UTF-8; use another copy or revision$")


def test_a_damaged_compressed_file_is_one_line(tmp_path: Path) -> None:
    whole = gzip.compress(to_jsonl(tmp_path / "b.jsonl", records(words(900))).read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-2000])
    refused(options(tmp_path / "a.jsonl.gz"), "a compressed file is damaged")


@pytest.mark.parametrize(
    ("texts", "rules", "match"),
    [
        (["", " ", "\n"], {}, r"3 documents, all empty; "),
        (["a", "b"], {"min_characters": 5}, r"2 documents, all left out by dataset\.filter; loosen"),
        (["a", ""], {"min_characters": 5}, r"2 documents, 1 left out by dataset\.filter, 1 empty; loosen"),
        (["long " * 5000], {}, r"dataset\.split_by=paragraph or line|split_by=line.*whole documents.* is 1"),
    ],
)
def test_a_corpus_that_gives_nothing_says_why(tmp_path: Path, texts: list[str], rules: Any, match: str) -> None:
    path = to_jsonl(tmp_path / "a.jsonl", records(texts))
    refused(options(path, filter=FilterOptions(**rules)), match)


# Options


@pytest.mark.parametrize(
    ("kind", "wrong", "match"),
    [
        (
            "text",
            {"column": "x"},
            r"dataset\.column does not apply to dataset=mine; drop it or use another kind: hub, ",
        ),
        ("text", {"content": Content.chat}, r"dataset\.content does not apply"),
        ("text", {"filter": FilterOptions(where={"a": 1})}, r"filter\.where needs records"),
        ("jsonl", {"subset": "x"}, r"dataset\.subset does not apply .* use another kind: hub"),
        ("jsonl", {"path": None}, r"dataset=mine needs dataset\.path=FILE"),
        ("hub", {"path": None}, r"needs dataset\.path=NAME"),
        ("jsonl", {"content": Content.chat, "split_by": SplitBy.line}, r"split_by splits texts, not content=chat"),
        ("jsonl", {"content": Content.tokens, "filter": FilterOptions(keep="a")}, r"filter\.keep reads text"),
        ("jsonl", {"filter": FilterOptions(drop="(")}, r"filter\.drop is no regular expression \(.*\); mend it"),
        ("jsonl", {"filter": FilterOptions(min_characters=3, max_characters=2)}, r"min_characters=3 is above"),
        ("jsonl", {"filter": FilterOptions(where={"a": [1]})}, r"filter\.where: a: \[1\] is not understood"),
        ("mixture", {"path": None}, r"dataset=mine needs members; name some"),
    ],
)
def test_options_that_do_not_apply_are_one_line(kind: str, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        tokens.check(replace(options("x" if kind != "mixture" else None, kind), **wrong))


# Training a tokenizer, sizes


def test_texts_are_those_of_the_training_documents_after_the_filter(tmp_path: Path) -> None:
    path = to_jsonl(tmp_path / "a.jsonl", records(words(300)))
    asked = options(path, filter=FilterOptions(drop="xxxx"))
    train = [text for text in words(300) if tokens.split_of(text) is Split.train and "xxxx" not in text]
    assert list(tokens.texts(asked)) == train
    few = list(tokens.texts(replace(asked, n_tokens="5")))
    assert few == train[: len(few)]
    assert 40 <= sum(map(len, few)) < 46  # eight characters a token, and the rest of the last document
    with pytest.raises(UserError, match="content=tokens holds no text"):
        tokens.texts(replace(asked, content=Content.tokens, filter=FilterOptions()))


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("n_tokens", ["12", "13", "600"])
def test_sizes_are_those_that_packing_gives(tmp_path: Path, n_tokens: str, bos: int | None) -> None:
    asked = options(to_jsonl(tmp_path / "a.jsonl", records(words(600))), n_tokens=n_tokens)
    found = tokens.pack(asked, tokenizer(), bos)
    assert tokens.sizes(asked, bos) == {split: (len(p.contexts), p.n_rows) for split, p in found.items()}
    assert tokens.sizes(replace(asked, n_tokens="all"), bos) is None
