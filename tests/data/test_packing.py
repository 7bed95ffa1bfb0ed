"""Packing that goes on after an interruption gives the same bytes, and reads what it has read no second time."""

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import files
from pipeline.data import hub, mixture, sources, tokens, unfinished
from pipeline.data.options import Content, DatasetOptions, MemberOptions, SplitBy
from pipeline.data.tokens import Split
from tests.data.corpus import BOS, Characters, FakeHub, options, packed, records, to_jsonl, to_parquet, to_text, words

KINDS = ["text", "jsonl", "parquet", "hub", "hub of json", "world", "mixture", "split", "tokens"]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and groups of unequal size, a save after every document; no power is lost here, so nothing is synced."""
    monkeypatch.setattr(files, "sync", lambda paths: None)
    monkeypatch.setattr(unfinished, "sync", lambda paths: None)
    monkeypatch.setattr(sources, "BATCH_RECORDS", 37)
    monkeypatch.setattr(mixture, "BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(hub, "_commits", {})
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    if kind in {"hub", "hub of json"}:
        ending = "parquet" if kind == "hub" else "jsonl"
        FakeHub([tmp_path / f"{i}.{ending}" for i in range(3)], monkeypatch, ending.replace("jsonl", "json"))


def corpus(folder: Path, kind: str) -> DatasetOptions:
    """300 documents in three files, with empty ones between."""
    rows = records(part for text in words(300) for part in ([text, " "] if len(text) == 2 else [text]))
    parts = [rows[:100], rows[100:113], rows[113:]]
    if kind == "world":
        return options(None, "world", n_tokens="700", context=64, held_out=1, seed=3)
    for i, part in enumerate(parts):
        texts = [row["text"] for row in part]
        to_text(folder / f"{i}.txt", texts)
        to_jsonl(folder / f"{i}.jsonl", part)
        to_parquet(folder / f"{i}.parquet", part)
        to_jsonl(folder / f"{i}.ids", [{"input_ids": [ord(c) for c in text.strip()]} for text in texts])
        to_jsonl(folder / f"{i}.lines", [{"text": "\n".join(texts[k : k + 9])} for k in range(0, len(texts), 9)])
    if kind == "mixture":
        members = {
            "a": MemberOptions(kind=options("x", "jsonl").kind, path=str(folder / "[01].jsonl"), weight=1),
            "b": MemberOptions(kind=options("x", "parquet").kind, path=str(folder / "2.parquet"), weight=2.5),
        }
        return options(None, "mixture", sources=members, held_out=1)
    if kind == "split":
        return options(folder / "*.lines", split_by=SplitBy.line)
    if kind == "tokens":
        return options(folder / "*.ids", content=Content.tokens)
    return options("a/b", "hub") if kind.startswith("hub") else options(folder, kind)


class Stop(Exception):
    """Stands for the end of the process."""


def stop_at(n: int, what: Callable[..., Any], after: bool) -> Callable[..., Any]:
    """`what`, but its n-th call raises: before it does anything, or afterwards."""
    calls = 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and not after:
            raise Stop
        result = what(*args, **kwargs)
        if calls == n:
            raise Stop
        return result

    return stopping


@pytest.mark.parametrize("kind", KINDS)
def test_an_interruption_at_any_save_changes_no_byte(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = corpus(tmp_path, kind)
    expected = packed(asked)
    work = tmp_path / "work"
    write = unfinished.write_aside
    n_stops = 0
    for step in (1, 2, 5, 11, 38, 70):
        # Before the state is written: the tokens of this save are there and the state is the old one. After: both are.
        for after in (False, True):
            monkeypatch.setattr(unfinished, "write_aside", stop_at(step, write, after))
            try:
                packed(asked, workspace=work)
            except Stop:
                n_stops += 1
    monkeypatch.setattr(unfinished, "write_aside", write)
    assert n_stops > 4
    assert packed(asked, workspace=work) == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "mixture"])
def test_an_interruption_while_reading_or_tokenising_changes_no_byte(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = corpus(tmp_path, kind)
    expected = packed(asked)
    call = Characters.__call__
    for n in (2, 3, 3, 4):
        monkeypatch.setattr(Characters, "__call__", stop_at(n, call, after=n % 2 == 0))
        with pytest.raises(Stop):
            packed(asked, workspace=tmp_path / "work")
    monkeypatch.setattr(Characters, "__call__", call)
    assert packed(asked, workspace=tmp_path / "work") == expected


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files in `folder` that are opened to read, as they are."""
    names: list[str] = []
    real = builtins.open

    def spy(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, str | Path) and Path(file).parent == folder:
            names.append(Path(file).name)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    return names


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_files_that_were_read_are_not_opened_again_and_no_text_is_tokenised_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = corpus(tmp_path, kind)
    expected = packed(asked)
    write = unfinished.write_aside
    monkeypatch.setattr(unfinished, "write_aside", stop_at(250, write, after=True))
    tokenizer: Any = Characters()
    with pytest.raises(Stop):
        tokens.pack(asked, tokenizer, BOS, tmp_path / "work")
    first = list(tokenizer.seen)
    monkeypatch.setattr(unfinished, "write_aside", write)
    tokenizer.seen.clear()
    names = opened(tmp_path, monkeypatch)
    assert tokens.fingerprint(tokens.pack(asked, tokenizer, BOS, tmp_path / "work")) == expected
    ending = "txt" if kind == "text" else kind
    assert set(names) <= {f"1.{ending}", f"2.{ending}"}  # where it stood, and the library looks at the one before
    assert names.count(f"2.{ending}") == 1
    assert len(set(first) & set(tokenizer.seen)) < 37  # one batch of the reader, at most


