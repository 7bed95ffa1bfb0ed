"""Caches in an object store, over a real S3 protocol: what is read equals the disk's, the local copies stay within
their bound, and whatever is stopped goes on."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import caches, inventory, local_copies, remote, root, transfer
from pipeline.data.address import Local, Remote, cache_place, place_of
from pipeline.data.cache import Cache
from pipeline.data.inventory import State
from pipeline.data.layout import STORED
from pipeline.data.loader import Loader
from pipeline.data.options import CacheOptions, Codec, Read
from pipeline.data.remote import Store
from pipeline.data.tokens import Split
from pipeline.data.transfer import copy
from pipeline.errors import UserError
from tests.data import fake
from tests.data.s3 import Server

BUCKET = "bucket"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.extract(tmp_path_factory.mktemp("made"))


@pytest.fixture
def parent(s3: Server, tmp_path: Path) -> Remote:
    """A cache directory of its own in the store, and an empty local folder without a tight bound."""
    return Remote(f"s3://{BUCKET}/{tmp_path.name}", Local(tmp_path / "local", 10**8))


@pytest.fixture(scope="module")
def shared(made: Path, s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sent once, for all that read."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        place = Remote(f"s3://{BUCKET}/shared/{made.name}", Local(tmp_path_factory.mktemp("unused"), 10**9))
        assert copy(made, place)
    return place.address


@pytest.fixture
def sent(shared: str, s3: Server, tmp_path: Path) -> Remote:
    """To be read, with an empty local folder of its own."""
    return Remote(shared, Local(tmp_path / "local", 10**8))


@pytest.fixture
def own(made: Path, parent: Remote) -> Remote:
    """To be damaged."""
    assert copy(made, parent / made.name)
    return parent / made.name


def bounded(place: Remote, n_bytes: int) -> Remote:
    return Remote(place.address, Local(place.local.root, n_bytes))


def objects(place: Remote) -> dict[str, bytes]:
    store = Store(place)
    return {key: store.get(key) for key in store.sizes()}


def files(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def kept_in_a_store(path: Path) -> dict[str, bytes]:
    """All but the copy of zarr.json."""
    return {key: data for key, data in files(path).items() if key != root.COPY}


def batches(cache: Cache, n: int, **options: Any) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    with Loader(cache, 30, seed=3, **options) as loader:
        return [(b.rows.tolist(), b.resid_mid.clone(), b.mlp_out.clone()) for b in islice(loader, n)]


def same(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2]) for x, y in pairs)


def flip(place: Remote, key: str, cut: int = 0) -> None:
    data = bytearray(Store(place).get(key))
    data[7] ^= 1
    Store(place).put(key, bytes(data[: len(data) - cut]))


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_copy_in_a_store_is_the_same_bytes_and_reads_the_same(made: Path, sent: Remote) -> None:
    assert objects(sent) == kept_in_a_store(made)
    ours, theirs = Cache.open(made), Cache.open(sent)
    for name in STORED:
        for shard in ours.shards():
            assert (theirs.map_chunk(name, shard.chunk) == ours.map_chunk(name, shard.chunk)).all()
    assert (theirs.tokens == ours.tokens).all()
    assert torch.equal(theirs.norm.gain, ours.norm.gain)
    for split in (Split.calibration, Split.evaluation):
        for a, b in zip(theirs.held_out(split), ours.held_out(split), strict=True):
            assert (np.asarray(a) == np.asarray(b)).all() if isinstance(a, np.ndarray) else torch.equal(a, b)


@pytest.mark.parametrize("read", [Read.mmap, Read.readinto])
@pytest.mark.parametrize("shards_ahead", [1, 3])
def test_the_loader_gives_the_batches_of_the_cache_on_disk(
    made: Path, sent: Remote, read: Read, shards_ahead: int
) -> None:
    options = {"read": read, "shards_ahead": shards_ahead}
    assert same(batches(Cache.open(sent), 30, **options), batches(Cache.open(made), 30, **options))


def test_compressed_and_int8_caches_read_the_same(made: Path, parent: Remote, tmp_path: Path) -> None:
    from pipeline.data.convert import convert

    (tmp_path / "c").mkdir()
    raw = shutil.copytree(made, tmp_path / "c" / made.name)
    for codec in (Codec["int8"], Codec["pcodec"]):
        path = convert(Cache.open(raw), codec)
        copy(path, parent / path.name)
        assert same(batches(Cache.open(parent / path.name), 20), batches(Cache.open(path), 20))


def test_a_second_epoch_asks_the_store_for_nothing(s3: Server, sent: Remote) -> None:
    with Loader(Cache.open(sent), 244, seed=0) as loader:
        next(loader)
        next(loader)
        mark = s3.mark()
        for _ in range(6):
            next(loader)
    assert s3.requests(mark) == []
    mark = s3.mark()
    batches(Cache.open(sent), 30)  # another process: the manifest and one listing
    assert [line.split()[0] for line in s3.requests(mark)] == ["GET", "GET"]


def test_opening_lists_once_and_asks_for_no_chunk(s3: Server, sent: Remote) -> None:
    mark = s3.mark()
    Cache.open(sent)
    asked = s3.requests(mark)
    assert len(asked) == 2
    assert asked[0].endswith("/zarr.json")
    assert "list-type" in asked[1]


@pytest.mark.parametrize("read", [Read.mmap, Read.readinto])
def test_the_local_folder_stays_within_its_bound_and_what_went_comes_again(
    s3: Server, made: Path, sent: Remote, read: Read
) -> None:
    shard = Cache.open(made).shard_bytes
    tight = bounded(sent, 4 * shard + 10)
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], local_copies.kept_bytes(tight.local))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        mark = s3.mark()
        found = batches(Cache.open(tight), 40, read=read)  # about five passes over five shards
    finally:
        stop.set()
        thread.join()
    assert same(found, batches(Cache.open(made), 40, read=read))
    assert 2 * shard < most[0] <= tight.local.n_bytes
    fetched = [line for line in s3.requests(mark) if "/c/" in line]
    assert len(fetched) > len(set(fetched)) == 2 * len(Cache.open(made).shards())


def test_what_a_loader_has_in_hand_is_not_removed_for_another(made: Path, sent: Remote) -> None:
    cache = Cache.open(sent)
    bound = bounded(sent, 2 * cache.shard_bytes + 10)
    held = [Cache.open(bound).map_chunk(name, 0) for name in STORED]
    other = Cache.open(bound)
    for chunk in (1, 2, 3):
        other.read_chunk("resid_mid", chunk, np.empty(other.specs["resid_mid"].chunk_shape, "<u2"))
    names = {file.relative_to(bound.local.root).as_posix().split("/", 2)[2] for file in kept(bound.local)}
    assert {"resid_mid/c/0/0/0", "mlp_out/c/0/0/0"} < names
    del held
    for chunk in (1, 2, 3):
        other.map_chunk("mlp_out", chunk)
    assert "mlp_out/c/0/0/0" not in {
        f.relative_to(bound.local.root).as_posix().split("/", 2)[2] for f in kept(bound.local)
    }


def kept(local: Local) -> list[Path]:
    return [file for file in local.root.rglob("*") if file.is_file() and file.name != local_copies.LOCK]


def test_a_bound_below_what_the_loader_has_in_hand_is_refused(made: Path, sent: Remote) -> None:
    cache = Cache.open(bounded(sent, 3 * Cache.open(made).shard_bytes))
    with pytest.raises(UserError, match=r"in hand at once, cache.local_gb keeps .*; use cache.local_gb=0.01 or more"):
        Loader(cache, 30, seed=0)
    with pytest.raises(UserError, match=r"cache\.local_gb=0 keeps nothing"):
        cache_place(CacheOptions(dir=str(sent), local_gb=0))


def test_a_file_is_fetched_once_however_many_want_it(s3: Server, sent: Remote) -> None:
    opened = [Cache.open(sent) for _ in range(6)]
    mark = s3.mark()
    threads = [threading.Thread(target=cache.map_chunk, args=("mlp_out", 2)) for cache in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(s3.requests(mark)) == 1


def test_rests_of_a_process_that_died_are_no_obstacle(sent: Remote) -> None:
    cache = Cache.open(bounded(sent, 3 * Cache.open(sent).shard_bytes))
    cache.map_chunk("mlp_out", 0)
    [file] = kept(sent.local)
    file.with_name(file.name + ".aside").write_bytes(b"\1" * (2 * cache.shard_bytes))  # larger than it may be
    (sent.local.root / local_copies.LOCK).write_text("nonsense")
    file.unlink()
    for shard in cache.shards():
        cache.map_chunk("mlp_out", shard.chunk)
    assert local_copies.kept_bytes(sent.local) <= 3 * cache.shard_bytes


def test_a_truncated_copy_is_fetched_again_and_a_changed_one_is_named(sent: Remote, caplog: Any) -> None:
    Cache.open(sent).map_chunk("mlp_out", 0)
    [file] = kept(sent.local)
    os.truncate(file, 10)
    Cache.open(sent).map_chunk("mlp_out", 0)
    assert "it is fetched again" in caplog.text
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"wrong checksum.*rm {file} \(it is fetched again\)"):
        Cache.open(sent).map_chunk("mlp_out", 0)


@pytest.mark.parametrize("read", [Read.mmap, Read.readinto])
def test_a_flipped_object_is_one_line_that_names_it_and_leaves_no_file(own: Remote, read: Read) -> None:
    flip(own, "mlp_out/c/1/0/0")
    with pytest.raises(UserError) as refused, Loader(Cache.open(own), 244, seed=0, read=read) as loader:
        next(loader)
    line = str(refused.value)
    assert f"{own}/mlp_out/c/1/0/0 does not hold what was written" in line
    assert f"clt cache copy COPY {own.parent} --verify" in line
    assert "\n" not in line
    assert not [file for file in kept(own.local) if "mlp_out/c/1" in str(file)]
    assert local_copies.kept_bytes(own.local) == sum(file.stat().st_size for file in kept(own.local))


def test_a_truncated_and_a_missing_object_are_seen_when_the_cache_is_opened(own: Remote) -> None:
    flip(own, "mlp_out/c/1/0/0", cut=4)
    with pytest.raises(UserError, match="chunk 1 of mlp_out is truncated"):
        Cache.open(own)
    Store(own).delete(["mlp_out/c/1/0/0"])
    with pytest.raises(UserError, match="chunk 1 of mlp_out is missing"):
        Cache.open(own)
    found = inventory.find(own.parent, own.name[:12])
    assert (found.state, found.detail) == (State.damaged, "chunk 1 of mlp_out is missing")


@pytest.mark.parametrize("read", [Read.mmap, Read.readinto])
def test_an_object_that_goes_while_a_loader_reads_is_one_line(own: Remote, read: Read) -> None:
    cache = Cache.open(own)
    Store(own).delete(["mlp_out/c/1/0/0"])
    missing = "chunk 1 of mlp_out is missing; make it again: clt cache copy COPY"
    with Loader(cache, 244, seed=0, read=read) as loader, pytest.raises(UserError, match=missing):
        next(loader)
    assert not [file for file in kept(own.local) if file.name.endswith(".aside")]


def test_two_stores_and_two_makings_do_not_mix(made: Path, parent: Remote, tmp_path: Path) -> None:
    """Same request, other bits (here: another date); same name under another prefix."""
    again = fake.extract(tmp_path / "again")
    places = [parent / made.name, Remote(f"{parent}-2/{made.name}", parent.local)]
    for path, place in zip((made, again), places, strict=True):
        copy(path, place)
        Cache.open(place).map_chunk("mlp_out", 0)
    folders = {file.relative_to(parent.local.root).parts[:2] for file in kept(parent.local)}
    assert len(folders) == 2
    assert len({store for store, _ in folders}) == 2
    inventory.remove(inventory.find(parent, made.name))
    copy(again, places[0])
    Cache.open(places[0]).map_chunk("mlp_out", 0)
    assert len({file.relative_to(parent.local.root).parts[:2] for file in kept(parent.local)}) == 3


def test_the_cache_of_a_request_and_the_newest_are_found(made: Path, sent: Remote) -> None:
    request = Cache.open(made).request
    key = Cache.open(made).key
    assert caches.with_key(sent.parent, key, request).path == sent
    newest = caches.newest(sent.parent)
    assert newest is not None
    assert newest.path == sent
    assert caches.newest(sent.parent / "nothing") is None
    with pytest.raises(
        UserError, match=rf"{sent.parent}/nothing/{sent.name} does not exist; run: clt extract .*cache.dir="
    ):
        caches.with_key(sent.parent / "nothing", key, request)


def test_plain_zarr_opens_it_as_the_page_says(made: Path, sent: Remote) -> None:
    import zarr

    page = (Path(__file__).parents[2] / "docs/remote.md").read_text()
    example = page.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(re.sub('s3://bucket/[^"]+', str(sent), example), names)
    assert (names["rows"] == zarr.open_group(made, mode="r")["resid_mid"][:]).all()
    assert zarr.open_group(names["store"], mode="r")["stats/mlp_in/rms"].shape == (fake.L,)


# ------------------------------------------------------------------------------------------------------------- copying


def test_a_cache_goes_there_and_back_with_the_same_bytes(made: Path, sent: Remote, tmp_path: Path) -> None:
    back = tmp_path / "back" / made.name
    assert copy(sent, back)
    assert files(back) == files(made)
    assert not (tmp_path / "back/.copying").exists()
    other = sent.parent / "other" / made.name
    assert copy(sent, other)
    assert objects(other) == kept_in_a_store(made)
    assert not copy(sent, back)
    assert not copy(sent, other)


class Killed(BaseException):
    """What no handler catches by mistake."""


def killed(source: Path | Remote, target: Path | Remote, kind: type, after: int) -> None:
    """A copy that dies in place of the put after so many."""
    real, done = kind.put, [0]

    def put(self: Any, key: str, data: bytes) -> None:
        if done[0] == after:
            raise Killed
        done[0] += 1
        real(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "THREADS", 1)
        patch.setattr(kind, "put", put)
        with pytest.raises(Killed):
            copy(source, target)


N_PUTS = 57
"""Of an upload: the files of a cache of the fake model, and the note of what is copied."""


def test_the_number_of_puts_is_what_it_was(made: Path) -> None:
    assert len(kept_in_a_store(made)) + 1 == N_PUTS


@pytest.mark.parametrize(
    "points", [(0,), (1,), (20,), (-2,), (-1,), pytest.param(range(N_PUTS), marks=pytest.mark.slow, id="any two puts")]
)
def test_an_upload_that_is_killed_is_nothing_to_a_reader_and_goes_on(
    s3: Server, made: Path, parent: Remote, points: Sequence[int]
) -> None:
    for after in (range(N_PUTS)[point] for point in points):
        target = parent / str(after) / made.name
        killed(made, target, Store, after)
        with pytest.raises(UserError, match="is no cache"):
            Cache.open(target)
        assert caches.finished(target.parent) == []
        there = {key for key in Store(target).sizes() if "/c/" in key}
        mark = s3.mark()
        assert copy(made, target)
        again = {line.partition(f"{made.name}/")[2] for line in s3.requests(mark) if line.startswith("PUT")}
        assert not again & there
        assert objects(target) == kept_in_a_store(made)


def test_a_download_that_is_killed_is_nothing_to_a_reader_and_goes_on(
    made: Path, sent: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for after in (9, N_PUTS - 1):
        target = tmp_path / str(after) / made.name
        killed(sent, target, transfer._Disk, after)
        assert inventory.caches(target.parent) == []
        assert [left.kind for left in inventory.leftovers(target.parent)] == ["copying"]
        assert copy(sent, target)
        assert files(target) == files(made)
        assert inventory.leftovers(target.parent) == []


def test_a_stopped_copy_of_other_bits_is_not_gone_on_with(
    made: Path, parent: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request extracted twice may differ in last bits: sizes do not tell."""
    target = parent / made.name
    other = fake.extract(tmp_path / "other", model=fake.FakeModel(weight=1.5))
    assert other.name == made.name
    killed(other, target, Store, 12)
    assert copy(made, target)
    assert objects(target) == kept_in_a_store(made)


