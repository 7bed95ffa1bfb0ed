"""Merged caches in the commands: made, listed, verified, removed; trained on and measured with."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.stages import cache_convert, cache_list, cache_merge, cache_remove, cache_verify, evaluate, extract, train
from pipeline.stages.options import ExtractConfig, TrainConfig
from tests.data import fake
from tests.data.fake import stored_files

SHORT = ["+experiment=batchtopk", "activation.k=4", "arch.d_features=33", "train.n_steps=12", "train.n_tokens=null"]
SHORT += ["train.batch_tokens=128", "log.every=5", "train.checkpoint_every=640"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory: two parts of other seeds (their texts differ), not merged."""
    root = tmp_path_factory.mktemp("made") / "cache"
    for seed in (1, 2):
        fake.extract(root, packed=fake.pack(seed), seed=seed)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def parts(root: Path) -> list[Path]:
    return sorted(file.parent for file in root.glob("*/zarr.json"))


@pytest.fixture
def path(root: Path, parts: list[Path]) -> Path:
    return Path(cache_merge.run([parts[0].name, parts[1].name[-12:]], root))


def listed(root: Path, runs: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(cache_list.ls(root, runs, as_json=True))["caches"]}


def test_merging_says_what_there_is_and_how_to_train_on_it(
    root: Path, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = cache_merge.run([part.name for part in parts], root)
    assert f"{path}: 488 rows (244 + 244)" in caplog.text
    assert f"next: clt train +experiment=batchtopk_across cache.path={Path(path).name} cache.dir={root}" in caplog.text
    with pytest.raises(UserError, match=f"no cache nothing under {root}/"):
        cache_merge.run([parts[0].name, "nothing"], root)


def test_ls_shows_it_as_merged_with_all_tokens_and_bytes_of_its_own(
    path: Path, root: Path, runs: Path, parts: list[Path]
) -> None:
    row = listed(root, runs)[path.name]
    assert (row["dataset"], row["n_tokens"], row["codec"], row["state"]) == ("merged of 2", 488, "raw", "complete")
    assert row["parts"] == [str(part) for part in parts]
    own = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert own <= row["n_bytes"] < 3 * own + 400 * 4096
    assert "merged of 2" in cache_list.ls(root, runs)


def test_info_lists_the_parts_and_of_a_part_what_it_is_part_of(
    path: Path, root: Path, runs: Path, parts: list[Path]
) -> None:
    said = cache_list.info(None, root, runs)
    for what in (
        f"{path}: complete, made 20",
        "data set    merged of 2; clt cache info PART says what each holds",
        f"part 0      {parts[0]}: 244 rows",
        f"part 1      {parts[1]}: 244 rows",
        "rows        train 488, calibration 48, evaluation 36",
        "storage     raw, in the parts, read in 10 groups of rows of all of them",
        f"command     clt cache merge {parts[0].name} {parts[1].name} --cache-dir {root}",
        "rms, layer",
    ):
        assert what in said
    about = json.loads(cache_list.info(path.name, root, runs, as_json=True))
    assert [part["path"] for part in about["parts"]] == [str(part) for part in parts]
    assert f"part of     {path}" in cache_list.info(parts[1].name, root, runs)


def test_verify_reads_its_own_files_and_its_parts_once_each(
    path: Path, root: Path, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    for names in ([path.name], []):
        lines = cache_verify.run(names, root).splitlines()
        assert sorted(line.split(": all ")[0] for line in lines) == sorted(map(str, [path, *parts]))
    for harmed in (path / "stats/mlp_in/rms/c/0", parts[1] / "resid_mid/c/2/0/0"):
        before = harmed.read_bytes()
        harmed.write_bytes(bytes([before[0] ^ 1]) + before[1:])
        caplog.clear()
        with pytest.raises(UserError, match=f"{harmed.relative_to(root).parts[0]} did not pass|1 of 3 caches did not"):
            cache_verify.run([path.name], root)
        assert "does not hold what was written" in caplog.text
        assert f"rm {harmed} && clt " in caplog.text
        harmed.write_bytes(before)


def test_verify_names_a_part_that_is_missing(
    path: Path, root: Path, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(parts[0])
    with pytest.raises(UserError, match="1 of 2 caches did not pass"):
        cache_verify.run([path.name], root)
    assert f"its part {parts[0]} is missing; make it again: clt extract" in caplog.text


def test_a_part_is_removed_by_force_or_with_what_needs_it(
    path: Path, root: Path, runs: Path, parts: list[Path]
) -> None:
    with pytest.raises(UserError, match=f"{parts[0]} is a part of {path}, which cannot be read without it; --force"):
        cache_remove.rm([parts[0].name], root, runs)
    assert listed(root, runs)[path.name]["state"] == "complete"
    cache_remove.rm([parts[0].name], root, runs, force=True)
    row = listed(root, runs)[path.name]
    assert row["state"] == "damaged"
    assert row["detail"].startswith(f"its part {parts[0]} is missing; make it again: clt extract")
    cache_remove.rm([parts[1].name, path.name], root, runs)
    assert list(root.iterdir()) == []


def test_removing_a_merged_cache_leaves_its_parts(path: Path, root: Path, runs: Path, parts: list[Path]) -> None:
    before = [stored_files(part) for part in parts]
    cache_remove.rm([path.name], root, runs)
    assert sorted(root.iterdir()) == parts
    assert [stored_files(part) for part in parts] == before


def test_prune_keeps_a_part_that_is_being_mended(
    path: Path, root: Path, runs: Path, parts: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (parts[0] / "mlp_out/c/1/0/0").unlink()

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.extract(root, packed=fake.pack(1), seed=int(seed_of(parts[0])), after_block=stop)
    cache_remove.prune(root, runs, yes=True)
    assert f"kept {parts[0]}: it is used by {path}" in caplog.text
    assert parts[0].exists()


def seed_of(part: Path) -> int:
    return int(json.loads((part / "zarr.json").read_bytes())["attributes"]["seed"])


def test_a_run_that_has_begun_uses_the_cache_that_its_settings_name(
    path: Path, root: Path, runs: Path, parts: list[Path]
) -> None:
    request = Cache.open(path).request
    for name, named in (("on-all", path.name), ("on-part", None)):
        (runs / name).mkdir()
        settings = {"model": request["model"], "dataset": request["dataset"], "cache": {"codec": "raw", "path": named}}
        (runs / name / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = listed(root, runs)
    assert rows[path.name]["runs"] == ["on-all"]
    assert rows[parts[0].name]["runs"] == ["on-part"]


def test_a_merged_cache_is_not_converted(path: Path, root: Path, parts: list[Path]) -> None:
    match = f"{path} is merged and has no rows of its own; convert its parts and merge those: {parts[0]}, {parts[1]}"
    with pytest.raises(UserError, match=match):
        cache_convert.run(path.name, "codec=int8", root)
    int8 = [cache_convert.run(part.name, "codec=int8", root) for part in parts]
    merged = Cache.open(Path(cache_merge.run(int8, root)))
    assert str(merged.codec) == merged.request["codec"] == "int8"
    assert merged.path != path


def test_only_training_takes_a_path() -> None:
    for stage in ("extract", "eval", "bench_cache"):
        with pytest.raises(UserError, match=r"cache\.path names what clt train reads, not clt .*; leave it out"):
            compose(stage, ["cache.path=x"])
    config = compose("train", ["cache.path=a,b=c"])
    assert isinstance(config, TrainConfig)
    assert config.cache.path == "a,b=c"
    assert config.newest_cache


@pytest.fixture(scope="module")
def source(tiny_gpt2: Path, english: Path) -> list[str]:
    named = ["model=local", f"model.path={tiny_gpt2}", "dataset=text", f"dataset.path={english}"]
    return [*named, "dataset.context=24", "dataset.held_out=20"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, source: list[str]) -> Path:
    """A working directory with the whole text, two parts that follow each other, both merged, and a run on that."""
    place = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        extracted("dataset.n_tokens=2990", *source)
        first, second = (extracted(f"dataset.n_tokens={n}", f"dataset.skip_tokens={skip}", *source)
                         for n, skip in ((1840, 0), (1150, 1840)))  # fmt: skip
        path = Path(cache_merge.run([first.name, second.name], Path("cache")))
        path.rename(path.with_name("all"))
        assert cache_merge.run([first.name, second.name], Path("cache")) == "cache/all"
        train.run(trained("name=a"))
    return place


def extracted(*words: str) -> Path:
    config = compose("extract", words)
    assert isinstance(config, ExtractConfig)
    return extract.run(config)


def trained(*words: str) -> TrainConfig:
    config = compose("train", [*SHORT, *words])
    assert isinstance(config, TrainConfig)
    return config


@pytest.fixture
def there(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.slow
def test_parts_of_a_text_make_the_rows_of_the_whole(there: None) -> None:
    merged = Cache.open(Path("cache/all"))
    others = [Cache.open(file.parent) for file in Path("cache").glob("*/zarr.json") if file.parent.name != "all"]
    whole = max(others, key=lambda cache: cache.n_rows)
    assert np.array_equal(merged.tokens, whole.tokens)
    for split in (Split.calibration, Split.evaluation):
        assert np.array_equal(merged.held_out(split)[0], whole.held_out(split)[0])
    for mine, theirs in zip(merged.stats("mlp_in"), whole.stats("mlp_in"), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-4)  # batches of other shapes


@pytest.mark.slow
def test_a_run_on_the_newest_cache_is_measured_and_goes_on_when_another_is_newer(
    there: None, source: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = json.loads(Path("runs/a/final/config.json").read_text())
    assert config["cache"]["path"] == "cache/all"
    assert config["cache"]["key"] == Cache.open(Path("cache/all")).key
    assert yaml.safe_load(Path("runs/a/config.yaml").read_text())["cache"]["path"] == "all"
    metrics = json.loads(evaluate.run(compose("eval", [])).read_text())  # type: ignore[arg-type]
    assert (metrics["split"], metrics["n_tokens"]) == ("evaluation", 20 * 23)
    extracted("dataset.n_tokens=500", *source)
    train.run(trained("name=a"))
    assert "runs/a is finished already" in caplog.text
    shutil.rmtree("runs/a/final")
    train.run(trained("name=a"))
    assert "continuing from" in caplog.text
    Path("cache/all").rename("cache/.aside")
    with pytest.raises(UserError, match="does not exist; run: clt cache merge local-text-"):
        evaluate.run(compose("eval", []))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_cache_is_named_by_its_path_and_nothing_else_may_differ(there: None, source: list[str]) -> None:
    key = Cache.open(Path("cache/all")).key
    for number, name in enumerate(["all", "cache/all", str(Path("cache/all").resolve()), key[:8]]):
        train.run(trained(f"name=p{number}", f"cache.path={name}"))
        assert yaml.safe_load(Path(f"runs/p{number}/config.yaml").read_text())["cache"]["path"] == "all"
    plain = next(path for path in Path("cache").iterdir() if path.name != "all")
    train.run(trained("name=plain", f"cache.path={plain.name}"))
    assert yaml.safe_load(Path("runs/plain/config.yaml").read_text())["cache"]["path"] is None
    train.run(trained("name=plain"))  # goes on, on the same cache
    with pytest.raises(UserError, match=r"cache\.path=None \(was all\)"):
        train.run(trained("name=p0", f"cache.path={plain.name}"))
    with pytest.raises(UserError, match=r"cache/all is of another dataset than named; leave model and dataset out"):
        train.run(trained("name=x", "cache.path=all", "dataset.n_tokens=77", *source))
    with pytest.raises(UserError, match="is of another model and another dataset than named"):
        train.run(trained("name=x", "cache.path=all", "model=world"))
    with pytest.raises(UserError, match=r"is stored as raw; leave cache.codec out"):
        train.run(trained("name=x", "cache.path=all", "cache.codec=int8"))
    with pytest.raises(UserError, match="no cache nothing under cache/"):
        train.run(trained("name=x", "cache.path=nothing"))
    assert not Path("runs/x").exists()
    train.run(trained("name=x", "cache.path=all", "dataset.n_tokens=1840", *source))  # what its first part is
