"""Packing against a slow packer, the split of documents, and what the user is told when something is wrong."""

import gzip
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import mixture, tokens
from pipeline.data.options import DatasetKind, DatasetOptions, SplitBy
from pipeline.data.text import hash_files
from pipeline.data.tokens import Split
from pipeline.errors import UserError

BOS, EOS = 0, 1


class Characters:
    """A tokenizer: one token a character."""

    eos_token_id = EOS

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


TOKENIZER: Any = Characters()


def write(path: Path, documents: Iterable[str]) -> DatasetOptions:
    path.write_text("\n\n".join(documents))
    return DatasetOptions(
        name="text", kind=DatasetKind.text, n_tokens="all", path=str(path), context=7, held_out=3, seed=0
    )


def words(n: int) -> list[str]:
    """Documents of one to five characters, none twice."""
    return [f"{chr(0x4E00 + i)}{'x' * (i * i % 5)}" for i in range(n)]


@pytest.fixture
def options(tmp_path: Path) -> DatasetOptions:
    return write(tmp_path / "words.txt", words(600))


def slow_rows(documents: list[str], context: int, bos: int | None) -> list[tuple[int, int, int]]:
    """(context, position, token) of every row, from the rules."""
    stream = [token for text in documents for token in [*map(ord, text), EOS]]
    head = [] if bos is None else [bos]
    width = context - len(head)
    contexts = [head + stream[i : i + width] for i in range(0, len(stream), width)]
    return [(c, p, contexts[c][p]) for c in range(len(contexts)) for p in range(1, len(contexts[c]))]


