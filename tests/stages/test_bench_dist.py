"""What several processes cost: refusals, turns and the table; whole worlds in the slow tests."""

import json
import logging
import subprocess
import sys
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.dist import mesh
from pipeline.errors import UserError
from pipeline.plain import to_plain
from pipeline.stages import bench_dist, bench_dist_rank
from pipeline.stages.bench_train_shapes import SHAPES, Shape
from pipeline.stages.plan_options import BenchDistConfig


def composed(*words: str) -> BenchDistConfig:
    cfg = compose("bench_dist", list(words))
    assert isinstance(cfg, BenchDistConfig)
    return cfg


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench.shape=Z"], "bench.shape=Z does not exist; choose from A, B"),
        (["bench.pairs=2"], r"bench\.pairs >= 3"),
        (["bench.steps=0"], r"bench\.steps, bench\.threads, bench\.mb >= 1"),
        (["bench.ranks=[1]"], "give numbers from 2 on"),
    ],
)
def test_what_measures_nothing_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        bench_dist.run(composed(*words, f"to={tmp_path / 'dist.json'}"))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_alone_takes_steps_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", Shape(3, 6, 29, 22, 3))
    rank = bench_dist_rank.Rank(mesh.alone(), {"shape": "tiny", "activation": to_plain(composed().activation)})
    assert min(rank.steps(3)) > 0
    assert rank.trainer.state.step == 3
    assert rank.wire() == {}


class Asked:
    """In place of a world: says when it was asked, and answers as long as it is told to."""

    def __init__(self, name: str, log: list[str], seconds: float) -> None:
        self.name, self.log, self.time = name, log, bench_dist.Spent(seconds, seconds)

    def seconds(self, n_steps: int) -> bench_dist.Spent:
        self.log.append(self.name)
        return self.time


def test_plain_and_torchrun_take_turns_and_the_first_pair_does_not_count() -> None:
    log: list[str] = []
    pairs = bench_dist._turns(Asked("plain", log, 2.0), Asked("other", log, 3.0), 3, 5)  # type: ignore[arg-type]
    assert log == ["plain", "other", "other", "plain", "plain", "other", "other", "plain"]
    assert [(own.wall, theirs.wall) for own, theirs in pairs] == [(2.0, 3.0)] * 3


def test_a_world_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; sys.exit('no such network')"]
    (tmp_path / "errors").touch()
    with Listener(str(tmp_path / "ranks"), "AF_UNIX") as listener, (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(words, stderr=errors)
        with pytest.raises(UserError, match="2 processes did not start: no such network"):
            bench_dist._connected(listener, 2, process, tmp_path / "errors")


@pytest.mark.slow
def test_it_measures_worlds_and_writes_what_a_plan_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = bench_dist.run(composed("bench.pairs=3", "bench.steps=1", "bench.mb=1", f"to={tmp_path / 'dist.json'}"))
    report: dict[str, Any] = json.loads(file.read_text())
    assert list(report["worlds"]) == ["plain", "torchrun 1", "features 2", "data 2"]
    assert report["overhead"]["q1"] <= report["overhead"]["median"] <= report["overhead"]["q3"]
    assert abs(report["overhead_computed"]["median"]) < 0.5
    sent = {name: world["sent"] for name, world in report["worlds"].items()}
    assert sent["plain"] == sent["torchrun 1"] == {}
    L, D, B = 4, 128, 1024
    assert sent["features 2"]["reconstruction"] == [1, 4 * B * L * D]  # 2 n (P - 1) / P with P = 2
    assert {"gradient terms", "fired", "scalars"} <= sent["data 2"].keys()
    assert report["link"]["bytes_per_s"] > 0
    for words in ("torchrun over plain, time computed: ", "link between 2 ranks here", "next: clt plan plan.links="):
        assert words in caplog.text
