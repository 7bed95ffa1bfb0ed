"""What a sweep says of its jobs, other text, and memory: on the page and in the CSV."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.web import report
from tests.web.made import make_run, measured, write_json, write_lines
from tests.web.reading import Page

CAUSE = "activation.k=0 must be 1 or more; <mend> it"


def built(*directories: Path, to: Path) -> Page:
    return Page(report.build(list(directories), to).read_text())


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four jobs: the first is evaluated, the second goes on, the third left no run, the last a run that failed."""
    place = tmp_path / "rules"
    make_run(place / "0", {"activation": {"k": 4}}, measured())
    make_run(place / "1", {"activation": {"k": 8}}, finished=False)
    make_run(place / "3", {"activation": {"k": 0}}, finished=False)

    def job(*words: str, failed: str | None = None) -> dict[str, Any]:
        return {"overrides": list(words), "started": "now", "failed": failed, "bug": False}

    jobs = {0: job("activation.k=4", "+x=a"), 1: job("activation.k=8", "+x=a"), 2: job("activation.k=0", "+x=a",
            failed=CAUSE), 3: job("activation.k=0", "+x=b", failed="diverged; lower optim.lr")}  # fmt: skip
    (place / "sweep.yaml").write_text(
        yaml.safe_dump({"again": "clt train -m name=rules activation.k=4,8,0", "jobs": jobs})
    )
    return place


def runs(sweep: Path) -> list[Path]:
    return [sweep / name for name in ("0", "1", "3")]


def test_what_was_swept_and_what_failed_is_on_the_page(sweep: Path, tmp_path: Path) -> None:
    page = built(*runs(sweep), to=tmp_path / "report.html")
    table = [[cell[0] for cell in row] for row in page.table("job", "settings")]
    assert table == [
        ["job", "settings", "run", "failed"],
        ["0", "activation.k=4 +x=a", "evaluated", ""],
        ["1", "activation.k=8 +x=a", "unfinished, at step 20", ""],
        ["2", "activation.k=0 +x=a", "no run", CAUSE],
        ["3", "activation.k=0 +x=b", "unfinished, at step 20", "diverged; lower optim.lr"],
    ]
    assert "activation.k = 4, 8, 0; x = a, b: 4 jobs, 2 failed" in page.text
    assert "clt train -m name=rules activation.k=4,8,0" in page.text


def test_a_run_that_is_looked_at_alone_says_nothing_of_its_sweep(sweep: Path, tmp_path: Path) -> None:
    page = built(sweep / "0", to=tmp_path / "report.html")
    assert "no run" not in page.text
    assert "sweep" not in page.ids


def test_other_text_has_its_own_table_and_columns(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, {"optim": {"lr": lr}}, measured(lr)) for lr, name in ((1.0, "a"), (2.0, "b")))
    book = measured(4.0) | {"split": "book/all", "n_tokens": 1234}
    del book["tasks"]
    write_json(one / "eval" / "metrics-book.json", book)
    write_json(two / "eval" / "metrics-book.json", measured(8.0) | {"split": "book/all", "n_tokens": 1234})
    write_json(two / "eval" / "metrics-news.json", {"n_tokens": 5, "fvu": {"pooled": 0.5, "per_layer": [0.5]}})
    page = built(one, two, to=tmp_path / "report.html")
    _, of_book = (table for table in page.tables if [head[0] for head in table[0]][:2] == ["run", "L0"])
    heads = [head[0] for head in of_book[0]]
    assert heads[:4] == ["run", "L0", "KL", "FVU"]
    assert [row[2][1] for row in of_book[1:]] == [0.125, 0.25]
    assert of_book[1][heads.index("tasks")] == ("", None)
    assert [[cell[0] for cell in row] for row in page.table("run", "FVU")] == [["run", "FVU"], ["b", "0.500"]]
    assert "book: 1,234 tokens, book/all" in page.text
    saved = {row["run"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert float(saved["a"]["book:kl"]) == 0.125
    assert float(saved["a"]["book:kl_low"]) == 0.1
    assert (saved["a"]["news:fvu"], float(saved["b"]["news:fvu"])) == ("", 0.5)
    assert float(saved["a"]["kl"]) == 0.03125, "the run's own text stands as before"


def test_memory_is_the_most_that_was_noted_and_blank_where_nothing_was(tmp_path: Path) -> None:
    noted, silent = make_run(tmp_path / "a"), make_run(tmp_path / "b", {"optim": {"lr": 1}})
    lines = [{"step": n, "step_ms": 1.0, "memory_mb": mb} for n, mb in ((5, 100.0), (10, 812.4), (15, 300.0))]
    write_lines(noted / "timings.jsonl", lines)
    table = built(noted, silent, to=tmp_path / "report.html").table("run", "state")
    at = [head[0] for head in table[0]].index("memory, MB")
    assert {row[0][0]: row[at] for row in table[1:]} == {"a": ("812", 812.4), "b": ("", None)}
    saved = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert {row["run"]: row["memory_mb"] for row in saved} == {"a": "812.4", "b": ""}