def test_verify_sends_again_what_differs_and_nothing_else(s3: Server, made: Path, own: Remote) -> None:
    flip(own, "mlp_out/c/3/0/0")
    assert not copy(made, own)
    mark = s3.mark()
    assert copy(made, own, verify=True)
    puts = [line.partition(f"{made.name}/")[2] for line in s3.requests(mark) if line.startswith("PUT")]
    assert puts == ["mlp_out/c/3/0/0"]
    assert objects(own) == kept_in_a_store(made)


def test_a_damaged_source_is_not_copied(made: Path, parent: Remote, tmp_path: Path) -> None:
    path = shutil.copytree(made, tmp_path / "c" / made.name)
    data = bytearray((path / "mlp_out/c/2/0/0").read_bytes())
    data[0] ^= 1
    (path / "mlp_out/c/2/0/0").write_bytes(data)
    with pytest.raises(UserError, match="mlp_out/c/2/0/0 does not hold what was written"):
        copy(path, parent / path.name)
    assert caches.finished(parent) == []
    (path / "mlp_out/c/2/0/0").unlink()
    with pytest.raises(UserError, match="chunk 2 of mlp_out is missing; mend it before it is copied"):
        copy(path, parent / "b" / path.name)
    assert Store(parent / "b").sizes() == {}


