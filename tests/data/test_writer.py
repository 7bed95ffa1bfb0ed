import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from pipeline.data import journal, plan, publish, root, shards, writer
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.journal import Journal
from pipeline.data.layout import directory_of
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import Crash, FakeModel, stop_after
from tests.disk import files_of_at_most

N_BLOCKS = 9  # 41, 4 and 3 contexts in blocks of 6: 7 + 1 + 1
NAME = directory_of(Path(), fake.request(seed=7)).name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return fake.stored_files(fake.extract(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("commit_seconds", [0.0, 1e9])
def test_an_extraction_that_stops_after_any_block_goes_on_to_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes], commit_seconds: float
) -> None:
    calls = []
    for number in range(N_BLOCKS):
        model = FakeModel()
        with pytest.raises(Crash):
            fake.extract(tmp_path, model, after_block=stop_after(number), commit_seconds=commit_seconds)
        calls.append(model.n_calls)
    last = FakeModel()
    path = fake.extract(tmp_path, last)
    assert fake.stored_files(path) == uninterrupted
    if commit_seconds:  # nothing was noted: every start begins anew
        assert calls == sorted(set(calls))
        assert last.n_calls == 25
    else:  # each start does one block more, the last one none
        assert calls == [3, 3, 3, 3, 3, 3, 3, 2, 2]
        assert last.n_calls == 0


