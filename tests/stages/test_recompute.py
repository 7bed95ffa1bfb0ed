"""`cache.targets=recompute` from the text to the measured run, beside a cache that stores its targets."""

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.data import models
from pipeline.data.cache import Cache
from pipeline.data.commands import overrides_of
from pipeline.data.inventory import State, look
from pipeline.data.options import Targets
from pipeline.errors import UserError
from pipeline.stages import bench_cache, cache_list, cache_verify, evaluate, extract, train
from pipeline.stages import bench_cache_passes as passes
from pipeline.stages.bench_options import BenchCacheConfig

RUN = ["+experiment=batchtopk", "activation.k=4", "arch.d_features=33", "train.n_steps=8", "train.n_tokens=null"]
RUN += ["train.batch_tokens=128", "log.every=1", "train.checkpoint_every=512"]
HALF = "cache.targets=recompute"


@pytest.fixture(scope="module")
def source(tiny_gpt2: Path, english: Path) -> list[str]:
    words = ["model=local", f"model.path={tiny_gpt2}", "dataset=text", f"dataset.path={english}"]
    return [*words, "dataset.context=24", "dataset.n_tokens=3k", "dataset.held_out=20"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source: list[str]) -> Path:
    """A working directory with both caches, the one without targets made last, and a run on each."""
    place = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for targets in ("stored", "recompute"):
            extract.run(compose("extract", [*source, f"cache.targets={targets}"]))
            train.run(compose("train", [*RUN, *source, f"cache.targets={targets}", f"name={targets}"]))
    return place


def caches_by_targets() -> dict[Targets, Cache]:
    found = [Cache.open(path) for path in Path("cache").iterdir() if (path / "zarr.json").exists()]
    return {cache.targets: cache for cache in found}


def lines(run: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", run, name).read_text().splitlines()]


def test_a_run_is_the_one_on_stored_targets_but_for_their_rounding(work: Path) -> None:
    """Errors of the targets change a loss by 2 sqrt(their FVU / the loss's FVU) of it at most (Cauchy-Schwarz); later
    steps start from other weights."""
    off = max(caches_by_targets()[Targets.recompute].attributes["recompute"]["fvu"])
    for step, (one, other) in enumerate(zip(lines("recompute"), lines("stored"), strict=True)):
        bound = 2 * (4 * off / other["fvu"]) ** 0.5  # 4: the stored ones are rounded themselves
        assert bound < 0.1
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3 if step == 0 else bound)
        assert one["fvu"] == pytest.approx(other["fvu"], rel=1e-3 if step == 0 else bound)
    assert lines("recompute")[0]["loss"] != lines("stored")[0]["loss"], "these targets are not rounded"
    config = json.loads(Path("runs/recompute/final/config.json").read_text())
    assert config["cache"]["request"]["targets"] == "recompute"
    assert all(0 < line["targets_ms"] < line["step_ms"] for line in lines("recompute", "timings.jsonl"))
    assert not any("targets_ms" in line for line in lines("stored", "timings.jsonl"))


def test_it_is_measured_like_any_other(work: Path) -> None:
    found = {}
    for run in ("stored", "recompute"):
        found[run] = json.loads(evaluate.run(compose("eval", [f"run={run}"])).read_text())
    assert found["recompute"]["n_tokens"] == 20 * 23
    for key in ("fvu", "replacement"):
        name = "pooled" if key == "fvu" else "kl"
        assert found["recompute"][key][name] == pytest.approx(found["stored"][key][name], rel=0.02)


