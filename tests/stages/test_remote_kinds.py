"""Settings of the cache that meet a store: codec, targets, path; and what is merged."""

import json
import logging
from pathlib import Path

import pytest
import yaml

from pipeline.config import compose
from pipeline.data.address import Local, Remote
from pipeline.data.cache import Cache
from pipeline.data.options import Targets
from pipeline.data.remote import Store
from pipeline.errors import UserError
from pipeline.stages import cache_copy, cache_list, cache_merge, evaluate, extract, train
from tests.data import fake
from tests.data.s3 import Server

SHORT = ["+experiment=batchtopk", "activation.k=4", "arch.d_features=33", "train.n_steps=6", "train.n_tokens=null"]
SHORT += ["train.batch_tokens=128", "log.every=5", "train.checkpoint_every=640", "train.device=cpu"]


@pytest.fixture
def words(words: list[str]) -> list[str]:
    return [*words, "cache.shard_mb=0.05"]


def metrics(run: str) -> str:
    return Path("runs", run, "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", ["cache.codec=int8", "cache.targets=recompute"])
def test_every_kind_is_extracted_to_a_store_and_trains_as_from_the_disk(
    s3: Server, place: Remote, words: list[str], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    local = extract.run(compose("extract", [*words, kind, "cache.dir=here"]))
    target = extract.run(compose("extract", [*words, kind, f"cache.dir={place}"]))
    assert target == place / local.name
    assert kind in caplog.messages[-1]
    assert caplog.text.count("int8: 120 bytes a token") == (2 if kind == "cache.codec=int8" else 0)
    train.run(compose("train", [*SHORT, "cache.dir=here", "name=disk"]))
    mark = s3.mark()
    train.run(compose("train", [*SHORT, f"cache.dir={place}", "name=store"]))
    assert not [line for line in s3.requests(mark) if "/c/" in line]  # the copies that extraction has kept
    assert metrics("store") == metrics("disk")
    cache = Cache.open(target)
    assert (cache.targets is Targets.recompute) == (kind == "cache.targets=recompute")
    command = cache_list.info(None, place, Path("runs"), as_json=True)
    assert kind in json.loads(command)["command"]
    extract.run(compose("extract", [*words, kind, f"cache.dir={place}"]))
    assert f"already there, nothing to do: {target}" in caplog.messages[-1]


@pytest.mark.slow
def test_an_address_can_be_named_to_train_on(s3: Server, place: Remote, words: list[str]) -> None:
    local = extract.run(compose("extract", words))
    assert isinstance(local, Path)
    address = cache_copy.run(local.name, place, Path("cache"))
    mine = [f"cache.path={address}", "cache.local_dir=elsewhere", "cache.local_gb=1"]
    directory = train.run(compose("train", [*SHORT, *mine, "name=a"]))
    train.run(compose("train", [*SHORT, "name=b"]))
    assert metrics("a") == metrics("b")
    assert [file for file in Path("elsewhere").rglob("*") if "resid_mid" in file.parts]
    assert not Path("home/clt").exists()
    assert yaml.safe_load((directory / "config.yaml").read_text())["cache"]["path"] == address
    assert json.loads((directory / "final/config.json").read_bytes())["cache"]["path"] == address
    assert metrics("a") == Path(train.run(compose("train", [*SHORT, "name=a"])), "metrics.jsonl").read_text()
    assert evaluate.run(compose("eval", [f"run={directory}", f"cache.dir={place}"])).exists()
    train.run(compose("train", [*SHORT, f"cache.path={local.name}", f"cache.dir={place}", "name=c"]))
    assert yaml.safe_load(Path("runs/c/config.yaml").read_text())["cache"]["path"] is None  # what the settings name
    with pytest.raises(UserError, match=r"is no cache of this program"):
        train.run(compose("train", [*SHORT, f"cache.path={place}/nothing", "name=d"]))
    assert not Path("runs/d").exists()


def test_merging_and_merged_caches_are_for_disks(place: Remote) -> None:
    parts = [fake.extract(Path("cache"), packed=fake.pack(seed), seed=seed) for seed in (1, 2)]
    names = [part.name for part in parts]
    merged = Path(cache_merge.run(names, Path("cache")))
    said = rf"{merged} is merged.*; copy its parts, and merge there: {parts[0]}, {parts[1]}"
    with pytest.raises(UserError, match=said):
        cache_copy.run(merged.name, place, Path("cache"))
    assert Store(place).sizes() == {}
    addresses = [cache_copy.run(name, place, Path("cache")) for name in names]
    refused = "lies in a store, and caches are merged on a disk; clt cache copy the parts to one"
    for given, folder in ((names, place), (addresses, Path("cache")), ([names[0], addresses[1]], Path("cache"))):
        with pytest.raises(UserError, match=refused):
            cache_merge.run(given, folder)
    back = [Path(cache_copy.run(address, Path("back"), Path("cache"))) for address in addresses]
    again = Cache.open(Path(cache_merge.run([path.name for path in back], Path("back"))))
    assert again.key == Cache.open(merged).key


def test_a_bound_of_nothing_is_refused_for_an_address_that_is_named(place: Remote) -> None:
    assert place.local == Local(Path("home/clt").absolute(), 50 * 10**9)
    with pytest.raises(UserError, match=r"cache\.local_gb=0 keeps nothing"):
        train.run(compose("train", [*SHORT, f"cache.path={place}/x", "cache.local_gb=0", "name=a"]))