def test_an_interruption_by_the_user_loses_no_finished_block(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    def interrupt(number: int) -> None:
        if number == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.extract(tmp_path, after_block=interrupt, commit_seconds=1e9)
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == uninterrupted
    assert model.n_calls == 3 * 2 + 2 + 2


def test_killed_at_an_instant_it_goes_on_to_the_same_bytes(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    command = [sys.executable, "-m", "tests.data.fake", str(tmp_path), "0.03"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while process.poll() is None and len(list(tmp_path.glob("*/.journal/blocks-*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == uninterrupted
    assert model.n_calls < 25


@pytest.mark.parametrize("step", range(20))
def test_stopped_between_any_two_steps_of_publishing_it_goes_on_to_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Crashes before the step-th call of what publishing is made of."""
    left = None

    def counted(function: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Crash
            left = None if left is None else left - 1
            return function(*args, **keywords)

        return call

    steps = [(writer, "seal"), (publish, "sync"), (publish, "zarr_metadata"), (root, "write_aside")]
    for module, name in steps:
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(Journal, "remove", counted(Journal.remove))

    def arm(number: int) -> None:
        nonlocal left
        if number == N_BLOCKS - 1:
            left = step  # 14 shards to seal, metadata, sync, root metadata, copy, root, end of the journal

    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=arm)
    left = None
    path = tmp_path / NAME
    if step < 19:
        with pytest.raises(UserError, match="is not finished"):
            Cache.open(path)
        model = FakeModel()
        fake.extract(tmp_path, model)
        assert model.n_calls == 0
    else:
        Cache.open(path)  # finished; only the journal is left
        journal.tidy(path)
    assert fake.stored_files(path) == uninterrupted


def test_a_block_is_noted_only_after_its_rows_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[Path] = set()
    rows_of: dict[int, set[Path]] = {}
    written: set[Path] = set()
    fsync, get, append = os.fsync, shards.Maps.get, Journal.append

    def note_sync(fd: int) -> None:
        synced.add(Path(f"/proc/self/fd/{fd}").resolve())
        fsync(fd)

    def note_write(self: shards.Maps, file: Path, spec: Any) -> Any:
        synced.discard(file)
        written.add(file)
        return get(self, file, spec)

    def note_block(self: Journal, numbers: list[int], sums: Any) -> None:
        assert written <= synced
        rows_of.update({number: set(written) for number in numbers})
        append(self, numbers, sums)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(shards.Maps, "get", note_write)
    monkeypatch.setattr(Journal, "append", note_block)
    fake.extract(tmp_path, commit_seconds=0)
    assert len(rows_of) == N_BLOCKS
    assert len(rows_of[0]) == 10


def test_nobody_can_open_an_unfinished_cache(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(N_BLOCKS - 1))
    with pytest.raises(UserError) as refusal:
        Cache.open(tmp_path / NAME)
    assert f"is not finished; go on with: {command_of(fake.request(seed=7), tmp_path)}" in str(refusal.value)
    for member in ("", "resid_mid", "calibration/mlp_out"):
        with pytest.raises(FileNotFoundError):
            zarr.open(tmp_path / NAME / member, mode="r")


def test_batches_and_journal_do_not_change_the_result(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """The blocks do: their sums are added in another order, so statistics may differ in the last bit."""
    assert fake.stored_files(fake.extract(tmp_path / "a", commit_seconds=0)) == uninterrupted
    other = fake.stored_files(fake.extract(tmp_path / "b", block_contexts=5))
    assert {name for name in other if other[name] != uninterrupted[name]} <= {
        name for name in other if name.startswith("stats/") or name == "zarr.json"
    }


def test_few_maps_are_open_at_a_time_and_that_changes_nothing(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0

    class Few(shards.Maps):
        def get(self, *args: Any) -> Any:
            nonlocal most
            self._limit = 2
            result = super().get(*args)
            most = max(most, len(self._open))
            return result

    monkeypatch.setattr(writer, "Maps", Few)
    assert fake.stored_files(fake.extract(tmp_path)) == uninterrupted
    assert most == 2


def test_a_second_extraction_of_the_same_cache_is_refused(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    def second(number: int) -> None:
        with pytest.raises(UserError, match=rf"another process \({os.getpid()}\) is making"):
            fake.extract(tmp_path)

    assert fake.stored_files(fake.extract(tmp_path, after_block=second)) == uninterrupted


def test_what_another_extraction_did_since_the_plan_was_made_is_noticed(tmp_path: Path) -> None:
    late = fake.plan_of(tmp_path, FakeModel(), fake.pack(), "0.0015", 6, seed=7)
    before = fake.stored_files(fake.extract(tmp_path))
    with pytest.raises(UserError, match="run the same command again"), writer.Writer(late):
        pass
    journal.tidy(late.path)
    assert fake.stored_files(late.path) == before


def test_a_lock_on_a_journal_that_was_just_removed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def removed_meanwhile(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        shutil.rmtree(tmp_path / ".journal")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    Journal(tmp_path)
    with pytest.raises(UserError, match="another process"):
        Journal(tmp_path)


def test_other_weights_or_other_tokens_do_not_go_on_with_a_cache(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(3))
    with pytest.raises(UserError, match=r"begun with another weights of the model; .* remove"):
        fake.extract(tmp_path, FakeModel(weight=1.1))
    with pytest.raises(UserError, match="begun with another text"):
        fake.extract(tmp_path, packed=fake.pack(seed=1))


def test_an_extraction_goes_on_with_the_shards_it_began_with(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(3))
    assert fake.stored_files(fake.extract(tmp_path, shard_mb="0.1", block_contexts=4)) == uninterrupted


def test_shards_that_have_gone_from_an_unfinished_cache_do_not_become_zeros(
    tmp_path: Path, uninterrupted: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(5))
    (tmp_path / NAME / "resid_mid/c/1/0/0").unlink()
    with pytest.raises(Crash):  # stopped again before the first commit
        fake.extract(tmp_path, after_block=stop_after(0), commit_seconds=1e9)
    assert "has gone" in caplog.text
    assert fake.stored_files(fake.extract(tmp_path)) == uninterrupted


def test_damaged_sums_are_made_again(
    tmp_path: Path, uninterrupted: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(5))
    sums = tmp_path / NAME / ".journal/blocks-2"
    data = bytearray(sums.read_bytes())
    data[20] ^= 4
    sums.write_bytes(data)
    (sums.parent / "blocks-1").write_bytes((sums.parent / "blocks-1").read_bytes()[:-3])
    (sums.parent / "blocks-7.aside").write_bytes(b"torn")
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == uninterrupted
    assert model.n_calls == 2 * 3 + 3 + 2 + 2  # blocks 1 and 2, then 6, 7 and 8
    assert "blocks-2 is damaged" in caplog.text


def test_one_missing_shard_is_made_again_and_the_others_are_left_alone(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    path = fake.extract(tmp_path)
    (path / "resid_mid/c/1/0/0").unlink()
    shard = path / "calibration/mlp_out/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    times = {file: file.stat().st_mtime_ns for file in path.rglob("c/**/*") if file.is_file() and file != shard}
    with pytest.raises(Crash):  # and this too may be interrupted
        fake.extract(tmp_path, after_block=stop_after(2))
    assert not (path / "zarr.json").exists()
    model = FakeModel()
    fake.extract(tmp_path, model)
    assert fake.stored_files(path) == uninterrupted
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert model.n_calls == 4 * 3 + 2  # the calibration contexts, and training blocks 3 to 6; evaluation is whole


def test_a_shard_that_goes_while_it_is_made_again_does_not_become_zeros(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    path = fake.extract(tmp_path)
    (path / "resid_mid/c/1/0/0").unlink()
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(1))
    (path / "mlp_out/c/3/0/0").unlink()
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(0), commit_seconds=1e9)
    assert fake.stored_files(fake.extract(tmp_path)) == uninterrupted


@pytest.mark.parametrize("name", ["stats/mlp_out/std/c/0/0", "norm/gain/c/0/0", "tokens/c/0/0", "stats/zarr.json"])
def test_small_files_are_made_again_too(tmp_path: Path, uninterrupted: dict[str, bytes], name: str) -> None:
    path = fake.extract(tmp_path)
    (path / name).unlink()
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == uninterrupted
    assert model.n_calls == (7 * 3 if "std" in name else 0)  # sums are not kept, so statistics need all blocks


def test_a_shard_with_few_rows_needs_few_blocks(tmp_path: Path) -> None:
    packed = fake.pack(sizes={Split.train: (20, 0), Split.calibration: (1, 0), Split.evaluation: (1, 0)})
    path = fake.extract(tmp_path, packed=packed, shard_mb="0.0001", block_contexts=1)  # 3 rows a shard
    before = fake.stored_files(path)
    context, _, _ = Cache.open(path).locate(np.arange(3, 6))
    (path / "mlp_out/c/1/0/0").unlink()
    model = FakeModel()
    fake.extract(tmp_path, model, packed, shard_mb="0.0001", block_contexts=1)
    assert model.n_calls == len(set(context.tolist()))
    assert fake.stored_files(path) == before


Usage = namedtuple("Usage", "total used free")


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake.plan_of(tmp_path / "new/cache", FakeModel(), fake.pack(), "auto", 6, seed=7)
    size = 2 * (244 + 24 + 18) * fake.L * fake.D * 2
    assert size < made.missing_bytes < size + 20_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, made.missing_bytes))
    plan.check_space(made)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, made.missing_bytes - 1))
    with pytest.raises(UserError, match=r"does not fit: .* free on / \(60 bytes a token\)"):
        plan.check_space(made)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_needs_no_space(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(3))
    again = fake.plan_of(tmp_path, FakeModel(), fake.pack(), "0.0015", 6, seed=7)
    sums = 8 * N_BLOCKS * int(np.prod(again.sums_shape))
    small = again.missing_bytes - sums  # norm and statistics
    assert 0 < small < 4000


def test_a_disk_that_does_not_take_the_files_is_found_before_any_work_and_nothing_is_left(tmp_path: Path) -> None:
    model = FakeModel()
    refused = pytest.raises(UserError, match=r"cannot write .* on .* free\): File too large; .*same command again")
    with refused, files_of_at_most(1400):  # a shard has 1,474
        fake.extract(tmp_path / "new/cache", model)
    assert model.n_calls == 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_was_done(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "blocks-4" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        UserError, match=r"cannot write .* on /.* \(.* free\): No space left on device; make room and run"
    ):
        fake.extract(tmp_path, commit_seconds=0)
    monkeypatch.undo()
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == uninterrupted
    assert model.n_calls == 3 * 3 + 2 + 2  # blocks 4 to 8


def test_a_directory_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        fake.extract(tmp_path / "file" / "cache")


def test_leftovers_of_a_start_that_never_got_going_do_not_show(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    stale = tmp_path / NAME / "resid_mid/c/4/0/0"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"x" * 1474)
    (tmp_path / NAME / "zarr.json.aside").write_text("x")
    assert fake.stored_files(fake.extract(tmp_path)) == uninterrupted


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(3))
    (tmp_path / NAME / ".journal/state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json is damaged; remove"):
        fake.extract(tmp_path)


def test_the_finished_manifest_lists_every_chunk(uninterrupted: dict[str, bytes]) -> None:
    arrays = json.loads(uninterrupted["zarr.json"])["attributes"]["manifest"]["arrays"]
    listed = {
        f"{name}/c/" + "/".join([str(i), *["0"] * (len(entry["shape"]) - 1)])
        for name, entry in arrays.items()
        for i, _ in enumerate(entry["crc32c"])
    }
    assert listed == {name for name in uninterrupted if not name.endswith("zarr.json")}
