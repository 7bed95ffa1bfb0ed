"""The bench times what it says, on the same tokens, and leaves its figures and nothing else."""

import json
import logging
from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.stages import bench_extract
from pipeline.stages.bench_options import BenchExtractConfig


def composed(*words: str) -> BenchExtractConfig:
    cfg = compose("bench_extract", words)
    assert isinstance(cfg, BenchExtractConfig)
    return cfg


def test_it_prints_ratios_and_writes_them(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    words = ["model=local", f"model.path={tiny_gpt2}", "model.device=cpu", "bench.rounds=4", "bench.batches=2"]
    file = bench_extract.run(composed(*words, "bench.batch_tokens=60", "bench.context=20"))
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["bench", "bench/extract.json"]
    report = json.loads(file.read_text())
    assert (report["model"], report["shape"], report["rounds"]) == ("local", {"n_layers": 3, "d_model": 20}, 4)
    assert set(report["tokens_per_s"]) == {"body", "read", "write"}
    for ratio in report["time_over_body"].values():
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert report["bottleneck"] in report["seconds_a_round"]
    assert report["seconds_a_round"][report["bottleneck"]] == max(report["seconds_a_round"].values())
    for what in (
        "time over body",
        "bottleneck: ",
        "60 tokens a batch in contexts of 20, 4 rounds",
        "next: clt extract",
    ):
        assert what in caplog.text


def test_the_slowest_part_is_called_the_bottleneck(tmp_path: Path) -> None:
    seconds = {"body": [1.0] * 4, "read": [1.1] * 4, "write": [5.0] * 4, "statistics": [0.2] * 4}
    seconds |= {"scatter": [0.3] * 4, "sync": [0.0, 12.0, 0.0, 0.0]}
    model = type("Model", (), {"name": "m", "n_layers": 2, "d_model": 3, "attention": "sdpa"})()
    model.dtype, model.device = "torch.float32", type("Device", (), {"type": "cpu", "__str__": lambda self: "cpu"})()
    report = bench_extract._report(composed("bench.rounds=4"), model, seconds, n_tokens=100)
    assert report["bottleneck"] == "waiting for the disk"
    assert report["tokens_per_s"] == {"body": 100, "read": 100 / 1.1, "write": 20}
    assert report["time_over_body"]["write"] == {"median": 5, "q1": 5, "q3": 5, "all_rounds": 5}  # type: ignore[index]


def test_sizes_that_measure_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("bench.rounds=2", "bench.batches=0", "bench.batch_tokens=100"):
        with pytest.raises(UserError, match="are needed"):
            bench_extract.run(composed("model=world", word))
    assert not list(tmp_path.iterdir())