def test_training_says_what_recomputing_costs_and_takes_the_newest_cache_of_its_kind(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    half, whole = caches_by_targets()[Targets.recompute], caches_by_targets()[Targets.stored]
    train.run(compose("train", [*RUN, "name=newest"]))
    assert f"using the newest cache, {half.path}" in caplog.text
    assert "targets    recomputed from resid_mid: 0.00672 MFLOP a token" in caplog.text
    assert "tokens/s alone" in caplog.text
    assert "% of the training steps" in caplog.text
    assert lines("newest") == lines("recompute")
    shutil.rmtree(whole.path)
    extract.run(compose("extract", [*_words(whole)]))  # now the other one is the newest
    train.run(compose("train", [*RUN, HALF, "name=asked"]))
    assert lines("asked") == lines("recompute")
    train.run(compose("train", [*RUN, "name=other"]))
    assert lines("other") == lines("stored")


def _words(cache: Cache) -> list[str]:
    return shlex.split(overrides_of(cache.request, cache.path.parent))


def test_a_run_that_was_stopped_goes_on_with_its_cache(
    work: Path, monkeypatch: pytest.MonkeyPatch, source: list[str]
) -> None:
    step = train.Trainer.step

    def stop(self: Any, *arguments: Any) -> Any:
        if self.state.step == 5:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(train.Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(compose("train", [*RUN, HALF, "name=again"]))
    monkeypatch.undo()
    monkeypatch.chdir(work)
    whole = caches_by_targets()[Targets.stored]
    shutil.rmtree(whole.path)
    extract.run(compose("extract", source))
    train.run(compose("train", [*RUN, "name=again"]))  # not the newest cache, but its own
    assert lines("again") == lines("recompute")


def test_a_finished_run_loads_no_model(work: Path, monkeypatch: pytest.MonkeyPatch, source: list[str]) -> None:
    def load(options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load", load)
    train.run(compose("train", [*RUN, *source, HALF, "name=recompute"]))


def test_encoders_that_start_at_data_get_their_targets_too(work: Path, source: list[str]) -> None:
    for targets in ("stored", "recompute"):
        words = [*RUN, *source, "arch.init=data", f"cache.targets={targets}", f"name=data-{targets}"]
        train.run(compose("train", words))
    for one, other in zip(lines("data-recompute"), lines("data-stored"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)


def test_what_is_missing_or_changed_is_one_line_and_leaves_nothing(
    work: Path, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = caches_by_targets()[Targets.recompute]
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.models.weights_hash", lambda directory: "0" * 64)
        with pytest.raises(UserError, match=r"other weights of local .* restore those weights, or extract again"):
            train.run(compose("train", [*RUN, HALF, "name=no"]))
    with pytest.raises(UserError, match=r"cache\.codec=int8 with cache\.targets=recompute"):
        train.run(compose("train", [*RUN, *source, HALF, "cache.codec=int8", "name=no"]))
    shutil.rmtree(half.path)
    with pytest.raises(UserError, match=r"does not exist; run: clt extract .* cache\.targets=recompute"):
        train.run(compose("train", [*RUN, *source, HALF, "name=no"]))
    with pytest.raises(UserError, match=r"no finished cache with cache\.targets=recompute under cache/; make one with"):
        train.run(compose("train", [*RUN, HALF, "name=no"]))
    assert not Path("runs/no").exists()


def test_a_dry_run_says_half_the_bytes_and_the_work(
    work: Path, source: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("pipeline.stages.estimate.TIMED_SECONDS", 0.05)
    said = {}
    for targets in ("stored", "recompute"):
        caplog.clear()
        words = [*source, f"cache.targets={targets}", "dataset.seed=1"]
        cfg = compose("extract", words)
        cfg.dry_run = True
        extract.run(cfg)
        said[targets] = {m.split(maxsplit=1)[0]: m.split(maxsplit=1)[1] for m in caplog.messages if " " in m}
    assert said["stored"]["bytes"] == "240 a token as raw"
    assert said["recompute"]["bytes"] == "120 a token as raw"
    assert "targets" not in said["stored"]
    assert "recomputing it takes 0.00672 MFLOP a token" in said["recompute"]["targets"]
    assert "not with cache.targets=recompute" in caplog.text


def test_the_commands_on_caches_know_it(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, runs = Path("cache"), Path("runs")
    half = caches_by_targets()[Targets.recompute]
    rows = {row["name"]: row for row in json.loads(cache_list.ls(root, runs, as_json=True))["caches"]}
    assert sorted(row["targets"] for row in rows.values()) == ["recompute", "stored"]
    assert rows[half.path.name]["runs"] == ["recompute"]
    assert "raw, recompute" in cache_list.ls(root, runs)
    info = cache_list.info(half.path.name, root, runs)
    assert "targets     recomputed from resid_mid by the model's own MLPs, FVU" in info
    assert "120 bytes a token, 1 x 1 shards" in info
    assert "cache.targets=recompute" in info
    line = cache_verify.run([half.path.name], root, against_model=True, device="cpu")
    assert "checksums are right" in line
    assert "recomputed mlp_out has FVU" in line
    (half.path / "zarr.json").write_text("{")
    found = look(half.path)
    assert found is not None
    assert found.state is State.damaged


def test_a_run_without_a_checkpoint_uses_the_cache_of_its_kind(work: Path) -> None:
    for run in ("stored", "recompute"):
        shutil.rmtree(Path("runs", run, "final"))
        shutil.rmtree(Path("runs", run, "checkpoints"))
    rows = json.loads(cache_list.ls(Path("cache"), Path("runs"), as_json=True))["caches"]
    assert {row["targets"]: row["runs"] for row in rows} == {"stored": ["stored"], "recompute": ["recompute"]}


def test_the_bench_writes_and_reads_rows_without_targets(tmp_path: Path) -> None:
    words = ["bench.mb=1", "bench.n_layers=3", "bench.d_model=20", "bench.batch_tokens=300", "cache.shard_mb=0.1"]
    found = {}
    for targets in Targets:
        cfg = compose("bench_cache", [*words, f"cache.targets={targets}"])
        assert isinstance(cfg, BenchCacheConfig)
        plan = passes.plan_of(cfg, tmp_path / targets, 10)
        passes.write(plan, passes.random_rows(1000, 3, 20))
        assert Cache.open(plan.path).targets is targets
        reading = passes.reading(plan.path, 300)
        assert min(reading["hot bare"](), reading["hot mmap 1"](), reading["hot readinto 2"]()) > 0
        found[targets] = bench_cache.row_bytes_of(cfg)
    assert found == {Targets.stored: 240, Targets.recompute: 120}
