"""Faithfulness and world truth on the page, where they were measured."""

from pathlib import Path

from pipeline.web import report
from tests.web.made import Tree, make_run, measured
from tests.web.reading import Page


def faithful() -> Tree:
    shares = {"of_source": [[0.5, 0.25, 0.25], [0.0, 0.75, 0.25], [0.0, 0.0, 1.0]],
              "of_target": [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]],
              "own": 0.75, "by_distance": [0.75, 0.1875, 0.0625]}  # fmt: skip
    agreement = {"cosine": 0.875, "slope": 0.8125, "shuffled": 0.03125}
    interventions = dict.fromkeys(("replacement", "with_errors", "mediated", "mlps_frozen"), agreement)
    swap = {name: {"follows": 0.625, "keeps": 0.125} for name in ("features", "all_features", "replacement")}
    return {
        "faithfulness": {"decoder_mass": {"decoders": shares, "written": shares}, "interventions": interventions},
        "world": {"country_swap": {"capital": {"n": 240, **swap}}, "purity": {"mean": 0.375, "pure": 3}},
        "ci95": {"world": {"country_swap": {"capital": {"features": {"follows": [0.5, 0.75]}}}}},
    }


def test_what_was_measured_has_a_table_and_what_was_not_none(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", None, measured() | faithful()),
        make_run(tmp_path / "b", {"optim": {"lr": 1.0}}, measured(2.0)),
    ]
    page = Page(report.build(runs, tmp_path / "report.html").read_text())
    [_, swap] = page.table("run", "country features")
    assert [value for _, value in swap[1:]] == [0.625, 0.625, None, None, 0.625]
    assert swap[1][0] == "0.625 | [0.500, 0.750]"
    [_, removed] = page.table("run", "cosine")
    assert [value for _, value in removed[1:]] == [0.875] * 4 + [0.8125] * 2 + [0.03125]
    [_, pure] = page.table("run", "mean share of its activation on the country")
    assert pure[2] == ("3", 3.0)
    mass = page.figures["decoder_mass"]["data"]
    assert [trace["y"] for trace in mass] == [[0.75, 0.1875, 0.0625], [0.5, 0.75, 1.0], [1.0, 0.5, 0.5]]
    without = Page(report.build(runs[1:], tmp_path / "report.html").read_text())
    assert "faithfulness" not in without.ids
    assert "decoder_mass" not in without.figures
