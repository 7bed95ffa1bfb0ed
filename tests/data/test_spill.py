"""Rows that reach their shards through bucket files."""

import errno
import logging
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import shards, spill
from pipeline.data.cache import Cache
from pipeline.data.journal import Journal
from pipeline.data.layout import directory_of
from pipeline.data.options import Write
from pipeline.data.parts import Part
from pipeline.data.writer import Writer
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import Crash, FakeModel, stop_after

NAME = directory_of(Path(), fake.request(seed=7)).name
N_BLOCKS = 9


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return fake.stored_files(fake.extract(tmp_path_factory.mktemp("cache"), write=Write.scatter))


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the five shards of 1,470 bytes each."""
    monkeypatch.setattr(spill, "BUCKET_BYTES", 3000)


def buckets(path: Path) -> list[str]:
    folder = path / ".journal/spill"
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.whole"))


def test_rows_lie_in_buckets_until_the_end_and_give_the_bytes_of_scattering(
    tmp_path: Path, scattered: dict[str, bytes]
) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(N_BLOCKS - 1), write=Write.spill)
    arrays = ("mlp_out", "resid_mid")
    held_out = [f"{split}/{name}/0.whole" for split in ("calibration", "evaluation") for name in arrays]
    assert buckets(tmp_path / NAME) == sorted([f"{name}/{i}.whole" for name in arrays for i in range(3)] + held_out)
    assert not list((tmp_path / NAME).glob("*/c/*/0/0/*"))
    assert sum(file.stat().st_size for file in (tmp_path / NAME / ".journal/spill").rglob("*.whole")) == 286 * 2 * 38
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == scattered  # goes on as it was begun
    assert model.n_calls == 0


@pytest.mark.parametrize("commit_seconds", [0.0, 1e9])
def test_a_torn_tail_is_cut_and_blocks_are_done_again(
    tmp_path: Path, scattered: dict[str, bytes], commit_seconds: float
) -> None:
    """Stopped after every block, with bytes behind what was recorded, as a loss of power leaves them."""
    for number in range(N_BLOCKS):
        with pytest.raises(Crash):
            fake.extract(tmp_path, after_block=stop_after(number), commit_seconds=commit_seconds, write=Write.spill)
        for name in buckets(tmp_path / NAME):
            with (tmp_path / NAME / ".journal/spill" / name).open("ab") as file:
                file.write(b"\xff" * 7)
    path = fake.extract(tmp_path)
    assert fake.stored_files(path) == scattered


def test_the_tail_of_a_part_that_never_came_back_is_not_read(tmp_path: Path, scattered: dict[str, bytes]) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, part="0/2", after_block=stop_after(4), write=Write.spill)
    for file in (tmp_path / NAME / ".journal/spill").rglob("*.0-of-2"):
        with file.open("ab") as stream:
            stream.write(b"\xff" * 80)
    assert fake.stored_files(fake.extract(tmp_path)) == scattered


def test_stopped_anywhere_in_sorting_it_goes_on_to_the_same_bytes(
    tmp_path: Path, scattered: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0
    write_shard, unlink = shards.write_shard, Path.unlink

    def step() -> None:
        nonlocal left
        if not left:
            raise Crash
        left -= 1

    def write(*arguments: Any) -> int:
        step()
        return write_shard(*arguments)

    def remove(self: Path, missing_ok: bool = False) -> None:
        if "spill" in self.parts:
            step()
        unlink(self, missing_ok)

    monkeypatch.setattr(spill, "write_shard", write)
    monkeypatch.setattr(Path, "unlink", remove)
    with pytest.raises(Crash):
        fake.extract(tmp_path, write=Write.spill, commit_seconds=0)
    for n in range(1, 4):  # each start comes some steps further
        for _ in range(2):
            left, model = n, FakeModel()
            with pytest.raises(Crash):
                fake.extract(tmp_path, model)
            assert model.n_calls == 0
    assert any((tmp_path / NAME).glob("*/c/*/0/0"))
    left, model = 1000, FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == scattered
    assert model.n_calls == 0


def test_buckets_that_have_gone_do_not_become_zeros(
    tmp_path: Path, scattered: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(5), write=Write.spill)
    (tmp_path / NAME / ".journal/spill/mlp_out/1.whole").unlink()
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == scattered
    assert "mlp_out/1.whole has gone: extracting from the start" in caplog.text
    assert model.n_calls == 25


def test_a_missing_shard_is_made_again_through_buckets(tmp_path: Path, scattered: dict[str, bytes]) -> None:
    path = fake.extract(tmp_path)
    (path / "resid_mid/c/1/0/0").unlink()
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(1), write=Write.spill)
    assert buckets(path) == ["resid_mid/0.whole"]  # nothing of what is whole
    assert fake.stored_files(fake.extract(tmp_path)) == scattered


def test_a_block_is_noted_only_after_its_rows_and_their_lengths_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    fsync, append, file_of = os.fsync, Journal.append, spill.Spill._file
    written: set[Path] = set()

    def note_sync(fd: int) -> None:
        synced.add(Path(f"/proc/self/fd/{fd}").resolve())
        fsync(fd)

    def note_write(self: spill.Spill, name: str, bucket: int) -> Any:
        written.add(self._folder / name / f"{bucket}.whole")
        synced.difference_update(written)
        return file_of(self, name, bucket)

    def note_block(self: Journal, numbers: list[int], sums: Any) -> None:
        assert written
        assert written <= synced
        assert self.directory / "spill/whole.lengths.aside" in synced
        synced.clear()
        written.clear()
        append(self, numbers, sums)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(spill.Spill, "_file", note_write)
    monkeypatch.setattr(Journal, "append", note_block)
    fake.extract(tmp_path, commit_seconds=0, write=Write.spill)


def test_few_files_are_open_at_a_time(
    tmp_path: Path, scattered: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    most, file_of = 0, spill.Spill._file

    def few(self: spill.Spill, name: str, bucket: int) -> Any:
        nonlocal most
        self._limit = 2
        result = file_of(self, name, bucket)
        most = max(most, len(self._open))
        return result

    monkeypatch.setattr(spill.Spill, "_file", few)
    assert fake.stored_files(fake.extract(tmp_path, write=Write.spill)) == scattered
    assert most == 2
    monkeypatch.setattr(spill, "MAX_BUCKETS", 2)
    assert spill._shards_of_a_bucket(Cache.open(tmp_path / NAME).specs["mlp_out"]) == 3


def test_what_was_begun_one_way_goes_on_so(
    tmp_path: Path, scattered: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(2), write=Write.scatter)
    assert fake.stored_files(fake.extract(tmp_path, write=Write.spill)) == scattered
    assert "was begun with cache.write=scatter and goes on so" in caplog.text


Usage = namedtuple("Usage", "total used free")


def test_space_for_the_buckets_is_counted_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake.plan_of(tmp_path / "new/cache", FakeModel(), fake.pack(), "0.0015", 6, seed=7)
    more = 286 * 2 * 8 + 2 * 1474  # row numbers, and one bucket
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, made.missing_bytes + more - 1))
    with pytest.raises(UserError, match="does not fit"), Writer(made, write=Write.spill):
        pass
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, made.missing_bytes + more))
    with Writer(made, part=Part(0, 2), write=Write.spill):
        pass


MOUNTS = """/dev/sda1 / ext4 rw 0 0
proc /proc proc rw 0 0
server:/home {0}/net nfs4 rw 0 0
/dev/sdb1 {0}/net/local xfs rw 0 0
bucket {0}/with\\040space fuse.s3fs rw 0 0
/dev/sdc1 {0}/usb fuseblk rw 0 0
10.0.0.1@tcp:/scratch {0}/scratch lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("place", "kind", "write"),
    [
        ("net/deep/inside", "nfs4", Write.spill),
        ("net/local/a", "xfs", Write.scatter),
        ("with space", "fuse.s3fs", Write.spill),
        ("usb", "fuseblk", Write.scatter),
        ("scratch", "lustre", Write.spill),
        ("network", "ext4", Write.scatter),
    ],
)
def test_network_disks_are_known_by_their_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str, write: Write
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS.format(tmp_path))
    path = tmp_path / place
    path.mkdir(parents=True)
    assert spill.file_system(path, mounts) == kind
    assert spill.file_system(path, tmp_path / "no mounts") == ""
    monkeypatch.setattr(spill, "file_system", lambda path: kind)
    assert spill.choose(Write.auto, path) is write
    for wanted in (Write.scatter, Write.spill):
        assert spill.choose(wanted, path) is wanted
    assert not list(path.glob(".journal/*"))  # what was tried out is gone


@pytest.mark.parametrize("refused", ["posix_fallocate", "mmap"])
def test_a_disk_that_refuses_maps_is_spilled_to(
    tmp_path: Path,
    scattered: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refused: str,
) -> None:
    caplog.set_level(logging.INFO)
    number = errno.EOPNOTSUPP

    place = os if refused == "posix_fallocate" else spill.mmap
    function = getattr(place, refused)

    def refuse(*arguments: Any, **more: Any) -> Any:
        if more.get("access") == spill.mmap.ACCESS_READ:
            return function(*arguments, **more)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(place, refused, refuse)
    assert fake.stored_files(fake.extract(tmp_path)) == scattered
    assert "cache.write=auto: spill, since the disk of" in caplog.text
    number = errno.ENOSPC  # says nothing about maps
    with pytest.raises(UserError, match="No space left on device"):
        fake.extract(tmp_path / "other")
