"""Caches of every kind in a store: without targets, extracted in a codec, merged; and the copy of zarr.json."""

import os
import shutil
from itertools import islice
from pathlib import Path

import pytest

from pipeline.data import caches, inventory, local_copies, root, verify
from pipeline.data.address import Local, Remote
from pipeline.data.cache import Cache
from pipeline.data.inventory import State
from pipeline.data.loader import Loader
from pipeline.data.merged import Merged
from pipeline.data.merging import merge
from pipeline.data.options import Codec, Read
from pipeline.data.remote import Store
from pipeline.data.transfer import copy
from pipeline.errors import UserError
from tests.data import fake
from tests.data.s3 import Server


@pytest.fixture
def parent(s3: Server, tmp_path: Path) -> Remote:
    return Remote(f"s3://bucket/{tmp_path.name}", Local(tmp_path / "local", 10**8))


def batches(path: Path | Remote, read: Read) -> list[list[object]]:
    with Loader(Cache.open(path), 30, seed=3, read=read) as loader:
        return [[None if part is None else part.view(-1).tolist() for part in b] for b in islice(loader, 12)]


@pytest.mark.parametrize("read", [Read.mmap, Read.readinto])
def test_of_a_cache_without_targets_only_what_is_stored_is_fetched(
    s3: Server, parent: Remote, tmp_path: Path, read: Read
) -> None:
    path = fake.extract(tmp_path / "made", targets="recompute")
    place = parent / path.name
    assert copy(path, place)
    cache, n_shards = Cache.open(place), len(Cache.open(path).shards())
    assert cache.shard_bytes == cache.specs["resid_mid"].file_bytes
    files = cache.hold(cache.shards()[1])
    [kept] = [file for file in parent.local.root.rglob("*") if file.is_file() and file.name != local_copies.LOCK]
    assert kept.relative_to(parent.local.root).parts[2:] == ("resid_mid", "c", "1", "0", "0")
    assert [os.fstat(file.fileno()).st_ino for file in files] == [kept.stat().st_ino]
    for file in files:
        file.close()
    mark = s3.mark()
    found = batches(place, read)
    assert len([line for line in s3.requests(mark) if "/c/" in line]) == n_shards - 1  # one was fetched above
    assert found == batches(path, read)
    assert all(mlp_out is None for _, mlp_out, _ in found)


@pytest.mark.parametrize("codec", [Codec["int8"], Codec["pcodec"]])
def test_one_extracted_in_a_codec_reads_the_same(parent: Remote, tmp_path: Path, codec: Codec) -> None:
    path = fake.extract(tmp_path / "made", codec=codec)
    assert copy(path, parent / path.name)
    assert batches(parent / path.name, Read.auto) == batches(path, Read.auto)


def test_a_store_has_no_copy_of_zarr_json_and_a_fetched_cache_has_its_own(parent: Remote, tmp_path: Path) -> None:
    path, back = fake.extract(tmp_path / "made"), tmp_path / "back"
    place = parent / path.name
    copy(path, place)
    assert root.COPY not in Store(place).sizes()
    attributes = Cache.open(place).attributes
    assert verify.n_files(place, attributes) + 1 == verify.n_files(path, attributes) == len(Store(place).sizes())
    assert not list(verify.problems(place, attributes, lambda n: None))
    copy(place, back / path.name)
    assert not list(verify.problems(back / path.name, attributes, lambda n: None))
    (back / path.name / root.NAME).unlink()
    with pytest.raises(UserError, match=r"zarr\.json is missing; put it back with: clt extract"):
        copy(place, back / path.name)


def test_a_copy_over_another_ones_bits_leaves_no_word_of_those(parent: Remote, tmp_path: Path) -> None:
    """Sent by other means than ours, the copy of zarr.json may lie in the store too."""
    path = fake.extract(tmp_path / "made")
    other = fake.extract(tmp_path / "other", model=fake.FakeModel(weight=1.5))
    place = parent / path.name
    for file in other.rglob("*"):
        if file.is_file():
            Store(place).put(file.relative_to(other).as_posix(), file.read_bytes())
    target = tmp_path / "folder" / path.name
    copy(place, target)
    assert root.copied(target) == (other / root.NAME).read_bytes()
    assert copy(path, target, verify=True)
    assert root.copied(target) == (path / root.NAME).read_bytes()
    assert batches(target, Read.mmap) == batches(path, Read.mmap)


def test_a_merged_cache_is_read_from_a_disk(parent: Remote, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    parts = [fake.extract(folder, packed=fake.pack(seed), seed=seed) for seed in (1, 2)]
    merged = merge([Cache.open(part) for part in parts], folder)
    for path in (merged, *parts):
        for file in path.rglob("*"):
            if file.is_file():
                Store(parent / path.name).put(file.relative_to(path).as_posix(), file.read_bytes())
    with pytest.raises(UserError, match=f"{merged.name}: merged caches are read from a disk; clt cache copy its parts"):
        Cache.open(parent / merged.name)
    found = inventory.find(parent, merged.name)
    assert (found.state, found.detail[:34]) == (State.damaged, "merged caches are read from a disk")
    newest = caches.newest(parent)
    assert newest is not None
    assert newest.path.name in {part.name for part in parts}
    cache = Cache.open(merged)
    with pytest.raises(UserError, match=r"a merged cache is asked for.*; name the folder: cache\.dir="):
        caches.with_key(parent, cache.key, cache.request)
    shutil.rmtree(merged)
    assert caches.newest(folder) is not None


def test_the_files_of_a_group_are_those_of_its_pieces(tmp_path: Path) -> None:
    parts = [Cache.open(fake.extract(tmp_path, packed=fake.pack(seed), seed=seed)) for seed in (1, 2)]
    cache = Cache.open(merge(parts, tmp_path))
    assert isinstance(cache, Merged)
    shard = cache.shards()[1]
    files = cache.hold(shard)
    names = [Path(str(file.name)) for file in files]
    for file in files:
        file.close()
    expected = [
        parts[piece.part].specs[name].file(parts[piece.part].path, name, piece.chunk)
        for name in cache.stored
        for piece in shard.pieces
    ]
    assert names == expected
    assert {name.parent.parent.parent.parent.parent for name in names} == {part.path for part in parts}
    assert cache.shard_bytes >= sum(name.stat().st_size for name in names)
