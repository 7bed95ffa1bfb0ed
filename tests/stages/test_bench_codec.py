"""The bench of int8 on heavy tails: its figures are what they are called, and nothing is hidden."""

import json
import logging
from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.stages import bench_codec
from pipeline.stages.bench_options import BenchCodecConfig

TINY = ["bench.rows=30000", "bench.sample=2000"]


def composed(*words: str) -> BenchCodecConfig:
    cfg = compose("bench_codec", [*TINY, *words])
    assert isinstance(cfg, BenchCodecConfig)
    return cfg


def test_it_prints_a_row_for_each_channel_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    file = bench_codec.run(composed())
    assert file == Path("bench/codec.json")
    report = json.loads(file.read_text())
    assert list(report) == ["normal", "Student t, 3 df", "Student t, 2 df", *bench_codec.OUTLIERS]
    for name, row in report.items():
        line = next(line for line in caplog.messages if line.startswith(name))
        assert line.endswith("above the warning") == (row["fitted"] > 1e-2)


@pytest.mark.parametrize("seed", range(4))
def test_a_channel_loses_no_more_than_half_a_step_and_what_is_clipped(seed: int) -> None:
    """Whatever its tail: the two parts of the error, each by its own figure."""
    report = bench_codec.measure(composed(f"bench.seed={seed}").bench)
    for row in report.values():
        assert row["lost"] <= row["fitted"] <= row["bound"] + row["lost"]
        assert (row["clipped"] == 0) == (row["lost"] == 0)
    assert report["normal"]["fitted"] < 2e-4
    assert report["normal"]["fitted"] < report["normal"]["99.9 %"]
    for name in bench_codec.OUTLIERS:  # a percentile throws outliers away; they are most of the variance
        assert report[name]["fitted"] <= report[name]["99.9 %"] * 1.01


def test_fitted_is_never_worse_than_absmax_on_what_it_was_fitted_to() -> None:
    report = bench_codec.measure(composed("bench.rows=2000").bench)
    for row in report.values():
        assert row["fitted"] <= row["absmax"] * 1.001
        assert row["fitted"] <= row["bound"] + row["lost"]


@pytest.mark.parametrize("word", ["bench.sample=1", "bench.sample=30001"])
def test_what_measures_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"fitted to some of bench\.rows=30000; use 2 to that many"):
        bench_codec.run(composed(word))
    assert not list(tmp_path.iterdir())
