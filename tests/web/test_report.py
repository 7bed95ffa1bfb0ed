"""The page about runs: right numbers, nothing invented, nothing loaded from elsewhere."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.web import columns, report
from tests.web.made import make_run, measured, measured_before, write_json, write_lines
from tests.web.reading import Page


def built(*directories: Path, to: Path, **more: Any) -> Page:
    return Page(report.build(list(directories), to, **more).read_text())


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """Two recipes with two seeds each, one of an older version, one that is not evaluated, one that goes on."""
    slow = {"optim": {"lr": 0.001}}
    return [
        make_run(tmp_path / "fast-0", None, measured(1.0)),
        make_run(tmp_path / "fast-1", {"train": {"seed": 1}}, measured(1.25)),
        make_run(tmp_path / "slow-0", slow, measured(2.0)),
        make_run(tmp_path / "slow-1", slow | {"train": {"seed": 1}}, measured(1.5)),
        make_run(tmp_path / "old-0", {"activation": {"k": 5}}, measured_before(4.0)),
        make_run(tmp_path / "waiting-0", {"activation": {"k": 6}}),
        make_run(tmp_path / "training-0", {"activation": {"k": 7}}, finished=False),
    ]


def test_nothing_is_loaded_from_anywhere(sweep: list[Path], tmp_path: Path) -> None:
    page = built(*sweep, to=tmp_path / "report.html")
    assert page.addresses == ["data:,"]  # an empty icon, or the browser asks for one
    assert "iframe" not in page.tags
    styles = (Path(report.__file__).parent / "page.css").read_text()
    assert "url(" not in styles
    assert "@import" not in styles
    [policy] = [given["content"] for given in page.attributes if given.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_plotly_is_in_the_page_once(sweep: list[Path], tmp_path: Path) -> None:
    from plotly.offline import get_plotlyjs

    text = report.build(sweep, tmp_path / "report.html").read_text()
    assert text.count(get_plotlyjs()) == 1
    assert len(text) < 1.1 * len(get_plotlyjs())


def test_the_table_has_the_numbers_of_metrics_json(sweep: list[Path], tmp_path: Path) -> None:
    rows = {row[0][0].split(" | ")[0]: row for row in built(*sweep, to=tmp_path / "report.html").table("run", "L0")[1:]}
    assert set(rows) == {path.name for path in sweep}
    for scale, name in ((1.0, "fast-0"), (1.25, "fast-1"), (2.0, "slow-0"), (1.5, "slow-1")):
        by_key = {column.key: cell for column, cell in zip(columns.COLUMNS, rows[name][1:], strict=True)}
        assert by_key["l0"][1] == 12.5
        assert by_key["kl"][1] == 0.03125 * scale
        assert by_key["fvu"][1] == 0.015625 * scale
        assert by_key["tasks"][1] == 0.8125
        assert by_key["dense"][1] == 7
    text = rows["fast-0"][1 + [column.key for column in columns.COLUMNS].index("fvu")][0]
    assert text == "0.0156 | [0.0125, 0.0187] | own 0.00781 | [0.00750, 0.00810]"


def test_what_was_not_measured_is_blank_and_never_zero(sweep: list[Path], tmp_path: Path) -> None:
    page = built(*sweep, to=tmp_path / "report.html")
    rows = {row[0][0]: row[1:] for row in page.table("run", "L0")[1:]}
    assert all(cell == ("", None) for cell in rows["waiting-0 | finished, not evaluated"])
    assert all(cell == ("", None) for cell in rows["training-0 | unfinished, at step 20"])
    old = dict(zip([column.key for column in columns.COLUMNS], rows["old-0"], strict=True))
    assert old["kl"][1] == 0.125
    assert {key for key, cell in old.items() if cell == ("", None)} >= {"cosine", "bias", "dense", "kl_median", "top5"}
    saved = list(csv.DictReader((tmp_path / "report.csv").read_text().splitlines()))
    assert {row["run"]: row["cosine"] for row in saved}["old-0"] == ""
    assert {row["run"]: row["kl"] for row in saved}["training-0"] == ""


def test_the_csv_reads_back_as_metrics_json(sweep: list[Path], tmp_path: Path) -> None:
    report.build(sweep, tmp_path / "report.html")
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "report.csv").read_text().splitlines())}
    assert len(rows) == len(sweep)
    for directory in sweep[:4]:
        row, metrics = rows[directory.name], json.loads((directory / "eval" / "metrics.json").read_text())
        assert float(row["kl"]) == metrics["replacement"]["kl"]
        assert [float(row["kl_low"]), float(row["kl_high"])] == metrics["ci95"]["replacement"]["kl"]
        assert float(row["fvu_exact"]) == metrics["exact"]["fvu"]["pooled"]
        assert float(row["fvu_exact_high"]) == metrics["exact"]["ci95"]["fvu"]["pooled"][1]
        assert float(row["tasks_exact"]) == metrics["tasks"]["mean"]["exact"]
        assert float(row["l0"]) == metrics["l0"]["total"]
        assert (row["dead_low"], row["dead_high"]) == ("", "")
        assert int(row["parameters"]) == 3 * 33 * 20 + 3 * 33  # thresholds and the mean are not learned
        assert float(row["seconds"]) == pytest.approx(20 * 2e-3)
    assert {name: row["setting:optim.lr"] for name, row in rows.items()}["slow-1"] == "0.001"
    assert "setting:arch.d_features" not in rows["fast-0"]


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    names = ["<b>bold</b>", 'quo"te', "amp&er'sand", "${x} {{ y }}"]
    runs = [make_run(tmp_path / name, {"optim": {"lr": lr}}, measured(lr)) for lr, name in enumerate(names, 1)]
    page = built(*runs, to=tmp_path / "report.html")
    # Four names of which one has a slash: the path is shown from where the runs lie together.
    shown = {row[0][0] for row in page.table("run", "L0")[1:]}
    assert shown == {"<b>bold</b>", *names[1:]}
    assert page.tags["b"] == built(runs[1], *runs[2:], to=tmp_path / "less.html").tags["b"] + _bold_of_a_row(page)
    assert "<b>bold" not in json.dumps(page.figures)
    assert "&lt;b&gt;bold" in json.dumps(page.figures)


def _bold_of_a_row(page: Page) -> int:
    """Numbers in the table of runs are bold, in cost and others not."""
    return sum(value is not None for _, value in page.table("run", "L0")[1][1:])


def test_the_best_of_a_column_is_among_those_that_compare(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "good", {"optim": {"lr": 1.0}}, measured(1.0)),
        make_run(tmp_path / "bad", {"optim": {"lr": 2.0}}, measured(2.0)),
        make_run(tmp_path / "other", {"arch": {"target": "site"}}, measured(0.5, basis="runs the MLP")),
    ]
    text = report.build(runs, tmp_path / "report.html").read_text()
    cells = {
        name: re.findall(r'<td class="number([^"]*)"(?: data-value="([^"]*)")?', row)
        for name, row in re.findall(r'<tr data-run="(\w+)">(.*?)</tr>', text, re.DOTALL)
    }
    at = [column.key for column in columns.COLUMNS].index("kl")
    assert cells["good"][at] == (" best", "0.03125")
    assert cells["bad"][at] == ("", "0.0625")
    assert cells["other"][at] == (" alone", "0.015625")
    assert "other are not of live features" in Page(text).text or "of other are not of live" in Page(text).text


def test_seeds_are_one_recipe_and_ranges_that_meet_are_a_draw(sweep: list[Path], tmp_path: Path) -> None:
    page = built(*sweep, to=tmp_path / "report.html")
    rows = {row[0][0]: row for row in page.table("runs", "seeds")[1:]}
    assert list(rows) == ["fast", "slow", "old", "waiting", "training"]  # by KL, then what has none
    assert rows["fast"][1][1] == 2
    assert rows["fast"][3][1] == 0.03125 * 1.125
    assert rows["fast"][3][0].startswith("0.0352 | ± 0.0055")
    [best] = page.table("L0")[1:]
    assert best[0][0].startswith("12.5 | 3 compared")
    assert best[1][0].startswith("fast 0.0352 ± 0.0055 | ahead of slow by 0.0195, with every seed")
    write_json(sweep[3] / "eval" / "metrics.json", measured(1.125))
    [best] = built(*sweep, to=tmp_path / "report.html").table("L0")[1:]
    assert best[1][0].endswith("less than seeds differ: a draw")


def test_runs_of_other_l0_are_not_compared_with_each_other(tmp_path: Path) -> None:
    few, many = measured(2.0), measured(1.0)
    many["l0"]["total"] = 40.0
    runs = [
        make_run(tmp_path / "few", {"activation": {"k": 4}}, few),
        make_run(tmp_path / "many", {"activation": {"k": 12}}, many),
    ]
    table = built(*runs, to=tmp_path / "report.html").table("L0")
    assert [row[0][0] for row in table[1:]] == ["12.5 | 1 compared", "40.0 | 1 compared"]
    assert [row[1][0].split(" | ")[1] for row in table[1:]] == ["nothing to compare with"] * 2


def test_runs_measured_on_other_text_are_said(tmp_path: Path) -> None:
    other = measured() | {"split": "book/all"}
    runs = [make_run(tmp_path / "a", None, measured()), make_run(tmp_path / "b", {"optim": {"lr": 1}}, other)]
    assert "not all measured on the same text" in built(*runs, to=tmp_path / "report.html").text
    assert "not all measured" not in built(runs[0], to=tmp_path / "one.html").text


def test_only_settings_that_differ_are_in_their_table(sweep: list[Path], tmp_path: Path) -> None:
    page = built(*sweep, to=tmp_path / "report.html")
    [heads, *rows] = page.table("runs", "k")
    assert [head[0] for head in heads] == ["runs", "k", "lr", "seed"]
    assert [cell[0] for cell in rows[1]] == ["slow", "4", "0.001", "0, 1"]


def test_the_worst_contexts_are_shaded_and_escaped(tmp_path: Path) -> None:
    text = report.build([make_run(tmp_path / "a", None, measured())], tmp_path / "report.html").read_text()
    assert "<span>&lt;bos&gt;</span>" in text  # position 0 is not scored
    assert '<span class="k3" title="0.25 nats">The</span>' in text
    assert '<span class="k8" title="2 nats"> &lt;i&gt;cat&lt;/i&gt;</span>' in text


def test_a_run_with_nothing_but_its_settings_has_a_page(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "new", finished=False)
    (directory / "metrics.jsonl").unlink()
    (directory / "timings.jsonl").unlink()
    page = built(directory, to=directory / "report.html")
    assert "nothing logged yet" in page.text
    assert page.figures == {}


def test_a_line_being_written_and_numbers_that_are_none_do_no_harm(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a", finished=False)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "tokens": 3200, "loss": NaN, "fvu": Infinity, "lr": 1}\n{"step": 30, "tok')
    figures = built(directory, to=tmp_path / "report.html").figures
    [loss] = [trace for trace in figures["training"]["data"] if trace["xaxis"] == "x"]
    assert loss["x"] == [640, 1280, 1920, 2560]
    assert "NaN" not in json.dumps(figures)


def test_numbers_in_the_log_that_the_page_does_not_know_are_plotted(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a", finished=False)
    write_lines(directory / "metrics.jsonl", [{"step": 1, "tokens": 8, "loss": 2.0, "held_out/fvu": 0.5, "mood": 3.0}])
    figures = built(directory, to=tmp_path / "report.html").figures
    assert "FVU, held out" in json.dumps(figures["training"]["layout"]["annotations"])
    assert [note["text"] for note in figures["training_rest"]["layout"]["annotations"]] == ["<b>mood</b>"]


def test_a_page_replaces_the_one_before_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_run(tmp_path / "a", None, measured())
    page = report.build([directory], tmp_path / "report.html")
    before = page.read_text()

    def fail(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError):  # noqa: PT011
        report.build([directory], page)
    assert page.read_text() == before


def test_the_page_of_a_run_needs_no_torch_and_no_graph_objects(tmp_path: Path) -> None:
    make_run(tmp_path / "a", None, measured())
    code = (
        "import sys; from pathlib import Path; from pipeline.web import report;"
        "report.build([Path('a')], Path('a/report.html'));"
        "assert not {'torch', 'plotly.graph_objects', 'pandas'} & set(sys.modules)"
    )
    root = Path(report.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, check=True)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no run \(it has no config.yaml\); name"):
        report.build([tmp_path / "empty"], tmp_path / "report.html")
    with pytest.raises(UserError, match="no run to report on; name one"):
        report.build([], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"baseline .* is none of the runs"):
        report.build([make_run(tmp_path / "a")], tmp_path / "report.html", baseline=tmp_path / "b")
    assert not (tmp_path / "report.html").exists()


def test_without_plotly_the_pip_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"pip install 'clt-pipeline\[report\]'"):
        report.build([make_run(tmp_path / "a")], tmp_path / "report.html")