def rows(packed: tokens.Packed) -> list[tuple[int, int, int]]:
    """(context, position, token) of every row, from the layout that `Packed` promises."""
    width = packed.contexts.shape[1] - 1
    places = [(t // width, 1 + t % width) for t in range(packed.n_rows)]
    return [(c, p, int(packed.contexts[c, p])) for c, p in places]


@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize(
    ("context", "n_tokens"), [(7, "12"), (7, "13"), (7, "all"), (2, "40"), (40, "38"), (40, "all")]
)
def test_rows_equal_those_of_a_slow_packer(
    options: DatasetOptions, context: int, n_tokens: str, bos: int | None
) -> None:
    options = replace(options, context=context, n_tokens=n_tokens, held_out=1)
    packed = tokens.pack(options, TOKENIZER, bos)
    for split in Split:
        expected = slow_rows([text for text in words(600) if tokens.split_of(text) is split], context, bos)
        if split is not Split.train:
            assert packed[split].n_rows == context - 1
        elif n_tokens != "all":
            assert packed[split].n_rows == int(n_tokens)
        else:
            assert packed[split].n_rows == len(expected)
        assert rows(packed[split]) == expected[: packed[split].n_rows]


@pytest.mark.parametrize("bos", [BOS, None])
def test_position_0_is_the_bos_or_text_and_the_tail_is_padding(options: DatasetOptions, bos: int | None) -> None:
    contexts, n_rows = tokens.pack(replace(options, n_tokens="20"), TOKENIZER, bos)[Split.train]
    assert contexts.dtype == np.int32
    assert contexts.shape == (4, 7)
    assert n_rows == 20
    assert (contexts[-1, 3:] == EOS).all()
    if bos is None:
        stream = [
            token for text in words(600) if tokens.split_of(text) is Split.train for token in [*map(ord, text), 1]
        ]
        assert contexts[:3].ravel().tolist() == stream[:21]
    else:
        assert (contexts[:, 0] == BOS).all()


def test_no_document_is_in_two_splits_and_none_is_lost(options: DatasetOptions) -> None:
    packed = tokens.pack(options, TOKENIZER, BOS)
    seen = [set(packed[split].contexts.ravel()) - {BOS, EOS, ord("x")} for split in Split]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]
    assert len(seen[0]) == sum(tokens.split_of(text) is Split.train for text in words(600))


def test_split_is_a_function_of_the_text_alone() -> None:
    """Pinned: another hash would move documents from training to evaluation between versions."""
    assert all(tokens.split_of(f"document {i}") is tokens.split_of(f"\n document {i}\n ") for i in range(100))
    pinned = {"a": "train", "g": "calibration", "j": "evaluation"}
    assert {text: tokens.split_of(text).value for text in pinned} == pinned
    counts = dict.fromkeys(Split, 0)
    for i in range(20_000):
        counts[tokens.split_of(f"document {i}")] += 1
    assert abs(counts[Split.calibration] - 1000) < 120  # four standard deviations
    assert abs(counts[Split.evaluation] - 1000) < 120


def test_held_out_text_depends_on_neither_n_tokens_nor_order_nor_batching(
    options: DatasetOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, all_of_it = (tokens.pack(replace(options, n_tokens=n), TOKENIZER, BOS) for n in ("9", "all"))
    for split in (Split.calibration, Split.evaluation):
        assert (few[split].contexts == all_of_it[split].contexts).all()
    monkeypatch.setattr(mixture, "BATCH_DOCUMENTS", 3)
    assert tokens.fingerprint(tokens.pack(options, TOKENIZER, BOS)) == tokens.fingerprint(all_of_it)
    backwards = tokens.pack(write(tmp_path / "backwards.txt", words(600)[::-1]), TOKENIZER, BOS)
    train = set(all_of_it[Split.train].contexts.ravel())
    assert set(backwards[Split.train].contexts.ravel()) == train


def test_fingerprint_sees_every_token_and_the_number_of_rows(options: DatasetOptions) -> None:
    packed = tokens.pack(options, TOKENIZER, BOS)
    original = tokens.fingerprint(packed)
    contexts, n_rows = packed[Split.train]
    changed = contexts.copy()
    changed[3, 4] += 1
    assert tokens.fingerprint(packed | {Split.train: tokens.Packed(changed, n_rows)}) != original
    assert tokens.fingerprint(packed | {Split.train: tokens.Packed(contexts, n_rows - 1)}) != original
    assert tokens.fingerprint(tokens.pack(options, TOKENIZER, BOS)) == original


def test_empty_documents_and_documents_without_tokens_are_skipped(tmp_path: Path) -> None:
    class NoX(Characters):
        def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
            return super().__call__([text.replace("x", "") for text in texts], add_special_tokens, verbose)

    no_x: Any = NoX()
    plain = write(tmp_path / "plain.txt", words(600))
    gaps = write(tmp_path / "gaps.txt", [part for text in words(600) for part in (text, "", " \t", "xx")])
    assert tokens.fingerprint(tokens.pack(gaps, no_x, BOS)) == tokens.fingerprint(tokens.pack(plain, no_x, BOS))


def test_a_text_that_ends_first_is_refused_and_the_named_fix_works(options: DatasetOptions) -> None:
    with pytest.raises(UserError, match=r"training rows.*use dataset.n_tokens=all dataset.held_out=(\d+)$") as error:
        tokens.pack(replace(options, n_tokens="10k", held_out=1000), TOKENIZER, BOS)
    held_out = int(str(error.value).rsplit("=", 1)[1])
    fixed = tokens.pack(replace(options, n_tokens="all", held_out=held_out), TOKENIZER, BOS)
    assert len(fixed[Split.evaluation].contexts) == held_out
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"dataset.held_out={held_out}"):
        tokens.pack(replace(options, held_out=held_out + 1), TOKENIZER, BOS)


@pytest.mark.parametrize("bos", [BOS, None])
def test_without_a_number_a_short_text_holds_out_the_full_contexts_that_it_has(
    options: DatasetOptions, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never padding, never more than the most; training rows are the same as with a number."""
    options = replace(options, held_out=None)
    packed = tokens.pack(options, TOKENIZER, bos)
    counted = tokens.pack(replace(options, held_out=2), TOKENIZER, bos)
    assert rows(packed[Split.train]) == rows(counted[Split.train])
    for split in (Split.calibration, Split.evaluation):
        contexts, n_rows = packed[split]
        assert len(contexts) > 2
        assert n_rows == len(contexts) * (options.context - 1)
        assert (contexts[:2] == counted[split].contexts).all()
        with pytest.raises(UserError, match="held_out"):
            tokens.pack(replace(options, held_out=10_000), TOKENIZER, bos)
    monkeypatch.setattr(tokens, "MOST_HELD_OUT", 3)
    assert len(tokens.pack(options, TOKENIZER, bos)[Split.evaluation].contexts) == 3
    assert len(tokens.pack_other(options, TOKENIZER, bos, Split.evaluation).contexts) == 3


def test_without_a_number_a_text_too_short_for_one_context_is_refused(options: DatasetOptions) -> None:
    with pytest.raises(UserError, match=r"smaller dataset\.context"):
        tokens.pack(replace(options, held_out=None, context=5000), TOKENIZER, BOS)


def test_a_single_document_is_refused_with_the_advice_to_split_it(options: DatasetOptions) -> None:
    with pytest.raises(UserError, match=r"0 evaluation .*split_by=paragraph or line\).*whole documents.* is 1$"):
        tokens.pack(replace(options, split_by=SplitBy.document), TOKENIZER, BOS)


def test_other_text_gives_one_split_or_everything_without_training_rows(options: DatasetOptions) -> None:
    evaluation = tokens.pack_other(options, TOKENIZER, BOS, Split.evaluation)
    assert (evaluation.contexts == tokens.pack(options, TOKENIZER, BOS)[Split.evaluation].contexts).all()
    everything = tokens.pack_other(options, TOKENIZER, BOS, None)
    assert rows(everything) == slow_rows(words(600), 7, BOS)[: 3 * 6]
    with pytest.raises(UserError, match=r"holds (\d+) contexts .* use dataset.held_out=\1$"):
        tokens.pack_other(replace(options, held_out=10_000), TOKENIZER, BOS, None)


def test_ids_are_those_of_the_tokenizer_and_nothing_is_added_by_it(english: Path) -> None:
    """A tokenizer that adds its own begin and end tokens, as Llama's does, must not be allowed to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "the": 3, "old": 4}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert tokenizer("the old")["input_ids"] == [0, 3, 4, 1]
    options = replace(write(english.parent / "unused.txt", ["a"]), path=str(english), n_tokens="500")
    contexts, _ = tokens.pack(options, tokenizer, 0)[Split.train]
    assert (contexts[:, 0] == 0).all()
    assert (contexts[:, 1:] != 0).all()
    first = next(text for text in tokens.documents(options) if tokens.split_of(text) is Split.train)
    ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    assert contexts[:, 1:].ravel()[: len(ids) + 1].tolist() == [*ids, 1]


def test_world_gives_exactly_the_rows_asked_for_and_follows_its_seed() -> None:
    options = DatasetOptions(name="world", kind=DatasetKind.world, n_tokens="1.5k", context=64, held_out=2)
    packed = tokens.pack(options, TOKENIZER, BOS)
    assert {split: packed[split].n_rows for split in Split} == {"train": 1500, "calibration": 126, "evaluation": 126}
    other = replace(options, seed=1)
    assert tokens.fingerprint(tokens.pack(other, TOKENIZER, BOS)) != tokens.fingerprint(packed)
    assert tokens.source_identity(other) != tokens.source_identity(options) == tokens.source_identity(options)


@pytest.mark.parametrize(
    ("split_by", "expected"),
    [
        (SplitBy.line, ["one", "two", "lines", "three", "four"]),
        (SplitBy.paragraph, ["one", "two\nlines", "three\nfour"]),
        (None, ["one", "two\nlines", "three\nfour"]),
        (SplitBy.document, ["one\n\ntwo\nlines\n\nthree\nfour"]),
    ],
)
def test_a_document_is_a_line_a_paragraph_or_a_file(
    options: DatasetOptions, tmp_path: Path, split_by: SplitBy | None, expected: list[str]
) -> None:
    (tmp_path / "words.txt").write_bytes(b"one\n\ntwo\r\nlines\n\nthree\nfour\n")
    assert list(tokens.documents(replace(options, split_by=split_by))) == expected


def test_folders_globs_compressed_files_and_odd_names_are_read_in_order(
    options: DatasetOptions, tmp_path: Path
) -> None:
    folder = tmp_path / ".cache" / "__x__"
    (folder / "deep").mkdir(parents=True)
    (folder / "b[1] #2.txt").write_text("second")
    (folder / "a*.txt").write_text("first")
    (folder / "deep" / "c.txt").write_text("third")
    (folder / "d.md").write_text("other")
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"packed"))

    def read(path: Path | str) -> list[str]:
        return list(tokens.documents(replace(options, path=str(path))))

    assert read(folder) == ["first", "second", "third"]
    assert read(folder / "b[1] #2.txt") == ["second"]
    assert read(folder / "**" / "*.txt") == ["first", "second", "third"]
    assert read(folder / "*.[mg][dz]") == ["other", "packed"]


