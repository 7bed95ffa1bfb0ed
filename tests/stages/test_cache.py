"""The commands on caches: what they say, what they refuse, what they leave."""

import json
import logging
import os
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.inventory import State
from pipeline.data.journal import Journal
from pipeline.data.layout import request_of
from pipeline.data.options import DatasetKind, DatasetOptions
from pipeline.errors import UserError
from pipeline.files import take_lock
from pipeline.plain import to_plain
from pipeline.stages import cache_convert, cache_list, cache_remove, cache_verify, extract
from pipeline.stages.options import ExtractConfig
from tests.data import fake
from tests.data.fake import stored_files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.extract(tmp_path_factory.mktemp("made"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The cache directory; runs/ lies beside it."""
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def path(made: Path, root: Path) -> Path:
    shutil.copytree(made, root / made.name)
    return root / made.name


def stopped(root: Path, seed: int = 3) -> Path:
    def stop(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.extract(root, seed=seed, after_block=stop)
    return next(file.parent for file in root.glob("*/.journal") if fake.request(seed=seed) == requested(file.parent))


def requested(path: Path) -> object:
    return json.loads((path / ".journal/state.json").read_bytes())["request"]


def finished_run(runs: Path, name: str, key: str) -> None:
    (runs / name / "final").mkdir(parents=True)
    (runs / name / "config.yaml").write_text("model: {}\n")
    (runs / name / "final" / "config.json").write_text(json.dumps({"cache": {"key": key, "path": "elsewhere"}}))


def begun_run(runs: Path, name: str, seed: int, codec: str = "raw", dtype: str = "auto") -> None:
    """What `clt train` writes before its first checkpoint."""
    options = DatasetOptions("text", DatasetKind.text, "244", path="x.txt", context=fake.T, held_out=3, seed=seed)
    model = {**fake.request()["model"], "dtype": dtype, "device": "cpu", "max_memory": {}}
    settings = {"model": model, "dataset": to_plain(options), "cache": {"dir": "cache", "codec": codec}}
    (runs / name).mkdir(parents=True)
    (runs / name / "config.yaml").write_text(yaml.safe_dump(settings))


def listed(root: Path, runs: Path) -> list[dict]:
    return json.loads(cache_list.ls(root, runs, as_json=True))["caches"]


def test_no_caches_are_a_line_that_says_how_to_make_one(root: Path, runs: Path) -> None:
    assert cache_list.ls(root, runs) == f"no caches under {root}/; make one with clt extract model=world"
    assert "make one with clt extract" in cache_list.ls(root / "nowhere", runs)
    with pytest.raises(UserError, match=r"no finished cache under .*; make one with clt extract"):
        cache_list.info(None, root, runs)
    with pytest.raises(UserError, match=r"no finished cache under .*; make one with clt extract"):
        cache_verify.run([], root)


def test_the_table_has_a_row_for_each_cache_and_a_line_for_each_leftover(path: Path, root: Path, runs: Path) -> None:
    half = stopped(root)
    (root / ".packing" / "gone").mkdir(parents=True)
    finished_run(runs, "demo", path.name[-12:])
    head, *lines = cache_list.ls(root, runs).splitlines()
    assert head.split() == ["NAME", "MODEL", "DATA", "TOKENS", "T", "CODEC", "SIZE", "STATE", "CREATED", "RUNS"]
    rows = {line.split()[0]: line for line in lines}
    assert rows[path.name].split()[1:6] == ["fake", "text", "244", "7", "raw"]
    assert "complete" in rows[path.name]
    assert rows[path.name].endswith("  demo")
    assert "unfinished, 11 %" in rows[half.name]
    assert rows[half.name].split()[-2:] == ["-", "-"]
    assert "packed tokens" in rows[f"{root}/.packing/gone:"]
    assert "clt cache prune" in rows[f"{root}/.packing/gone:"]
    assert lines[-1].endswith(f"in all under {root}/")


def test_a_damaged_cache_says_what_is_wrong_with_it(path: Path, root: Path, runs: Path) -> None:
    (path / "mlp_out/c/1/0/0").unlink()
    (row,) = listed(root, runs)
    assert (row["state"], row["detail"]) == ("damaged", "chunk 1 of mlp_out is missing")
    assert "chunk 1 of mlp_out is missing" in cache_list.ls(root, runs)
    (path / "zarr.json").write_text("")
    (row,) = listed(root, runs)
    assert (row["state"], row["key"], row["model"]) == ("damaged", path.name[-12:], None)
    assert "zarr.json is damaged" in cache_list.info(path.name, root, runs)


def test_runs_are_found_by_the_key_they_name_and_by_their_settings(path: Path, root: Path, runs: Path) -> None:
    key = path.name[-12:]
    finished_run(runs, "done", key)
    finished_run(runs, "other", "0123456789ab")
    finished_run(runs, "sweep/1", key)
    begun_run(runs, "begun", seed=7)
    begun_run(runs, "another-seed", seed=8)
    begun_run(runs, "another-codec", seed=7, codec="int8")
    begun_run(runs, "another-dtype", seed=7, dtype="bfloat16")
    begun_run(runs, "stopped", seed=8)  # the checkpoint knows better than the settings
    (runs / "stopped" / "checkpoints" / "step_9").mkdir(parents=True)
    (runs / "stopped" / "checkpoints" / "step_9" / "state.json").write_text(json.dumps({"step": 9, "cache": key}))
    (row,) = listed(root, runs)
    assert row["runs"] == ["begun", "done", "stopped", "sweep/1"]
    assert cache_list.info(None, root, runs).splitlines()[-1].startswith("         2")  # the last layer's rms
    assert "runs        begun, done, stopped, sweep/1" in cache_list.info(None, root, runs)


def test_info_says_all_that_is_known(path: Path, root: Path, runs: Path) -> None:
    said = cache_list.info(path.name[-12:-8], root, runs)
    for what in (
        f"{path}: complete, made 20",
        "model       fake (Sines, fake), no commit, weights sha256 weights 1.0, tokenizer sha256 tokenizer",
        "layers      0 to 2 of width 5, float32, eager attention",
        "norm        layer norm before each MLP, epsilon 1e-05",
        "text (text): ",
        "held_out=3",
        "rows        train 244, calibration 24, evaluation 18; seed 7",
        "contexts    7 tokens, which begin with token 0",
        "storage     raw, 60 bytes a token, 2 x 5 shards of 49 rows",
        "zarr 3",
        "command     clt extract model=fake",
        "runs        none",
    ):
        assert what in said
    about = json.loads(cache_list.info(None, root, runs, as_json=True))
    cache = Cache.open(path)
    assert about["rms"]["mlp_in"] == cache.stats("mlp_in")[2].tolist()
    assert about["dataset"]["fingerprint"] == cache.dataset["fingerprint"]
    assert about["model"]["weights_sha256"] == "weights 1.0"
    assert (about["key"], about["name"]) == (cache.key, path.name)


def test_info_of_an_unfinished_cache_has_what_is_known_so_far(root: Path, runs: Path) -> None:
    half = stopped(root)
    said = cache_list.info(half.name, root, runs)
    assert f"{half}: unfinished: 11 %" in said
    assert "rows        train 244" in said
    assert "rms" not in said


def test_info_names_the_newest_when_none_is_named(made: Path, root: Path, runs: Path) -> None:
    older = fake.extract(root, seed=9)
    newer = fake.extract(root, seed=8)
    assert cache_list.info(None, root, runs).startswith(f"{newer}: complete")
    assert cache_list.info(older.name, root, runs).startswith(f"{older}: complete")


def test_a_whole_cache_is_verified_in_a_line(path: Path, root: Path) -> None:
    line = cache_verify.run([], root)
    assert line.startswith(f"{path}: all ")
    assert "checksums are right" in line
    assert "\n" not in line


def test_every_damaged_chunk_is_named_with_the_command_that_mends_it(
    path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = stored_files(path)
    flipped, shorter, gone = path / "resid_mid/c/0/0/0", path / "mlp_out/c/1/0/0", path / "mlp_out/c/3/0/0"
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    os.truncate(shorter, 30)
    gone.unlink()
    whole = fake.extract(root, seed=9)
    with pytest.raises(UserError, match="1 of 2 caches did not pass"):
        cache_verify.run([], root)
    lines = [message for message in caplog.messages if "; make it again: " in message]
    assert [line.split("; ")[0] for line in lines] == [
        f"{path}: chunk 0 of resid_mid does not hold what was written (wrong checksum)",
        f"{path}: chunk 1 of mlp_out is truncated (30 bytes, not 1,474)",
        f"{path}: chunk 3 of mlp_out is missing",
    ]
    assert lines[0].split("again: ")[1].startswith(f"rm {flipped} && clt extract model=fake ")
    assert lines[2].split("again: ")[1].startswith("clt extract model=fake ")
    (together,) = [message for message in caplog.messages if "make all of it again: " in message]
    assert "3 of " in together
    removed, command = shlex.split(together.split("again: ")[1].split(" && ")[0])[1:], together.split(" && ")[1]
    assert removed == [str(flipped), str(shorter)]
    assert command.startswith("clt extract model=fake ")
    for file in removed:  # what the command does
        Path(file).unlink()
    fake.extract(root)
    assert stored_files(path) == before
    assert cache_verify.run([path.name, whole.name], root).count("checksums are right") == 2


def test_what_is_not_finished_is_passed_over_or_refused(
    path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    half = stopped(root)
    assert str(path) in cache_verify.run([], root)
    assert f"passed over, since it is not finished: {half} (11 %)" in caplog.text
    with pytest.raises(UserError, match="did not pass"):
        cache_verify.run([half.name], root)
    assert "is not finished (11 %); clt extract goes on with it" in caplog.text
    (path / "zarr.json").write_text("[]")
    with pytest.raises(UserError, match="did not pass"):
        cache_verify.run([path.name], root)
    assert "zarr.json is damaged; put it back with: clt extract" in caplog.text


@pytest.fixture(scope="module")
def real(tiny_gpt2: Path, english: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a model that can be loaded again."""
    words = ["model=local", f"model.path={tiny_gpt2}", "model.device=cpu", "dataset=text", f"dataset.path={english}"]
    words += ["dataset.n_tokens=900", "dataset.context=19", "dataset.held_out=3", "cache.shard_mb=0.05"]
    asked = compose("extract", [*words, f"cache.dir={tmp_path_factory.mktemp('real')}"])
    assert isinstance(asked, ExtractConfig)
    return extract.run(asked)


def test_a_sample_is_computed_again_through_the_reader(real: Path) -> None:
    line = cache_verify.run([real.name], real.parent, against_model=True, device="cpu")
    assert "checksums are right" in line
    assert f"{8 * 18 + 2 * 18} rows computed again" in line  # 900 rows are 50 full contexts of 18


def test_rows_in_a_wrong_order_pass_every_checksum_and_not_the_model(
    real: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = Cache.rows
    monkeypatch.setattr(Cache, "rows", lambda self, name, chunk: read(self, name, chunk).flip(0))
    assert "checksums are right" in cache_verify.run([real.name], real.parent)
    with pytest.raises(UserError, match="did not pass"):
        cache_verify.run([real.name], real.parent, against_model=True, device="cpu")
    assert "of layer" in caplog.text
    assert "computed again, differs by" in caplog.text
    assert "this model did not make this cache, or the cache is damaged" in caplog.text


def test_another_model_in_its_place_is_refused(
    real: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.data.models.weights_hash", lambda directory: "0" * 64)
    with pytest.raises(UserError, match="did not pass"):
        cache_verify.run([real.name], real.parent, against_model=True, device="cpu")
    assert "was made with other weights of local" in caplog.text


def test_the_arithmetic_is_the_one_that_made_the_cache(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(options: object) -> object:
        asked.append(options)
        raise UserError("no model here")

    monkeypatch.setattr("pipeline.data.models.load", load)
    with pytest.raises(UserError, match="did not pass"):
        cache_verify.run([real.name], real.parent, against_model=True, device="cuda:1")
    assert (asked[0].dtype, asked[0].device, asked[0].name) == ("float32", "cuda:1", "local")


def test_a_removed_cache_is_gone_and_the_others_are_not(path: Path, root: Path, runs: Path) -> None:
    other = fake.extract(root, seed=9)
    half = stopped(root)
    before = stored_files(other)
    said = cache_remove.rm([path.name, half.name[-12:], str(path)], root, runs)
    assert said.endswith(" MB freed")
    assert list(root.iterdir()) == [other]
    assert stored_files(other) == before


def test_a_cache_that_a_run_uses_is_removed_by_force_only(path: Path, root: Path, runs: Path) -> None:
    other = fake.extract(root, seed=9)
    finished_run(runs, "demo", path.name[-12:])
    begun_run(runs, "begun", seed=7)
    with pytest.raises(UserError, match=r"is used by begun, demo; --force removes it all the same"):
        cache_remove.rm([other.name, path.name], root, runs)
    assert {state["state"] for state in listed(root, runs)} == {"complete"}
    assert len(listed(root, runs)) == 2  # refused before anything was removed
    cache_remove.rm([path.name], root, runs, force=True)
    assert list(root.iterdir()) == [other]


def test_a_run_that_cannot_be_read_may_use_it(path: Path, root: Path, runs: Path) -> None:
    finished_run(runs, "broken", "x")
    (runs / "broken" / "final" / "config.json").write_text("{")
    assert len(listed(root, runs)) == 1
    with pytest.raises(UserError, match=r"whether .*broken uses a cache is not known; mend that, or use --force"):
        cache_remove.rm([path.name], root, runs)
    assert path.exists()


def test_a_cache_that_is_being_made_is_refused_even_by_force(root: Path, runs: Path) -> None:
    half = stopped(root)
    journal = Journal(half)
    with pytest.raises(UserError, match=f"is being made by process {os.getpid()}.*wait for it to end"):
        cache_remove.rm([half.name], root, runs, force=True)
    assert cache_remove.prune(root, runs, yes=True) == f"nothing to remove under {root}/"
    assert half.exists()
    journal.close()


def test_what_is_no_cache_is_never_removed(path: Path, root: Path, runs: Path, tmp_path: Path) -> None:
    (root / "thesis").mkdir()
    (root / "thesis" / "chapter.txt").write_text("x")
    for name in ("thesis", str(root / "thesis"), str(root), str(runs), ".", "", "*"):
        with pytest.raises(UserError):
            cache_remove.rm([path.name, name], root, runs, force=True)
    cache_remove.prune(root, runs, yes=True)
    assert (root / "thesis" / "chapter.txt").exists()
    assert path.exists()


def test_prune_says_what_it_would_remove_and_removes_it_when_told(
    path: Path, root: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    half, used = stopped(root), stopped(root, seed=4)
    begun_run(runs, "waiting", seed=4)
    packed, busy = root / ".packing" / "old", root / ".packing" / "busy"
    (root / ".packing" / half.name).mkdir(parents=True)
    packed.mkdir()
    lock = take_lock(busy, busy)
    rest = root / ".removed" / "some-cache-x"
    rest.mkdir(parents=True)
    (rest / "big").write_bytes(bytes(10**5))
    before = sorted(root.rglob("*"))
    said = cache_remove.prune(root, runs)
    assert said.endswith("would be freed; clt cache prune --yes removes this")
    named = [message.split(",")[0] for message in caplog.messages if message.startswith("would remove")]
    assert named == [f"would remove {place}" for place in (half, packed, rest)]
    assert f"kept {used}: it is used by waiting" in caplog.text
    assert sorted(root.rglob("*")) == before
    assert cache_remove.prune(root, runs, yes=True).endswith(" MB freed")
    assert {str(place.relative_to(root)) for place in root.glob("*")} == {path.name, used.name, ".packing"}
    assert [place.name for place in (root / ".packing").iterdir()] == ["busy"]
    os.close(lock)


def test_states_of_the_table_are_those_of_the_inventory(root: Path, runs: Path) -> None:
    half = stopped(root)
    journal = Journal(half)
    assert f"being made by process {os.getpid()}, 11 %" in cache_list.ls(root, runs)
    assert listed(root, runs)[0]["state"] == State.at_work
    journal.close()


def test_a_cache_made_by_extract_is_listed_with_the_command_that_names_it(real: Path, runs: Path) -> None:
    about = json.loads(cache_list.info(None, real.parent, runs, as_json=True))
    asked = compose("extract", shlex.split(about["command"])[2:])
    assert isinstance(asked, ExtractConfig)
    assert request_of(asked.model, asked.dataset, asked.cache.codec) == Cache.open(real).request


def test_a_conversion_says_what_it_takes_and_loses_and_its_cache_is_listed_and_verified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    raw = fake.extract(tmp_path)
    path = Path(cache_convert.run(raw.name, "codec=int8", tmp_path))
    assert path.parent == tmp_path
    assert "times smaller than raw" in caplog.text
    assert "worst channel" in caplog.text
    assert "next: clt train" in caplog.text
    assert "cache.codec=int8" in caplog.text
    listed = {
        row["name"]: row for row in json.loads(cache_list.ls(tmp_path, tmp_path / "runs", as_json=True))["caches"]
    }
    assert {name: row["codec"] for name, row in listed.items()} == {raw.name: "raw", path.name: "int8"}
    about = json.loads(cache_list.info(path.name, tmp_path, tmp_path / "runs", as_json=True))
    assert about["lost"]["mlp_out"]["fvu"] < 1e-3
    assert about["command"] == command_of(Cache.open(path).request, tmp_path)
    assert "checksums are right" in cache_verify.run([path.name], tmp_path)
    with pytest.raises(UserError, match="codec=zip: not a codec; give codec=X, X one of raw, int8"):
        cache_convert.run(raw.name, "codec=zip", tmp_path)