def test_removing_begins_with_what_makes_it_a_cache(s3: Server, own: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    found = inventory.find(own.parent, own.name)
    real = Store.delete
    calls: list[list[str]] = []

    def delete(self: Store, keys: Any) -> None:
        calls.append(sorted(keys))
        real(self, calls[-1])

    monkeypatch.setattr(Store, "delete", delete)
    assert inventory.remove(found) > 10_000
    assert calls[0] == ["zarr.json"]
    assert Store(own).sizes() == {}
    assert inventory.caches(own.parent) == []


def test_an_upload_that_was_stopped_is_listed_and_can_be_removed(
    made: Path, parent: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(made, parent / made.name, Store, 8)
    [found] = inventory.caches(parent)
    assert found.state is State.unfinished
    assert "of a copy" in found.detail
    inventory.remove(found)
    assert Store(parent).sizes() == {}


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_a_bucket_that_is_not_there_is_one_line(made: Path, s3: Server, tmp_path: Path) -> None:
    place = Remote(f"s3://nowhere/a/{made.name}", Local(tmp_path, 10**9))
    message = r"s3://nowhere.*: there is no such bucket; create it, or correct the address"
    for work in (lambda: inventory.caches(place.parent), lambda: copy(made, place)):
        with pytest.raises(UserError, match=message) as refused:
            work()
        assert "\n" not in str(refused.value)


def test_a_server_that_is_not_there_is_one_line(sent: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Cache.open(sent)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setitem(remote.PATIENCE, "first", (1, remote.PATIENCE["first"][1]))
    with pytest.raises(UserError, match=r"cannot be reached at http://127.0.0.1:1 \(AWS_ENDPOINT_URL\) after 2 tries"):
        Cache.open(sent)
    opened.map_chunk("mlp_out", 0)  # it has its own


def test_an_outage_in_the_middle_leaves_no_file(made: Path, sent: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.open(sent)
    monkeypatch.setattr(cache._files, "_store", Unreachable())
    with pytest.raises(UserError, match="cannot be reached"):
        cache.map_chunk("mlp_out", 0)
    assert kept(sent.local) == []
    assert (cache.path.local.root / local_copies.LOCK).read_text().strip() == "0"


class Unreachable:
    def get(self, key: str) -> bytes:
        raise UserError("cannot be reached")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "403 Forbidden: <Error><Code>InvalidAccessKeyId</Code>",
            r"access is denied \(InvalidAccessKeyId\); check .*AWS_",
        ),
        (
            "Error performing token request: GET http://169.254.169.254/latest",
            "no credentials were found; set AWS_ACCESS",
        ),
        ("HTTP error: builder error\n\nDebug source: BadScheme", "set AWS_ALLOW_HTTP=true"),
        ("strange", r"the store refused \(strange\); check the address"),
    ],
)
def test_what_a_store_says_becomes_cause_and_fix(text: str, expected: str) -> None:
    found = remote._explained(text, "s3://bucket/x")
    assert re.search(expected, found)
    assert "\n" not in found


def test_without_obstore_one_line_names_the_package(parent: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lies in an object store, which needs obstore; run: pip install obstore"):
        inventory.caches(parent)


@pytest.mark.parametrize("text", ["http://host/x", "ftp://host/x", "s3://", "s3:///"])
def test_an_address_of_no_store_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"; use s3|names no bucket"):
        place_of(text)


def test_folders_stay_folders() -> None:
    assert place_of("cache") == Path("cache")
    assert place_of("/data/a:b") == Path("/data/a:b")
    assert str(place_of("s3://b/c/")) == "s3://b/c"
    assert str(place_of("gs://b") / "x") == "gs://b/x"


def test_two_loaders_share_the_folder(made: Path, sent: Remote) -> None:
    """Both read a cache that is larger than the folder, at once; both get every row, and nobody waits for ever."""
    bound = bounded(sent, 8 * Cache.open(made).shard_bytes)
    with Loader(Cache.open(bound), 61, seed=0) as a, Loader(Cache.open(bound), 61, seed=1) as b:
        sums = [sum(int(next(loader).rows.sum()) for _ in range(16)) for loader in (a, b)]
    assert sums == [4 * sum(range(244))] * 2
    assert local_copies.kept_bytes(bound.local) <= bound.local.n_bytes


@pytest.mark.slow
def test_two_processes_share_the_folder(made: Path, sent: Remote) -> None:
    """Both read a cache that is larger than the folder, at once; both get every row."""
    code = (
        "import sys; from pathlib import Path; from itertools import islice\n"
        "from pipeline.data.address import Local, Remote; from pipeline.data.cache import Cache\n"
        "from pipeline.data.loader import Loader\n"
        "place = Remote(sys.argv[1], Local(Path(sys.argv[2]), int(sys.argv[3])))\n"
        "with Loader(Cache.open(place), 61, seed=int(sys.argv[4])) as loader:\n"
        "    print(sum(int(b.rows.sum()) for b in islice(loader, 16)))\n"
    )
    bound = str(8 * Cache.open(made).shard_bytes)
    arguments = [str(sent), str(sent.local.root), bound]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *arguments, str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in (0, 1)
    ]
    sums = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sums == [4 * sum(range(244))] * 2
    assert local_copies.kept_bytes(sent.local) <= int(bound)
