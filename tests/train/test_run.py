"""Run directories: what a second start under the same name means."""

import os
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UserError
from pipeline.train import run


class Shape(StrEnum):
    linear = "linear"
    cosine = "cosine"


@dataclass
class CacheSettings:
    dir: str = "cache"
    read: str = "auto"
    codec: str = "raw"


@dataclass
class TrainSettings:
    n_tokens: str | None = "400k"
    batch_tokens: int = 1024
    keep_checkpoints: int = 1
    shape: Shape = Shape.linear


@dataclass
class Settings:
    name: str = "demo"
    lr: float = 1e-5
    newest_cache: bool = False
    experiment: str | None = None
    cache: CacheSettings = field(default_factory=CacheSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_new_run_gets_a_directory_with_its_settings() -> None:
    directory = run.start("demo", Settings())
    assert directory == Path("runs/demo")
    assert [path.name for path in directory.iterdir()] == ["config.yaml"]
    saved = yaml.safe_load((directory / "config.yaml").read_text())
    assert saved == run.saved(directory)
    assert saved["train"] == {"n_tokens": "400k", "batch_tokens": 1024, "keep_checkpoints": 1, "shape": "linear"}
    assert saved["lr"] == 1e-5


def test_the_same_settings_continue() -> None:
    directory = run.start("demo", Settings())
    before = (directory / "config.yaml").read_bytes()
    (directory / "metrics.jsonl").write_text("{}\n")
    assert run.start("demo", Settings()) == directory
    assert (directory / "config.yaml").read_bytes() == before
    assert (directory / "metrics.jsonl").read_text() == "{}\n"


def test_other_settings_are_refused_naming_each_key_with_both_values() -> None:
    directory = run.start("demo", Settings())
    before = (directory / "config.yaml").read_bytes()
    other = Settings(lr=2e-5, train=TrainSettings(batch_tokens=512, shape=Shape.cosine))
    with pytest.raises(UserError) as caught:
        run.start("demo", other)
    message = str(caught.value)
    assert "lr=2e-05 (was 1e-05)" in message
    assert "train.batch_tokens=512 (was 1024)" in message
    assert "train.shape=cosine (was linear)" in message
    assert "keep_checkpoints" not in message
    assert "n_tokens" not in message
    assert "name=" in message
    assert "\n" not in message
    assert (directory / "config.yaml").read_bytes() == before


def test_a_value_that_becomes_null_is_a_difference() -> None:
    run.start("demo", Settings())
    with pytest.raises(UserError, match=r"train\.n_tokens=None \(was 400k\)"):
        run.start("demo", Settings(train=TrainSettings(n_tokens=None)))


def test_settings_that_change_no_result_may_differ() -> None:
    run.start("demo", Settings())
    other = Settings(
        newest_cache=True,
        experiment="topk",
        cache=CacheSettings(dir="/elsewhere", read="mmap"),
        train=TrainSettings(keep_checkpoints=7),
    )
    run.start("demo", other)
    with pytest.raises(UserError, match=r"cache\.codec=int8 \(was raw\)"):
        run.start("demo", replace(other, cache=CacheSettings(codec="int8")))


def test_many_differences_are_counted() -> None:
    @dataclass
    class Many:
        a: int = 0
        b: int = 0
        c: int = 0
        d: int = 0
        e: int = 0
        f: int = 0
        g: int = 0
        h: int = 0

    run.start("demo", Many())
    with pytest.raises(UserError, match=r"a=1 .*f=1 \(was 0\) and 2 more; choose another name="):
        run.start("demo", Many(*[1] * 8))


def test_a_setting_that_one_side_does_not_know_is_a_difference() -> None:
    @dataclass
    class Newer(Settings):
        momentum: float = 0.5

    run.start("demo", Settings())
    with pytest.raises(UserError, match=r"momentum=0\.5"):
        run.start("demo", Newer())


def test_a_directory_that_is_no_run_is_refused_and_left_alone() -> None:
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"runs/demo exists and is no run"):
        run.start("demo", Settings())
    assert [path.name for path in Path("runs/demo").iterdir()] == ["thesis.tex"]


def test_an_empty_directory_or_one_with_a_sweeps_runs_may_become_a_run() -> None:
    Path("runs/empty").mkdir(parents=True)
    Path("runs/sweep/0").mkdir(parents=True)
    Path("runs/sweep/11").mkdir(parents=True)
    for name in ("empty", "sweep", "sweep/2"):
        assert (run.start(name, Settings()) / "config.yaml").exists()


def finish(name: str, time: int) -> Path:
    directory = run.start(name, Settings())
    (directory / "final").mkdir()
    file = directory / "final" / "config.json"
    file.write_text("{}")
    os.utime(file, (time, time))
    return directory


def test_a_run_is_finished_when_its_result_is_there() -> None:
    directory = run.start("demo", Settings())
    assert not run.finished(directory)
    (directory / "checkpoints" / "step_9").mkdir(parents=True)
    assert not run.finished(directory)
    finish("other", 1)
    assert run.finished(Path("runs/other"))
    assert not run.finished(Path("runs/nowhere"))


def test_the_newest_run_is_the_one_that_ended_last_sweeps_included() -> None:
    with pytest.raises(UserError, match=r"no finished run under runs/.*clt train"):
        run.newest()
    run.start("unfinished", Settings())
    with pytest.raises(UserError, match="no finished run"):
        run.newest()
    finish("a", 300)
    finish("b", 100)
    assert run.newest() == Path("runs/a")
    finish("sweep/3", 500)
    assert run.newest() == Path("runs/sweep/3")
    run.start("unfinished", Settings())
    assert run.newest() == Path("runs/sweep/3")


def test_what_was_never_started_has_no_settings() -> None:
    assert run.saved(Path("runs/nowhere")) is None


def test_nested_settings_flatten_to_dotted_keys() -> None:
    assert run.flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2]}) == {"a.b.c": 1, "a.d": None, "e": [1, 2]}


@pytest.mark.parametrize("name", ["", "..", "../elsewhere", "a/../..", "/tmp/elsewhere"])
def test_a_run_stays_under_runs(name: str) -> None:
    with pytest.raises(UserError, match="no place under runs/"):
        run.start(name, Settings())


def test_a_run_is_named_by_its_path_or_its_name() -> None:
    run.start("mine/0", Settings())
    assert run.named("runs/mine/0") == run.named("mine/0") == Path("runs/mine/0")
    assert run.named("nowhere") == Path("nowhere")
