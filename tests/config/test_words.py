"""What happens to the words of a command line before Hydra reads them."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import compose
from pipeline.config.words import prepare
from pipeline.stages.options import EvalConfig, TrainConfig
from tests.config.starting import Stub, refusal, start, write

VERBATIM = [
    "a,b", "it's", 'say "hi"', "a=b", "~/models/x", "two words", "déjà vu", "1e3", "007", "null", "true", "[a]",
    "{a: b}", "C:\\dir\\", "${oc.env:HOME}", "\\${x}", "a'b\"c", " padded ", "#1", "(x", "", "a\\'", "50%", "*.txt",
]  # fmt: skip


def test_text_reaches_the_stage_as_it_was_typed(stub: Stub) -> None:
    keys = ["name", "model.path", "model.revision", "dataset.path", "cache.dir"]
    for i in range(0, len(VERBATIM), 5):
        texts = [VERBATIM[(i + place) % len(VERBATIM)] for place in range(5)]
        assert start(*[f"{key}={text}" for key, text in zip(keys, texts, strict=True)]) == 0
        cfg = stub.seen[-1]
        assert [cfg.name, cfg.model.path, cfg.model.revision, cfg.dataset.path, cfg.cache.dir] == texts


def test_text_survives_a_sweep_over_something_else(stub: Stub) -> None:
    keys = ["model.path", "model.revision", "dataset.path", "cache.dir"]
    for i in range(0, len(VERBATIM), 4):
        texts = [VERBATIM[(i + place) % len(VERBATIM)] for place in range(4)]
        words = [f"{key}={text}" for key, text in zip(keys, texts, strict=True)]
        assert start(*words, "optim.lr=1,2", multirun=True) == 0
        for cfg, lr in zip(stub.seen[-2:], [1.0, 2.0], strict=True):
            assert [cfg.model.path, cfg.model.revision, cfg.dataset.path, cfg.cache.dir] == texts
            assert cfg.optim.lr == lr


@settings(max_examples=8, deadline=None)
@given(*[st.text(st.one_of(st.sampled_from("\\'\"${}=,~:()[] \t\n#?1e"), st.characters(codec="utf-8")))] * 2)
def test_any_text_survives(run: str, folder: str) -> None:
    if "???" not in (run, folder):  # OmegaConf's own sign for a missing value
        cfg = compose("eval", [f"run={run}", f"cache.dir={folder}"])
        assert isinstance(cfg, EvalConfig)
        assert (cfg.run, cfg.cache.dir) == (run, folder)


@pytest.mark.parametrize(
    ("words", "dataset"),
    [
        (["model=gpt2"], "openwebtext"),
        (["model=gpt2", "dataset.n_tokens=10k"], "openwebtext"),
        (["model=gpt2", "dataset=world"], "world"),
        (["model=world"], "world"),
        ([], "world"),
    ],
)
@pytest.mark.parametrize("stage", ["extract", "train"])
def test_a_model_brings_its_default_dataset(words: list[str], dataset: str, stage: str) -> None:
    assert compose(stage, words).dataset.name == dataset  # type: ignore[union-attr]


def test_a_sweep_over_models_asks_for_a_dataset_when_theirs_differ(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    assert "gpt2: openwebtext, world: world" in refusal(["model=gpt2,world"], capsys, multirun=True)
    assert start("model=gpt2,world", "dataset=text", multirun=True) == 0
    assert [cfg.model.name for cfg in stub.seen] == ["gpt2", "world"]


@pytest.mark.parametrize(
    ("words", "newest"),
    [
        ([], True),
        (["+experiment=topk", "optim.lr=1"], True),
        (["model=world"], False),
        (["dataset.n_tokens=1M"], False),
        (["model.dtype=bfloat16"], False),
        (["newest_cache=false"], False),
    ],
)
def test_training_takes_the_newest_cache_only_when_nothing_names_one(words: list[str], newest: bool) -> None:
    cfg = compose("train", words)
    assert isinstance(cfg, TrainConfig)
    assert cfg.newest_cache is newest


def test_an_experiment_of_ones_own_may_name_the_model_or_the_dataset(tmp_path: Path) -> None:
    mine = write(
        tmp_path,
        experiment__a="# @package _global_\ndefaults:\n  - override /model: tiny\n",
        experiment__b="# @package _global_\ndataset:\n  n_tokens: 1M\n",
        experiment__c="# @package _global_\noptim:\n  lr: 0.5\n",
        model__tiny="name: tiny\npath: models/tiny\ndefault_dataset: text\n",
    )
    a, b, c = [compose("train", [f"+experiment={name}"], mine) for name in "abc"]
    assert isinstance(a, TrainConfig)
    assert isinstance(b, TrainConfig)
    assert isinstance(c, TrainConfig)
    assert (a.model.path, a.dataset.name, a.newest_cache) == ("models/tiny", "text", False)
    assert (b.dataset.n_tokens, b.newest_cache) == ("1M", False)
    assert (c.optim.lr, c.newest_cache) == (0.5, True)
    extract = compose("extract", ["model=tiny"], mine)
    assert extract.dataset.name == "text"  # type: ignore[union-attr]


def test_a_file_that_hydra_would_pass_over_is_refused(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mine = write(tmp_path / "mine", experiment__topk="# @package _global_\n")
    assert "has a file of this name; rename yours" in refusal(["+experiment=topk"], capsys, config_dir=mine)


def test_prepare_leaves_ordinary_words_alone() -> None:
    words = ["optim.lr=1e-3", "activation.k=1,2", "~log", "+experiment=topk", "model=world", "dataset=world"]
    assert prepare("train", words) == words
