"""dataset.skip_tokens: what follows on a data set of so many training rows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import tokens, unfinished
from pipeline.data.options import DatasetKind, DatasetOptions, MemberOptions
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data.corpus import BOS, options, records, refused, to_jsonl, to_text, tokenizer, words

T = 7


def text(folder: Path) -> DatasetOptions:
    return options(to_text(folder / "words.txt", words(600)), "text")


def mixture(folder: Path) -> DatasetOptions:
    of_text = MemberOptions(kind=DatasetKind.text, path=str(to_text(folder / "a.txt", words(400))), weight=2)
    of_lines = MemberOptions(kind=DatasetKind.jsonl, path=str(to_jsonl(folder / "b", records(words(400, 0x7000)))))
    return options(None, "mixture", sources={"a": of_text, "b": of_lines})


@pytest.fixture(params=[text, mixture])
def asked(request: pytest.FixtureRequest, tmp_path: Path) -> DatasetOptions:
    make: Callable[[Path], DatasetOptions] = request.param
    return make(tmp_path)


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("n", [6, 60, 65, 300])
def test_what_follows_are_the_contexts_behind_those_of_the_first_part(
    asked: DatasetOptions, n: int, bos: int | None
) -> None:
    whole = tokens.pack(asked, tokenizer(), bos)
    first = tokens.pack(replace(asked, n_tokens=str(n)), tokenizer(), bos)
    rest = tokens.pack(replace(asked, skip_tokens=str(n)), tokenizer(), bos)
    n_contexts = len(first[Split.train].contexts)
    assert n_contexts == -(-n // (T - 1))
    assert np.array_equal(rest[Split.train].contexts, whole[Split.train].contexts[n_contexts:])
    assert rest[Split.train].n_rows == whole[Split.train].n_rows - n_contexts * (T - 1)
    some = tokens.pack(replace(asked, skip_tokens=str(n), n_tokens="50"), tokenizer(), bos)[Split.train]
    assert some.n_rows == 50
    assert np.array_equal(some.contexts[:8], whole[Split.train].contexts[n_contexts : n_contexts + 8])


def test_held_out_contexts_are_the_same_with_and_without(asked: DatasetOptions) -> None:
    whole, rest = (tokens.pack(replace(asked, skip_tokens=n, held_out=None), tokenizer(), BOS) for n in ("0", "200"))
    for split in (Split.calibration, Split.evaluation):
        assert np.array_equal(whole[split].contexts, rest[split].contexts)


class Stop(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 20, pytest.param(150, marks=pytest.mark.slow), 500]
)
def test_an_interruption_changes_nothing(
    asked: DatasetOptions, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(asked, skip_tokens="450")
    expected = tokens.fingerprint(tokens.pack(asked, tokenizer(), BOS))
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(unfinished, "sync", lambda paths: None)
    write, calls = unfinished.write_aside, 0

    def stopping(file: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        file.write_bytes(data)
        if calls == step:
            raise Stop

    monkeypatch.setattr(unfinished, "write_aside", stopping)
    with pytest.raises(Stop):
        tokens.pack(asked, tokenizer(), BOS, tmp_path / "work")
    monkeypatch.setattr(unfinished, "write_aside", write)
    assert tokens.fingerprint(tokens.pack(asked, tokenizer(), BOS, tmp_path / "work")) == expected


def test_a_text_that_ends_while_it_is_skipped_is_refused(tmp_path: Path) -> None:
    asked = text(tmp_path)
    refused(
        replace(asked, skip_tokens="10k"), r"after 0 training rows behind what is skipped.*smaller dataset.skip_tok"
    )
    refused(replace(asked, skip_tokens="1000", n_tokens="5k"), r"asked for .* dataset.skip_tokens=1000; use .*=all")
    refused(replace(asked, skip_tokens="some"), "'some' is not a count")


def test_where_there_is_nothing_to_skip_it_is_refused(tmp_path: Path) -> None:
    asked = replace(text(tmp_path), skip_tokens="100")
    with pytest.raises(UserError, match="of which an evaluation takes none; drop it"):
        tokens.pack_other(asked, tokenizer(), BOS, None)
    with pytest.raises(UserError, match="none before a tokenizer; drop it"):
        tokens.texts(asked)