def test_unusable_text_is_refused_with_the_name_of_the_file(options: DatasetOptions, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            list(tokens.documents(replace(options, path=str(path))))

    refused(tmp_path / "nowhere.txt", r"nowhere.txt: no such file")
    (tmp_path / "empty.txt").write_text("")
    refused(tmp_path / "empty.txt", r"empty.txt: the text is empty")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", r"folder: no \*.txt below")
    (tmp_path / "folder" / "good.txt").write_text("good")
    (tmp_path / "folder" / "latin.txt").write_bytes(b"line\ncaf\xe9\n")
    refused(tmp_path / "folder", r"latin.txt is not UTF-8 \(byte 8\); convert it")
    (tmp_path / "folder" / "latin.txt").unlink()
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"caf\xe9"))
    refused(tmp_path / "z.txt.gz", "compressed file")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"path": "a.txt"}, "dataset.path does not apply to dataset=world"),
        ({"split_by": SplitBy.line}, "dataset.split_by does not apply to dataset=world"),
        ({"n_tokens": "all"}, "a text that ends"),
        ({"n_tokens": "many"}, "'many' is not a count"),
        ({"context": 1}, "at least 2"),
        ({"held_out": 0}, "at least 1"),
        ({"kind": DatasetKind.text, "name": "text"}, "needs dataset.path"),
    ],
)
def test_options_that_do_not_apply_or_contradict_are_refused(wrong: dict[str, Any], match: str) -> None:
    options = DatasetOptions(name="world", kind=DatasetKind.world, n_tokens="1k")
    with pytest.raises(UserError, match=match):
        tokens.check(replace(options, **wrong))


