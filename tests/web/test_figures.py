"""Plots: valid for Plotly, each in its place, readable by whoever cannot tell red from green."""

import json
from pathlib import Path

import pytest

from pipeline.web import report
from pipeline.web.panels import PALETTE, Panel, grid, line
from pipeline.web.report import Report, compose
from tests.web.made import make_run, measured, measured_before, write_lines


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two recipes, one with two seeds, and an older run."""
    place = tmp_path_factory.mktemp("runs")
    return compose([
        make_run(place / "a-0", None, measured(1.0)),
        make_run(place / "a-1", {"train": {"seed": 1}}, measured(3.0)),
        make_run(place / "b-0", {"activation": {"name": "relu"}, "arch": {"name": "tied"}}, measured(4.0)),
        make_run(place / "old-0", {"activation": {"k": 9}}, measured_before(8.0)),
    ])  # fmt: skip


def test_plotly_takes_every_figure(made: Report) -> None:
    import plotly.graph_objects as go

    assert set(made.figures) >= {
        "ranking", "pareto", "training", "training_rest", "by_layer", "replacement", "by_position", "histograms",
        "speed", "detail0",
    }  # fmt: skip
    for figure in made.figures.values():
        go.Figure(json.loads(json.dumps(figure)))  # raises ValueError for a property that it does not know


def test_panels_do_not_overlap(made: Report) -> None:
    for name, figure in made.figures.items():
        layout = figure["layout"]
        numbers = [key.removeprefix("xaxis") for key in layout if key.startswith("xaxis")]
        boxes = [(*layout[f"xaxis{n}"]["domain"], *layout[f"yaxis{n}"]["domain"]) for n in numbers]
        assert all(0 <= low < high <= 1.0001 for box in boxes for low, high in (box[:2], box[2:])), name
        for i, (left, right, low, high) in enumerate(boxes):
            for other_left, other_right, other_low, other_high in boxes[:i]:
                beside = right <= other_left or other_right <= left
                assert beside or high <= other_low or other_high <= low, name


def test_every_axis_says_what_it_shows(made: Report) -> None:
    for name, figure in made.figures.items():
        for key, axis in figure["layout"].items():
            if key.startswith("xaxis") or (key.startswith("yaxis") and name != "ranking"):
                assert axis["title"]["text"], (name, key)


def test_a_recipe_is_in_the_legend_once_and_has_one_colour(made: Report) -> None:
    for name in ("training", "by_layer", "replacement", "histograms"):
        traces = made.figures[name]["data"]
        listed = [trace["name"] for trace in traces if trace["showlegend"]]
        assert len(listed) == len(set(listed)), name
        for label in listed:
            assert len({trace["line"]["color"] for trace in traces if trace["name"] == label}) == 1


def test_curves_by_layer_are_means_over_seeds(made: Report) -> None:
    figure = made.figures["by_layer"]
    titles = [note["text"] for note in figure["layout"]["annotations"]]
    axis = f"x{titles.index('<b>FVU</b>') + 1}"
    curves = {trace["name"]: trace["y"] for trace in figure["data"] if trace["xaxis"] == axis}
    assert curves["a"] == pytest.approx([0.02, 0.04, 0.06])
    assert curves["b"] == pytest.approx([0.04, 0.08, 0.12])


def test_what_is_missing_is_left_out_of_a_plot(made: Report) -> None:
    names = {trace["name"] for trace in made.figures["by_position"]["data"]}
    assert names == {"a", "b"}  # the older run has no KL by position
    assert all(trace["y"][3] is None for trace in made.figures["by_position"]["data"])


def test_a_histogram_is_of_shares_and_empty_ends_are_cut(made: Report) -> None:
    [density] = [t for t in made.figures["histograms"]["data"] if t["xaxis"] == "x" and t["name"] == "b"]
    assert density["x"] == [-2.5, -1.5, -0.5]
    assert density["y"] == pytest.approx([14 / 93, 49 / 93, 30 / 93])


def test_the_dotted_line_joins_what_no_run_beats(tmp_path: Path) -> None:
    points = [(10.0, 4.0), (12.0, 5.0), (14.0, 2.0), (9.0, 6.0), (20.0, 3.0)]
    runs = []
    for number, (l0, scale) in enumerate(points):
        metrics = measured(scale)
        metrics["l0"]["total"] = l0
        runs.append(make_run(tmp_path / str(number), {"optim": {"lr": float(number)}}, metrics))
    figure = compose(runs).figures["pareto"]
    front = next(trace for trace in figure["data"] if trace["mode"] == "lines" and trace["xaxis"] == "x")
    assert list(zip(front["x"], front["y"], strict=True)) == [(9.0, 0.1875), (10.0, 0.125), (14.0, 0.0625)]


def test_more_recipes_than_colours_differ_in_their_dashes() -> None:
    looks = [line([0], [1], "x", index)["line"] for index in range(3 * len(PALETTE))]
    assert len({(look["color"], look["dash"]) for look in looks}) == len(looks)


def test_a_figure_is_as_high_as_its_legend() -> None:
    traces = [line([0, 1], [1, 2], f"recipe {n}", n) for n in range(40)]
    assert grid([Panel("p", "x", "y", traces)], columns=1)["layout"]["height"] > 40 * 19


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "a", finished=False)
    write_lines(directory / "metrics.jsonl", [{"step": n, "tokens": n, "loss": 1.0 + n} for n in range(1, 10_001)])
    report.build([directory], tmp_path / "report.html")
    loss = compose([directory]).figures["training"]["data"][0]
    assert 500 < len(loss["x"]) < 1300
    assert loss["x"][-1] == 10_000
