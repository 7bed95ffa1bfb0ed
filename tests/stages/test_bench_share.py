"""The bench times what it says, leaves its figures and nothing else, and its throttle is one."""

import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.errors import UserError
from pipeline.stages import bench_share
from pipeline.stages.bench_options import BenchShareConfig
from pipeline.stages.bench_train_loop import scratch
from pipeline.stages.bench_train_shapes import Shape

TINY = ["bench.mb=1", "bench.n_layers=3", "bench.d_model=20", "bench.batch_tokens=300", "bench.runs=3"]
TINY += ["bench.d_features=7", "bench.k=2", "bench.throttle_mb=50", "cache.shard_mb=0.2"]


def composed(*words: str) -> BenchShareConfig:
    cfg = compose("bench_share", [*TINY, *words])
    assert isinstance(cfg, BenchShareConfig)
    return cfg


@pytest.mark.slow
def test_it_prints_ratios_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    file = bench_share.run(composed())
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"bench", "bench/share.json"}
    report = json.loads(file.read_text())
    assert set(report["shared_over_separate"]) == {"local", "throttled"}
    for ratio in report["shared_over_separate"].values():
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert report["steps"] >= 2**20 // (300 * 240)
    assert report["seconds"]["throttled reading"] >= report["steps"] * 300 * 240 / 50e6 / 2
    for what in (
        "3 runs of ",
        "over separate",
        "throttled",
        "to read at 50 MB/s",
        "a core to itself",
        "next: clt train -m",
    ):
        assert what in caplog.text


def test_what_is_throttled_takes_its_time_and_gives_the_same_rows(tmp_path: Path) -> None:
    shape = Shape(3, 20, 7, 300, 2)
    scratch(composed().cache, shape, tmp_path / "cache", 10)
    shards = Cache.open(tmp_path / "cache").shards()
    slow, fast = (bench_share._open(tmp_path / "cache", rate) for rate in (1e6, None))
    start = time.perf_counter()
    [rows] = slow.bring(shards[0], "resid_mid", slow.buffer("resid_mid"))
    assert time.perf_counter() - start >= slow.specs["resid_mid"].file_bytes / 1e6
    [same] = fast.bring(shards[0], "resid_mid", fast.buffer("resid_mid"))
    assert np.array_equal(rows.rows, same.rows)


def test_what_it_expects_follows_from_the_slower_of_reading_and_computing() -> None:
    computed = {"throttled separate": 8.0, "throttled shared": 6.0}  # 1 and 6 / 8 a run
    assert bench_share._expected(computed, 2.0, 8) == pytest.approx(6 / (8 * 2))
    assert bench_share._expected(computed, 0.5, 8) == pytest.approx(6 / 8)
    assert bench_share._expected(computed, 10.0, 8) == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench.runs=0"], "must be 1 or more"),
        (["bench.rounds=2"], r"bench\.rounds >= 3"),
        (["bench.throttle_mb=0"], r"bench\.throttle_mb > 0"),
        (["bench.batch_tokens=4000"], "holds 1 batches"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench_share.run(composed(*words))
    assert list(tmp_path.iterdir()) == []
