"""`clt circuits` on graphs that lie in a folder."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Request, compose, launch
from pipeline.errors import UserError
from pipeline.interp.circuits import graph, recurring
from pipeline.stages import circuits
from tests.interp.graphs import random_graph


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four graphs of one run, and what else clt graph leaves there."""
    place = tmp_path / "runs" / "mine" / "graphs"
    for seed in range(4):
        made = random_graph(seed, features=25)
        graph.save(replace(made, meta={**made.meta, "run": "runs/mine"}), place / f"g{seed}.safetensors")
    (place / "g0.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return place


def test_what_recurs_is_shown_and_written_as_json_and_csv(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        words = ("graphs=runs/mine/graphs", "circuits.least=3", "circuits.n=2", "to=out/common.json")
        assert launch("circuits", Request(overrides=words)) == 0
    files = sorted(folder.glob("*.safetensors"))
    expected = recurring.as_plain(recurring.recurring(map(graph.load, files), least=3))
    assert json.loads(Path("out/common.json").read_text()) == {**expected, "graphs": [file.name for file in files]}
    assert len(expected["features"]) > 2
    for part in ("features", "edges"):
        rows = list(csv.DictReader(Path(f"out/common-{part}.csv").read_text().splitlines()))
        assert rows == [{key: str(value) for key, value in row.items()} for row in expected[part]]
    lines = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith(expected["features"][0]["feature"]) for line in lines) >= 1
    assert not [line for line in lines if line.startswith(expected["features"][2]["feature"] + " ")]
    assert lines[-1] == "out/common.json, and two CSV files beside it"


def test_the_files_lie_with_the_graphs_by_default(folder: Path) -> None:
    assert circuits.run(compose("circuits", ["graphs=runs/mine/graphs"])) == Path("runs/mine/graphs/circuits.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["graphs=nowhere"], "nowhere has no graphs; make some with clt graph"),
        (["graphs=runs/mine/graphs", "to=a.txt"], r"to=a\.txt does not end in \.json"),
        (["graphs=runs/mine/graphs", "circuits.least=0"], r"circuits\.least=0 must be 1 or more"),
        (["graphs=runs/mine/graphs", "circuits.edges=2"], "share of 2.0 of its edges"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(folder: Path, words: list[str], message: str) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        circuits.run(compose("circuits", words))
    assert sorted(folder.iterdir()) == before
