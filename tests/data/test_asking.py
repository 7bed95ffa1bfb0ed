"""A data set as a request and as a command line: there and back."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import compose
from pipeline.config.words import prepare
from pipeline.data.asking import asked, words_of
from pipeline.data.commands import overrides_of
from pipeline.data.layout import request_of
from pipeline.data.options import (
    Bos,
    Content,
    DatasetKind,
    DatasetOptions,
    FilterOptions,
    MemberOptions,
    ModelOptions,
    Separator,
    SplitBy,
)
from pipeline.plain import from_plain, to_plain
from pipeline.stages.options import ExtractConfig
from tests.data.corpus import options, records, to_jsonl, to_text, words

texts = st.text(st.one_of(st.sampled_from("\\'\"${}=,~:()[]^* \t\n#?1e"), st.characters(codec="utf-8"))).filter(
    lambda text: "???" not in text  # OmegaConf's own sign for a missing value
)
scalars = st.one_of(texts, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
names = st.from_regex(r"[a-z_][a-z0-9_-]{0,5}", fullmatch=True).filter(lambda name: name != "null")
counts = st.one_of(st.none(), st.integers(0, 10**6))
filters = st.builds(
    FilterOptions,
    min_characters=counts,
    max_characters=counts,
    keep=st.one_of(st.none(), texts),
    drop=st.one_of(st.none(), texts),
    where=st.dictionaries(names, scalars, max_size=2),
)
of_source: dict[str, Any] = {
    "path": st.one_of(st.none(), texts),
    "subset": st.one_of(st.none(), texts),
    "split": texts,
    "revision": st.one_of(st.none(), texts),
    "content": st.sampled_from(Content),
    "column": st.one_of(st.none(), texts),
    "split_by": st.one_of(st.none(), st.sampled_from(SplitBy)),
    "filter": filters,
}
members = st.builds(MemberOptions, kind=st.sampled_from(DatasetKind), weight=st.floats(1e-9, 1e9), **of_source)
datasets = st.builds(
    DatasetOptions,
    name=texts,
    kind=st.sampled_from(DatasetKind),
    n_tokens=st.sampled_from(["all", "123", "10000000"]),
    context=st.integers(2, 4096),
    held_out=counts,
    seed=st.integers(0, 9),
    bos=st.sampled_from(Bos),
    separator=st.sampled_from(Separator),
    skip_tokens=st.sampled_from(["0", "7", "200k"]),
    sources=st.dictionaries(names, members, max_size=2),
    **of_source,
)


def composed(line: str) -> DatasetOptions:
    config = compose("extract", shlex.split(line))
    assert isinstance(config, ExtractConfig)
    return config.dataset


@settings(max_examples=10, deadline=None)
@given(datasets)
def test_the_command_of_any_data_set_composes_back_to_it(dataset: DatasetOptions) -> None:
    line = " ".join(map(shlex.quote, words_of(json.loads(json.dumps(asked(dataset))))))
    assert composed(line) == dataset


@settings(max_examples=15, deadline=None)
@given(datasets)
def test_what_was_asked_gives_the_options_back(dataset: DatasetOptions) -> None:
    assert from_plain(DatasetOptions, json.loads(json.dumps(asked(dataset)))) == dataset
    assert from_plain(DatasetOptions, json.loads(json.dumps(to_plain(dataset)))) == dataset


def test_an_option_at_its_default_is_no_part_of_a_request() -> None:
    """What the first caches listed is always there; everything later shows when it differs."""
    plain = {"name": "mine", "kind": "jsonl", "n_tokens": "all", "path": "x", "split_by": None}
    plain |= {"context": 7, "held_out": 3, "seed": 0}
    assert asked(options("x")) == plain
    changed = options("x", bos=Bos.none, filter=FilterOptions(keep="a"))
    assert asked(changed) == plain | {"bos": "none", "filter": {"keep": "a"}}


def test_a_short_command_for_a_plain_request() -> None:
    world = DatasetOptions("world", DatasetKind.world, "400000", context=64, held_out=256)
    line = " ".join(words_of(asked(world)))
    assert line == "dataset=world dataset.n_tokens=400000 dataset.held_out=256 dataset.context=64 dataset.seed=0"


@pytest.mark.parametrize("kind", ["text", "jsonl", "hub", "mixture"])
def test_the_command_of_a_request_asks_for_the_same_cache(kind: str, tmp_path: Path) -> None:
    path = to_text(tmp_path / "it's, a $book.txt", words(50))
    lines = to_jsonl(tmp_path / "a.jsonl", records(words(50)))
    rules = FilterOptions(keep=r"^.{1,3}$", where={"lang": "en", "n": 3})
    dataset = {
        "text": options(path, "text", held_out=None),
        "jsonl": options(lines, filter=rules, n_tokens="1.5k"),
        "hub": options("a/b", "hub", subset="x,y", revision="1e3", content=Content.chat, column="null"),
        "mixture": options(
            None,
            "mixture",
            sources={
                "one": MemberOptions(kind=DatasetKind.text, path=str(path), weight=0.1),
                "my-two": MemberOptions(kind=DatasetKind.jsonl, path=str(lines), filter=rules),
            },
        ),
    }[kind]
    model = ModelOptions("world", "builtin:world")
    request = request_of(model, dataset)
    config = compose("extract", shlex.split(overrides_of(request, Path("cache"))))
    assert isinstance(config, ExtractConfig)
    assert request_of(config.model, config.dataset) == request
    if kind != "hub":  # and another path of the same text is another request only through its words
        assert request_of(model, replace(dataset, seed=1)) != request


def test_members_come_from_the_command_line_and_from_a_file_of_ones_own(tmp_path: Path) -> None:
    expected = {
        "books": MemberOptions(kind=DatasetKind.text, path="books/", weight=2),
        "web": MemberOptions(kind=DatasetKind.hub, path="a/b", filter=FilterOptions(where={"lang": "en"})),
    }
    line = "dataset=mixture dataset.sources.books.kind=text +dataset.sources.books.path=books/ "
    line += "dataset.sources.books.weight=2 dataset.sources.web.kind=hub '++dataset.sources.web.path=a/b' "
    line += "dataset.sources.web.filter.where.lang=en"
    assert composed(line).sources == expected
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "ours.yaml").write_text(
        "defaults: [mixture]\nname: ours\nsources:\n"
        "  books: {kind: text, path: books/, weight: 1}\n"
        "  web: {kind: hub, path: a/b, filter: {where: {lang: en}}}\n"
    )
    config = compose("extract", ["dataset=ours", "dataset.sources.books.weight=2"], tmp_path)
    assert isinstance(config, ExtractConfig)
    assert config.dataset.sources == expected
    assert asdict(config.dataset)["name"] == "ours"


def test_a_weight_of_a_mixture_can_be_swept_over() -> None:
    words = prepare("extract", ["dataset=mixture", "dataset.sources.a.kind=text", "dataset.sources.a.weight=1,2.5"])
    assert words[-1] == "++dataset.sources={a: {weight: 1}},{a: {weight: 2.5}}"


def test_the_commands_of_the_documentation_compose() -> None:
    text = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("clt extract") and "--config-dir" not in line]
    assert len(lines) >= 6
    for line in lines:
        composed(line.removeprefix("clt extract "))
