"""Shares of a mixture, and what ends it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import tokens
from pipeline.data.options import DatasetKind, DatasetOptions, FilterOptions, MemberOptions
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data.corpus import (
    BOS,
    EOS,
    options,
    packed,
    records,
    stream,
    to_jsonl,
    to_parquet,
    to_text,
    tokenizer,
    words,
)

STARTS = {"a": 0x4E00, "b": 0x5E00, "c": 0x6E00}
"""First characters of the documents of each member."""


def member(path: Path, kind: str = "jsonl", weight: float = 1.0, **fields: Any) -> MemberOptions:
    return MemberOptions(kind=DatasetKind(kind), path=str(path), weight=weight, **fields)


@pytest.fixture
def mixture(tmp_path: Path) -> DatasetOptions:
    texts = {name: words(n, STARTS[name]) for (name, n) in (("a", 900), ("b", 600), ("c", 400))}
    members = {
        "c": member(to_parquet(tmp_path / "c.parquet", records(texts["c"])), "parquet", 0.5),
        "b": member(to_text(tmp_path / "b.txt", texts["b"]), "text", 1.0),
        "a": member(to_jsonl(tmp_path / "a.jsonl", records(texts["a"])), "jsonl", 2.5),
    }
    return options(None, "mixture", sources=members)


def owner(token: int) -> str:
    return next(name for name, start in reversed(STARTS.items()) if token >= start)


def documents(ids: list[int]) -> list[tuple[str, int]]:
    """(member, tokens with the EOS) of each whole document of a stream."""
    found, length = [], 0
    for i, token in enumerate(ids):
        length += 1
        if token == EOS:
            found.append((owner(ids[i + 1 - length]), length))
            length = 0
    return found


def test_the_next_document_comes_from_the_member_that_is_furthest_behind(mixture: DatasetOptions) -> None:
    """Against the rule, written out: fewest training tokens for its weight, ties by name, held-out documents aside."""
    waiting = {}
    for name in sorted(STARTS):
        texts = words({"a": 900, "b": 600, "c": 400}[name], STARTS[name])
        waiting[name] = [(tokens.split_of(text), [*map(ord, text), EOS]) for text in texts]
    weights = {name: mixture.sources[name].weight for name in waiting}
    so_far = dict.fromkeys(waiting, 0)
    expected: dict[Split, list[int]] = {split: [] for split in Split}
    while True:
        name = min(sorted(waiting), key=lambda name: so_far[name] / weights[name])
        if not waiting[name]:
            break
        split, ids = waiting[name].pop(0)
        expected[split] += ids
        so_far[name] += len(ids) if split is Split.train else 0
    assert stream(mixture) == expected[Split.train]
    for split in (Split.calibration, Split.evaluation):
        assert stream(mixture, split) == expected[split][: 3 * 6]


def test_shares_are_exact_to_within_a_document_at_every_point(mixture: DatasetOptions) -> None:
    so_far = dict.fromkeys(STARTS, 0)
    for name, n in documents(stream(mixture)):
        so_far[name] += n
        level = min(so_far[name] / mixture.sources[name].weight for name in so_far)
        for other, source in mixture.sources.items():
            assert 0 <= so_far[other] - level * source.weight <= 6  # the longest document and its EOS
    assert sum(so_far.values()) > 1500


def test_all_of_it_ends_where_a_member_ends(mixture: DatasetOptions) -> None:
    """The member that ends has given all of its training documents."""
    found = {name: [n for other, n in documents(stream(mixture)) if other == name] for name in STARTS}
    train = {
        name: sum(tokens.split_of(t) is Split.train for t in words(n, STARTS[name]))
        for name, n in (("a", 900), ("b", 600), ("c", 400))
    }
    assert [name for name in STARTS if len(found[name]) == train[name]] == ["a"]


def test_a_member_that_ends_first_is_named_and_the_named_count_works(mixture: DatasetOptions) -> None:
    with pytest.raises(
        UserError, match=r"its member a ends after (\d+) training tokens .*use dataset\.n_tokens=\d+$"
    ) as e:
        packed(replace(mixture, n_tokens="100k"))
    n = int(str(e.value).rsplit("=", 1)[1])
    found = tokens.pack(replace(mixture, n_tokens=str(n)), tokenizer(), BOS)
    assert found[Split.train].n_rows == n
    assert packed(replace(mixture, n_tokens=str(n))) == packed(mixture)
    with pytest.raises(UserError, match=f"n_tokens={n}$"):
        packed(replace(mixture, n_tokens=str(n + 1)))


def test_a_count_gives_the_first_rows_of_all_of_it(mixture: DatasetOptions) -> None:
    assert stream(replace(mixture, n_tokens="500")) == stream(mixture)[:500]


def test_a_mixture_of_one_gives_the_rows_of_that_one(tmp_path: Path) -> None:
    path = to_jsonl(tmp_path / "a.jsonl", records(words(500)))
    rules = FilterOptions(drop="xxxx")
    for n_tokens in ("all", "300"):
        alone = options(path, filter=rules, n_tokens=n_tokens)
        mixed = options(None, "mixture", sources={"one": member(path, weight=7, filter=rules)}, n_tokens=n_tokens)
        assert packed(mixed) == packed(alone)


def test_the_order_in_which_members_are_named_plays_no_part(mixture: DatasetOptions) -> None:
    turned = dict(reversed(mixture.sources.items()))
    assert packed(replace(mixture, sources=turned)) == packed(mixture)
    assert packed(replace(mixture, sources=turned, name="other")) == packed(mixture)


def test_other_text_may_be_a_mixture(mixture: DatasetOptions) -> None:
    evaluation = tokens.pack_other(mixture, tokenizer(), BOS, Split.evaluation)
    assert (evaluation.contexts == tokens.pack(mixture, tokenizer(), BOS)[Split.evaluation].contexts).all()


def test_texts_of_a_mixture_keep_the_shares_by_characters(mixture: DatasetOptions) -> None:
    found = dict.fromkeys(STARTS, 0)
    for text in tokens.texts(replace(mixture, n_tokens="80")):
        found[owner(ord(text[0]))] += len(text)
    assert all(abs(found[name] - 640 * mixture.sources[name].weight / 4) < 12 for name in STARTS)


def test_identity_is_that_of_each_member(mixture: DatasetOptions, tmp_path: Path) -> None:
    before = tokens.source_identity(mixture)
    assert set(before) == set(STARTS)
    to_text(tmp_path / "b.txt", ["other"])
    after = tokens.source_identity(mixture)
    assert [name for name in STARTS if before[name] != after[name]] == ["b"]
    assert tokens.resolved(mixture) == {}


def test_generated_text_may_be_a_member(mixture: DatasetOptions) -> None:
    sources = {"world": MemberOptions(kind=DatasetKind.world), "a": mixture.sources["a"]}
    mixed = replace(mixture, sources=sources, n_tokens="600", held_out=1)
    assert tokens.pack(mixed, tokenizer(), BOS)[Split.train].n_rows == 600
    with pytest.raises(UserError, match="needs a text that ends"):
        tokens.check(replace(mixed, n_tokens="all", sources={"world": sources["world"]}))


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("a b", {}, r"dataset\.sources\.a b: 'a b' is no name; use letters"),
        ("a", {"weight": 0.0}, r"dataset\.sources\.a\.weight=0: a weight is a number above 0; "),
        ("a", {"weight": float("nan")}, r"weight=nan"),
        ("a", {"kind": DatasetKind.mixture, "path": None}, r"a mixture has no mixtures; "),
        ("a", {"split": "test"}, r"dataset\.sources\.a\.split does not apply to dataset\.sources\.a\.kind=jsonl; "),
        ("a", {"path": None}, r"dataset\.sources\.a\.kind=jsonl needs dataset\.sources\.a\.path=FILE"),
        ("a", {"filter": FilterOptions(keep="(")}, r"dataset\.sources\.a\.filter\.keep is no regular"),
    ],
)
def test_a_wrong_member_is_one_line(name: str, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        tokens.check(options(None, "mixture", sources={name: replace(member(Path("x")), **wrong)}))


@pytest.mark.parametrize(("field", "value"), [("path", "x"), ("filter", FilterOptions(keep="a")), ("column", "x")])
def test_what_belongs_to_members_is_refused_above_them(mixture: DatasetOptions, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"dataset\.{field} does not apply to dataset=mine"):
        tokens.check(replace(mixture, **{field: value}))
    with pytest.raises(UserError, match=r"dataset\.sources does not apply"):
        tokens.check(options("x", sources=mixture.sources))