@pytest.mark.parametrize(
    ("text", "value"),
    [("123", 123), ("400k", 400_000), ("10M", 10**7), ("1.5B", 1_500_000_000), ("0.25 m", 250_000), ("1e6", 10**6)],
)
def test_counts_have_units(text: str, value: int) -> None:
    assert tokens.count(text) == value


@pytest.mark.parametrize("text", ["", "k", "0", "-3", "1.5", "1.0001k", "10T", "ten", "1,000", "1k k", "all", "٣"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a count"):
        tokens.count(text)


def test_identity_of_a_text_follows_its_bytes_and_not_its_place(options: DatasetOptions, tmp_path: Path) -> None:
    original = tokens.source_identity(options)
    assert set(original) == {"sha256"}
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "words.txt"
    moved.write_bytes((tmp_path / "words.txt").read_bytes())
    assert tokens.source_identity(replace(options, path=str(moved))) == original
    moved.write_bytes(moved.read_bytes().replace(b"xx", b"xy", 1))
    assert tokens.source_identity(replace(options, path=str(moved))) != original


def test_the_hash_of_files_follows_names_and_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "sub").mkdir(parents=True)
        (folder / "a.txt").write_text("a")
        (folder / "sub" / "b.txt").write_text("b")

    def found(folder: Path) -> str:
        return hash_files([file for file in folder.rglob("*") if file.is_file()])

    original = found(one)
    assert found(two) == original
    (two / "sub" / "b.txt").write_text("c")
    assert found(two) != original
    (two / "sub" / "b.txt").write_text("b")
    (two / "a.txt").rename(two / "c.txt")
    assert found(two) != original
    assert hash_files([one / "a.txt"]) != original
