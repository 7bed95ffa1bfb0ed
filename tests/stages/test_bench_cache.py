"""The bench reads and writes what it says, compares it with the disk, and leaves its figures and nothing else."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.errors import UserError
from pipeline.stages import bench_cache
from pipeline.stages import bench_cache_passes as passes
from pipeline.stages.bench_options import BenchCacheConfig

TINY = ["bench.mb=1", "bench.n_layers=3", "bench.d_model=20", "bench.batch_tokens=300", "bench.rounds=3"]
ROW = 3 * 20 * 4


def composed(*words: str) -> BenchCacheConfig:
    cfg = compose("bench_cache", [*TINY, "cache.shard_mb=0.2", *words])
    assert isinstance(cfg, BenchCacheConfig)
    return cfg


@pytest.mark.slow
def test_it_prints_ratios_and_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/timings.jsonl").write_text("".join(f'{{"tokens_per_s": {n}}}\n' for n in (1.0, 50.0, 9.0)))
    file = bench_cache.run(composed("run=trained"))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"trained", "trained/timings.jsonl", "bench", "bench/cache.json"}
    report = json.loads(file.read_text())
    ways = {f"{heat} {read} {n}" for heat in ("hot", "cold") for read in ("mmap", "readinto") for n in (1, 2, 4)}
    assert set(report["over_bare"]) == ways | {"write cache"}
    assert set(report["bytes_per_s"]) == ways | {"write cache", "hot bare", "cold bare", "write bare"}
    for ratio in report["over_bare"].values():
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert report["row_bytes"] == ROW
    assert report["shape"]["rows"] == (2**20 // ROW) // 127 * 127
    assert report["trainer_tokens_per_s"] == 9
    for what in ("over bare", "cold mmap 4", "memory, 4 ahead: ", "the trainer takes 9 rows/s", "next: clt train"):
        assert what in caplog.text


def test_the_ratio_is_of_speeds_and_of_neighbours_in_time() -> None:
    ratio = bench_cache._ratio([10.0, 20.0, 60.0], [10.0, 10.0, 20.0])
    assert ratio["median"] == 2
    assert ratio["all_rounds"] == pytest.approx((1 / 10 + 1 / 10 + 1 / 20) / (1 / 10 + 1 / 20 + 1 / 60))
    calls: list[str] = []
    rates, base = bench_cache._time(
        {name: lambda name=name: calls.append(name) or len(calls) for name in ("hot bare", "hot a", "hot b")}, 3
    )
    assert calls[::2] == ["hot bare"] * 6
    assert sorted(calls[1::2]) == ["hot a"] * 3 + ["hot b"] * 3
    assert [b + 1 for b in base["hot a"]] == rates["hot a"]


def test_what_is_read_and_written_is_a_whole_cache(tmp_path: Path) -> None:
    plan = passes.plan_of(composed("cache.shard_mb=0.1"), tmp_path / "cache", 10)
    rows = passes.random_rows(1000, 3, 20)
    passes.write(plan, rows)
    cache = Cache.open(plan.path)
    context, position, _ = cache.locate(np.arange(1270))
    t = 127 * context + position - 1
    stored = np.concatenate([cache.map_chunk("mlp_out", shard.chunk) for shard in cache.shards()])
    assert len(cache.shards()) > 1
    assert (stored == rows.mlp_out.view(torch.uint16).numpy()[t % 1000]).all()


def test_memory_is_that_of_the_buffers(tmp_path: Path) -> None:
    plan = passes.plan_of(composed("bench.mb=8", "bench.d_model=200"), tmp_path / "cache", 30)
    passes.write(plan, passes.random_rows(1000, 3, 200))
    found = passes.memory(plan.path, 300, ahead=2)
    assert found["buffers"] == 3 * 300 * (3 * 200 * 4 + 8) + 3 * 2 * plan.specs["mlp_out"].chunk_bytes
    assert 0 < found["measured"] <= found["buffers"] + bench_cache.ALLOWANCE


@pytest.mark.parametrize("word", ["bench.rounds=2", "bench.mb=0", "bench.batch_tokens=1000000", "run=nowhere"])
def test_what_measures_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"; (mend|use|name) "):
        bench_cache.run(composed(word))
    assert not list(tmp_path.iterdir())
