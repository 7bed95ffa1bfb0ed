"""Who watches a run as it goes on: loggers, and its page."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.stages import train, train_watch
from pipeline.stages.train_watch import Page
from pipeline.train.loop import Trainer

RUN = ["arch.d_features=33", "train.n_steps=20", "train.n_tokens=null", "train.batch_tokens=128", "log.every=3"]
RUN += ["train.checkpoint_every=640", "+experiment=topk", "activation.k=4"]

BUILDS = """
import os, sys
os.nice(1)
open(sys.argv[2], "a").write("built\\n")
"""
FAILS = "import sys; sys.stderr.write('...\\npipeline.errors.UserError: no plotly; pip install it\\n'); sys.exit(1)"
HANGS = "import time; time.sleep(60)"


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {name: {one.step: one.value for one in found.Scalars(name)} for name in found.Tags()["scalars"]}


def cut_before(monkeypatch: pytest.MonkeyPatch, step: int, *words: str) -> None:
    """Train until the power goes."""

    class PowerCut(Exception):
        pass

    take = Trainer.step

    def acting(self: Trainer, *args: Any) -> Any:
        if self.state.step == step:
            raise PowerCut
        return take(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", acting)
        with pytest.raises(PowerCut):
            train.run(compose("train", [*RUN, *words]))


def test_a_run_goes_on_with_another_logger_which_shows_all_of_it(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.run(compose("train", [*RUN, "name=whole"]))
    cut_before(monkeypatch, 14, "name=mine")
    cut_before(monkeypatch, 17, "name=mine", "log=tensorboard")
    train.run(compose("train", ["name=mine", "log=tensorboard"]))
    for file in ("metrics.jsonl", "final/transcoder.safetensors"):
        assert Path("runs/mine", file).read_bytes() == Path("runs/whole", file).read_bytes()
    shown = events(Path("runs/mine"))
    logged = lines(Path("runs/mine"))
    for name in logged[-1].keys() - {"step"}:
        expected = {line["step"]: line[name] for line in logged if line.get(name) is not None}
        assert shown[name] == pytest.approx(expected), name
    assert shown["step_ms"].keys() == {line["step"] for line in logged}


def test_with_a_logger_of_ones_own_rhythm_a_run_does_not_go_on(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_before(monkeypatch, 8, "name=mine")
    own = tmp_path / "conf/log"
    own.mkdir(parents=True)
    (own / "often.yaml").write_text("name: tensorboard\nevery: 1\n")
    with pytest.raises(UserError, match=r"made with other settings: .*log\.every=1 \(was 3\)"):
        train.run(compose("train", ["name=mine", "log=often"], config_dir=tmp_path / "conf"))


def test_a_missing_logger_is_said_before_anything_is_written(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.train.loggers.find_spec", lambda name: None)
    for words in ([], ["dry_run=true"]):
        with pytest.raises(UserError, match="run: pip install tensorboard"):
            train.run(compose("train", [*RUN, "log=tensorboard", "name=refused", *words]))
    assert not Path("runs").exists()


@pytest.fixture(autouse=True)
def no_other_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Page, "open", [])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def page_of(directory: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Page, Clock]:
    monkeypatch.setattr(train_watch, "BUILD", code)
    clock = Clock()
    page = Page(directory, clock)
    page.begin([])
    return page, clock


def wait_for(page: Page) -> None:
    assert page._process is not None
    page._process.wait(20)


def built(directory: Path) -> int:
    file = directory / "report.html"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_page_is_built_once_a_minute_at_most_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, clock = page_of(tmp_path, monkeypatch, BUILDS)
    for clock.now in (10.0, 59.0):
        page.add({"step": 1}, {})
        assert page._process is None
    clock.now = 61.0
    page.add({"step": 2}, {})
    wait_for(page)
    page.add({"step": 3}, {})
    assert built(tmp_path) == 1
    clock.now = 61.0 + max(60.0, page._wait) + 1
    page.add({"step": 4}, {})
    wait_for(page)
    assert built(tmp_path) == 2
    page.end()
    assert built(tmp_path) == 3


def test_pages_that_cost_more_come_more_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, clock = page_of(tmp_path, monkeypatch, BUILDS)
    used = iter([5.0, 7.5, 7.5])
    monkeypatch.setattr(train_watch, "_cpu_seconds", lambda: next(used))
    clock.now = 61.0
    page.add({"step": 1}, {})
    wait_for(page)
    for clock.now in (200.0, 310.0):
        page.add({"step": 2}, {})
        assert page._process is None
    clock.now = 312.0  # 2.5 seconds of a processor are 1 % of 250
    page.add({"step": 3}, {})
    assert page._process is not None
    wait_for(page)
    page.stop()


def test_runs_in_one_process_share_the_time_for_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, clock = page_of(tmp_path, monkeypatch, BUILDS)
    other = Page(tmp_path / "other", clock)
    other.begin([])
    used = iter([5.0, 7.5])
    monkeypatch.setattr(train_watch, "_cpu_seconds", lambda: next(used))
    clock.now = 61.0
    page.add({"step": 1}, {})
    other.add({"step": 1}, {})
    assert other._process is None, "one at a time"
    wait_for(page)
    page.add({"step": 2}, {})
    assert page._wait == 500  # 2.5 seconds of a processor for each of two
    other.stop()
    assert Page.open == [page]


def test_a_short_run_has_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, clock = page_of(tmp_path, monkeypatch, BUILDS)
    clock.now = 30.0
    page.add({"step": 1}, {})
    page.end()
    assert built(tmp_path) == 0


def test_a_page_that_cannot_be_built_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page, clock = page_of(tmp_path, monkeypatch, FAILS)
    for minute in range(2, 6):
        clock.now = 60.0 * minute
        page.add({"step": minute}, {})
        if page._process is not None:
            wait_for(page)
    page.end()
    assert caplog.messages == [f"{tmp_path}/report.html is not built, and the run goes on: no plotly; pip install it"]


def test_a_page_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train_watch, "END_SECONDS", 0.2)
    page, clock = page_of(tmp_path, monkeypatch, HANGS)
    clock.now = 100.0
    start = time.monotonic()
    page.end()
    assert time.monotonic() - start < 10
    assert "it takes more than 0.2 seconds" in caplog.text


def test_a_training_asks_for_its_page(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_watch, "BUILD", BUILDS)
    monkeypatch.setattr(train_watch, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(train_watch, "SHARE", 1e9)
    train.run(compose("train", [*RUN, "name=paged"]))
    train.run(compose("train", [*RUN, "name=plain", "log.report=false"]))
    assert built(Path("runs/paged")) >= 2
    assert not Path("runs/plain/report.html").exists()
    for file in ("metrics.jsonl", "final/transcoder.safetensors"):
        assert Path("runs/paged", file).read_bytes() == Path("runs/plain", file).read_bytes()
