"""`clt report`: which runs its words mean, where the page goes, what it says when it cannot."""

import csv
import logging
import os
import re
import subprocess
from pathlib import Path

import pytest

from pipeline.config import Request, compose, launch
from pipeline.errors import UserError
from pipeline.stages import report
from pipeline.stages.options import ReportConfig
from pipeline.web import images
from tests.web.browser import CHROMIUM
from tests.web.made import make_run, measured
from tests.web.reading import Page


def run(*words: str) -> Path:
    config = compose("report", words)
    assert isinstance(config, ReportConfig)
    return report.run(config)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with runs/demo and a sweep runs/many/0, 2, 10."""
    make_run(tmp_path / "runs" / "demo", None, measured())
    for n in (0, 2, 10):
        make_run(tmp_path / "runs" / "many" / str(n), {"activation": {"k": n}}, measured(1.0 + n))
    (tmp_path / "runs" / "many" / "report-plots").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(page: Path) -> list[str]:
    return [row[0][0].split(" | ")[0] for row in Page(page.read_text()).table("run", "L0")[1:]]


def test_a_run_is_named_by_directory_or_name_and_its_page_lies_in_it(place: Path) -> None:
    assert run("demo") == Path("runs/demo/report.html")
    assert run("runs/demo") == Path("runs/demo/report.html")
    assert Path("runs/demo/report.csv").exists()
    assert rows(Path("runs/demo/report.html")) == ["demo"]


def test_a_sweep_is_named_by_its_directory(place: Path) -> None:
    assert run("runs/many") == Path("runs/many/report.html")
    assert rows(Path("runs/many/report.html")) == ["0", "2", "10"]
    saved = list(csv.DictReader(Path("runs/many/report.csv").read_text().splitlines()))
    assert [row["setting:activation.k"] for row in saved] == ["0", "2", "10"]
    assert "2: k=2" in Path("runs/many/report.html").read_text()


def test_runs_of_several_places_go_to_the_working_directory_each_once(place: Path) -> None:
    assert run("runs/many", "demo", "many/2") == Path("report.html")
    assert set(rows(Path("report.html"))) == {"many/0", "many/2", "many/10", "demo"}


def test_settings_stand_among_the_runs(place: Path) -> None:
    page = run("demo", "to=out/two.html", "many", "report.baseline=10")
    assert page == Path("out/two.html")
    assert Path("out/two.csv").exists()
    assert "Differences from many/10" in Page(page.read_text()).text


def test_words_that_look_like_settings_or_grammar_are_runs_where_there_is_such_a_directory(place: Path) -> None:
    odd = ["k=8", "it's, {odd}", "[1] ${x}"]
    for name in odd:
        make_run(place / name, {"optim": {"lr": odd.index(name)}}, measured())
    assert set(rows(run(*odd))) == set(odd)


def test_none_named_is_the_run_that_was_at_work_last_finished_or_not(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(place / "runs" / "now", finished=False)
    for n, file in enumerate(Path("runs").glob("*/**/*")):
        os.utime(file, (n, n))
    os.utime("runs/now/metrics.jsonl", (10**6, 10**6))
    with caplog.at_level(logging.INFO):
        assert run() == Path("runs/now/report.html")
    assert "using the newest, runs/now" in caplog.text
    assert Path("runs/now/report.html").resolve().as_uri() in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no run nothing, here or under runs/; there are demo, many"),
        (["runs/many/report-plots"], r"report-plots is no run \(it has no config.yaml\) and holds none; name"),
        (["demo", "to=page.txt"], "to=page.txt must end in .html"),
        (["demo", "report.baseline=many/2"], "report.baseline=many/2 is none of the runs on the page; choices: demo"),
        (["demo", "report.resamples=-1"], r"report.resamples=-1 must be 0"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(place: Path, words: list[str], message: str) -> None:
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(*words)
    assert launch("report", Request(overrides=tuple(words))) == 2
    assert sorted(place.rglob("*")) == before


def test_where_there_is_no_run_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run under runs/; train one"):
        run()


def test_images_without_a_browser_are_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kaleido
    from kaleido.errors import ChromeNotFoundError

    def missing(*_: object, **__: object) -> None:
        raise ChromeNotFoundError

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", missing)
    with pytest.raises(UserError, match="images need Chrome or Chromium; install one"):
        run("demo", "report.png=true")
    assert not list(Path("runs/demo").glob("*report*"))


def test_images_are_of_every_plot_in_the_place_of_older_ones(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import kaleido

    def draw(specs: list[dict[str, Path]], **_: object) -> None:
        for spec in specs:
            spec["path"].write_bytes(b"png")

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", draw)
    (place / "runs" / "many" / "report-plots" / "old.png").write_bytes(b"old")
    page = run("many", "report.png=true")
    drawn = {path.stem for path in Path("runs/many/report-plots").iterdir()}
    assert drawn == {name for name in Page(page.read_text()).figures if not name.startswith("detail")}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
def test_a_browser_opens_the_page_without_network_or_complaint(place: Path, tmp_path: Path) -> None:
    """Every plot is drawn, and the console says nothing."""
    page = run("many")
    assert CHROMIUM is not None
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-quic", "--enable-logging=stderr",
        "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]  # fmt: skip
    opened = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", page.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert [line for line in opened.stderr.splitlines() if "CONSOLE" in line] == []
    drawn = set(re.findall(r'data-figure="([\w]+)"[^>]*data-drawn="yes"', opened.stdout))
    hidden = {name for name in Page(page.read_text()).figures if re.match(r"detail[12]|training_rest", name)}
    assert drawn == set(Page(page.read_text()).figures) - hidden
    assert opened.stdout.count('class="main-svg"') >= len(drawn)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
def test_images_are_drawn_by_the_browser_that_is_there(place: Path) -> None:
    page = run("demo", "report.png=true")
    drawn = images.write({"one": next(iter(Page(page.read_text()).figures.values()))}, place / "again")
    for file in [*drawn, *Path("runs/demo/report-plots").iterdir()]:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.stat().st_size > 5_000


def test_a_sweep_of_which_every_job_failed_says_why(place: Path) -> None:
    folder = Path("runs/none")
    folder.mkdir()
    jobs = "".join(
        f"  {n}: {{overrides: [k={n}], started: now, failed: 'no cache; extract one', bug: false}}\n" for n in (0, 1)
    )
    (folder / "sweep.yaml").write_text(f"again: clt train -m\njobs:\n{jobs}")
    with pytest.raises(UserError, match=r"none: every job of this sweep failed \(no cache; extract one\); mend"):
        run("none")
