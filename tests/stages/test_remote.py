"""Stages and commands on a cache in an object store."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Request, compose, launch
from pipeline.data import models, transfer
from pipeline.data.address import Remote
from pipeline.data.cache import Cache
from pipeline.data.layout import directory_of, request_of
from pipeline.data.loader import Loader
from pipeline.data.remote import Store
from pipeline.errors import UserError
from pipeline.stages import cache_convert, cache_copy, cache_list, cache_remove, cache_verify, evaluate, extract, train
from tests.data import fake
from tests.data.fake import stored_files
from tests.data.s3 import Server

SHORT = ["+experiment=batchtopk", "activation.k=4", "arch.d_features=33", "train.n_steps=6", "train.n_tokens=null"]
SHORT += ["train.batch_tokens=128", "log.every=5", "train.checkpoint_every=640", "train.device=cpu"]


def content(target: Any) -> dict[str, bytes]:
    store = Store(target)
    return {key: store.get(key) for key in store.sizes()}


def test_extracted_to_a_store_it_is_what_the_disk_would_hold_and_trains_without_a_fetch(
    s3: Server, place: Remote, words: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    local = extract.run(compose("extract", [*words, "cache.dir=here", "cache.shard_mb=0.05"]))
    cfg = compose("extract", [*words, f"cache.dir={place}", "cache.shard_mb=0.05"])
    target = extract.run(cfg)
    assert target == place / local.name
    assert f"to {target}: made in {place.local.root}/.making/" in caplog.text
    assert "free on" in caplog.text
    assert f"cache.dir={place}" in caplog.messages[-1]
    ours = stored_files(Path(local))
    theirs = content(target)
    root = json.loads(theirs.pop("zarr.json"))
    expected = json.loads(ours.pop("zarr.json"))
    assert theirs == ours
    assert root["attributes"]["manifest"] == expected["attributes"]["manifest"]
    assert not (place.local.root / ".making").exists()

    mark = s3.mark()
    directory = train.run(compose("train", [*SHORT, f"cache.dir={place}", "name=a"]))
    evaluate.run(compose("eval", [f"run={directory}", f"cache.dir={place}"]))
    assert json.loads((directory / "final/config.json").read_bytes())["cache"]["path"] == str(target)
    assert not [line for line in s3.requests(mark) if "/c/" in line]
    with Loader(Cache.open(target), 50, 0) as a, Loader(Cache.open(local), 50, 0) as b:
        assert next(a).resid_mid.equal(next(b).resid_mid)

    monkeypatch.setattr(models, "load", None)
    caplog.clear()
    extract.run(cfg)
    assert f"already there, nothing to do: {target}" in caplog.text


@pytest.mark.slow
def test_an_extraction_that_was_stopped_while_it_was_sent_goes_on_without_the_model(
    place: Remote, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose("extract", [*words, f"cache.dir={place}", "cache.local_gb=0.00001"])
    real, left = Store.put, [20]

    def put(self: Store, key: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", put)
        patch.setattr(transfer, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            extract.run(cfg)
    target = directory_of(place, request_of(cfg.model, cfg.dataset))
    with pytest.raises(UserError, match="is no cache"):
        Cache.open(target)
    monkeypatch.setattr(models, "load", None)
    assert extract.run(cfg) == target
    assert "all" in cache_verify.run([], place)
    rest = [file for file in place.local.root.rglob("*") if file.is_file()]
    assert [file.name for file in rest] == [".lock"]  # larger than the bound: nothing was kept


def test_parts_and_dry_runs_leave_nothing_in_the_store(place: Remote, words: list[str], caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match=r"part 1/3 of a cache cannot be made in s3://.*; extract onto a file system"):
        extract.run(compose("extract", [*words, f"cache.dir={place}", "extract.part=1/3"]))
    cfg = compose("extract", [*words, f"cache.dir={place}"])
    cfg.dry_run = True
    extract.run(cfg)
    assert f"and then sent to {place}" in caplog.text
    assert Store(place).sizes() == {}


def test_a_bucket_that_is_not_there_is_said_before_anything_is_made(
    place: Remote, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    code = launch("extract", Request((*words, "cache.dir=s3://nowhere/x")))
    said = capfd.readouterr().err
    assert code == 2
    assert "there is no such bucket" in said
    assert not list(place.local.root.glob(".making/*/*"))
    assert launch("train", Request((*SHORT, "cache.dir=s3://nowhere/x", "name=b"))) == 2
    assert not Path("runs/b").exists()


def test_the_commands_on_caches_know_one_in_a_store(place: Remote, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    made, runs = fake.extract(tmp_path / "cache"), tmp_path / "runs"
    assert "no caches under s3://" in cache_list.ls(place, runs)
    assert cache_copy.run(made.name, place, tmp_path / "cache") == f"{place}/{made.name}"
    assert f"cache.dir={place}" in caplog.messages[-1]
    cache_copy.run(made.name, place, tmp_path / "cache")
    assert "already there" in caplog.text
    with pytest.raises(UserError, match="name another directory"):
        cache_copy.run(f"{place}/{made.name}", place, place)

    [row] = json.loads(cache_list.ls(place, runs, as_json=True))["caches"]
    assert (row["name"], row["state"], row["n_tokens"]) == (made.name, "complete", 244)
    kept = [file for file in made.rglob("*") if file.is_file() and file.name != ".manifest"]
    assert row["n_bytes"] == sum(file.stat().st_size for file in kept)
    about = cache_list.info("fake-text", place, runs)
    assert f"{place}/{made.name}: complete" in about
    assert "rms, layer" in about
    assert "checksums are right" in cache_verify.run([], place)
    with pytest.raises(UserError, match="converted on a disk; clt cache copy"):
        cache_convert.run(made.name, "codec=int8", place)
    with pytest.raises(UserError, match="clt cache rm removes it by name"):
        cache_remove.prune(place, runs)

    target = place / made.name
    data = bytearray(Store(target).get("mlp_out/c/2/0/0"))
    data[0] ^= 1
    Store(target).put("mlp_out/c/2/0/0", bytes(data))
    Store(target).delete(["tokens/zarr.json"])
    with pytest.raises(UserError, match="did not pass"):
        cache_verify.run([made.name], place)
    assert "chunk 2 of mlp_out does not hold what was written (wrong checksum)" in caplog.text
    assert "tokens/zarr.json is missing" in caplog.text
    assert "2 of 55 files are not what was written" in caplog.text
    assert "freed" in cache_remove.rm([f"{place}/{made.name}"], place, runs)
    assert Store(place).sizes() == {}


def test_what_works_on_a_disk_alone_says_so(place: Remote, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("bench_cache", Request((f"cache.dir={place}",))) == 2
    assert "clt bench cache works on a disk; use cache.dir=FOLDER" in capfd.readouterr().err