def test_a_finished_packing_is_kept_and_needs_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = corpus(tmp_path, "jsonl")
    expected = packed(asked, workspace=tmp_path / "work")
    monkeypatch.setattr(sources, "reader_of", None)
    monkeypatch.setattr(mixture, "reader_of", None)
    assert packed(asked, workspace=tmp_path / "work") == expected


def test_a_text_that_is_too_short_says_the_same_the_second_time(tmp_path: Path) -> None:
    asked = replace(corpus(tmp_path, "mixture"), n_tokens="10k")
    lines = []
    for _ in range(2):
        with pytest.raises(Exception, match="ends after") as error:
            packed(asked, workspace=tmp_path / "work")
        lines.append(str(error.value))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("change", ["n_tokens", "context", "bos", "tokenizer", "file"])
def test_another_request_in_the_same_place_starts_anew(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(Characters):
        """Tokenizes differently."""

        chat_template = "other"

    asked, bos, tokenizer = corpus(tmp_path, "jsonl"), BOS, Characters()
    packed(asked, workspace=tmp_path / "work")
    if change in {"n_tokens", "context"}:
        asked = replace(asked, **{"n_tokens": "50"} if change == "n_tokens" else {"context": 9})
    elif change == "tokenizer":
        tokenizer = Other()
    elif change == "file":
        (tmp_path / "1.jsonl").write_text('{"text": "new"}\n')
    a: Any = tokenizer
    first = None if change == "bos" else bos
    with caplog.at_level("INFO", "pipeline"):
        found = tokens.pack(asked, a, first, tmp_path / "work")
    assert "starting anew" in caplog.text
    assert tokens.fingerprint(found) == tokens.fingerprint(tokens.pack(asked, a, first))


def test_without_a_workspace_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = corpus(tmp_path, "jsonl")
    before = set(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    packed(asked)
    assert set(tmp_path.rglob("*")) == before


def test_the_end_of_packing_says_what_was_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = corpus(tmp_path, "jsonl")
    with caplog.at_level("INFO", "pipeline"):
        found = tokens.pack(asked, Characters(), BOS)  # type: ignore[arg-type]
    n_empty = sum(len(text) == 2 for text in words(300))
    assert f"mine: {300 + n_empty} documents read, 0 left out by the filter, {n_empty} empty" in caplog.messages
    assert any(message.startswith("tokens: train ") for message in caplog.messages)
    assert found[Split.train].n_rows > 500


def kept(work: Path) -> Iterator[dict[str, Any]]:
    """States of a running packing, as they appear."""
    while True:
        if (work / "state.json").exists():
            yield json.loads((work / "state.json").read_bytes())
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    asked = corpus(tmp_path, "parquet")
    expected = packed(asked)
    code = (
        "import time; from pathlib import Path; from pipeline.data import unfinished; from tests.data.corpus import *\n"
        "unfinished.SAVE_SECONDS = 0.0\n"
        f"packed(options({str(tmp_path)!r}, 'parquet'), workspace=Path({str(tmp_path / 'work')!r}))"
    )
    for n_tokens in (1, 300, 600):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"})
        next(state for state in kept(tmp_path / "work") if sum(state["lengths"].values()) >= n_tokens)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert packed(asked, workspace=tmp_path / "work") == expected


def test_a_data_set_that_changes_meanwhile_is_read_at_its_first_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(tmp_path, "parquet")
    fake = FakeHub([tmp_path / "0.parquet", tmp_path / "2.parquet"], monkeypatch)
    asked, write = options("a/b", "hub"), unfinished.write_aside
    monkeypatch.setattr(unfinished, "write_aside", stop_at(50, write, after=True))
    with pytest.raises(Stop):
        packed(asked, workspace=tmp_path / "work")
    monkeypatch.setattr(unfinished, "write_aside", write)
    monkeypatch.setattr(fake, "dataset_info", None)  # main has moved, or nobody answers
    for _ in ("goes on", "is there"):
        monkeypatch.setattr(hub, "_commits", {})  # another process
        packed(asked, workspace=tmp_path / "work")
        assert tokens.resolved(asked) == {"revision": "commit of None"}
    assert [loaded[-1] for loaded in fake.loaded] == ["commit of None"] * 2
