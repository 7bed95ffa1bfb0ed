"""What lies under a cache directory is named as what it is; removing takes all of it or nothing."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.data import caches, condition, inventory, verify
from pipeline.data.inventory import State
from pipeline.data.layout import JOURNAL, spec_of
from pipeline.errors import UserError
from pipeline.files import holder, take_lock
from tests.data import fake


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.extract(tmp_path_factory.mktemp("made"))


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """A whole cache under tmp_path."""
    shutil.copytree(made, tmp_path / made.name)
    return tmp_path / made.name


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """Stopped when 2 of 9 blocks (7 of training, one each held out) were in the journal."""

    def stop(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fake.extract(tmp_path, seed=3, after_block=stop)
    (path,) = tmp_path.glob("*/.journal")
    return path.parent


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def state_of(path: Path) -> State:
    found = inventory.look(path)
    assert found is not None
    return found.state


def test_a_finished_cache_is_complete(path: Path, tmp_path: Path) -> None:
    (found,) = inventory.caches(tmp_path)
    assert (found.path, found.state, found.detail) == (path, State.complete, "")
    assert found.path.name.endswith(found.key)
    assert found.created is not None


def test_the_size_is_what_the_disk_says(path: Path) -> None:
    counted = subprocess.run(["du", "-s", "-k", str(path)], capture_output=True, text=True, check=True).stdout
    assert inventory.size_on_disk(path) == 1024 * int(counted.split()[0])
    (path / "tokens/c/0/0").unlink()
    assert inventory.size_on_disk(path) < 1024 * int(counted.split()[0])


def test_how_far_an_unfinished_cache_has_come_is_said(unfinished: Path) -> None:
    found = inventory.look(unfinished)
    assert found is not None
    assert (found.state, found.detail, found.created) == (State.unfinished, "22 %", None)
    assert found.about["n_rows"]["train"] == 244


def test_one_that_is_being_made_names_the_process(unfinished: Path, tmp_path: Path) -> None:
    for folder in (unfinished / JOURNAL, tmp_path / ".packing" / unfinished.name):
        lock = take_lock(folder, unfinished)
        found = inventory.look(unfinished)
        assert found is not None
        assert (found.state, found.detail) == (State.at_work, f"being made by process {os.getpid()}, 22 %")
        os.close(lock)
    assert state_of(unfinished) is State.unfinished


def test_asking_who_is_at_work_takes_no_lock_and_makes_nothing(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    lock = take_lock(tmp_path, tmp_path)
    assert holder(tmp_path) == str(os.getpid())
    os.close(lock)
    assert holder(tmp_path) is None
    os.close(take_lock(tmp_path, tmp_path))
    parts = [take_lock(tmp_path, tmp_path, shared=True) for _ in range(2)]  # of one extraction, at work together
    assert holder(tmp_path) is not None
    for part in parts:
        os.close(part)
    assert holder(tmp_path) is None


def test_one_that_was_only_just_begun_is_unfinished(tmp_path: Path) -> None:
    os.close(take_lock(tmp_path / "a" / JOURNAL, tmp_path))
    found = inventory.look(tmp_path / "a")
    assert found is not None
    assert (found.state, found.detail) == (State.unfinished, "0 %")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert inventory.look(tmp_path / "a") is None


def test_one_that_is_being_mended_counts_its_shards(path: Path) -> None:
    def stop(number: int) -> None:
        raise KeyboardInterrupt

    (path / "mlp_out/c/2/0/0").unlink()
    with pytest.raises(KeyboardInterrupt):
        fake.extract(path.parent, after_block=stop)
    found = inventory.look(path)
    assert found is not None
    assert (found.state, found.detail) == (State.unfinished, "1 of 14 shards to be made again")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: (path / "mlp_out/c/2/0/0").unlink(), "chunk 2 of mlp_out is missing"),
        (lambda path: flip(path / "tokens/zarr.json", 3), "tokens/zarr.json is missing or damaged"),
        (lambda path: (path / "zarr.json").write_text("{"), "zarr.json is damaged"),
        (lambda path: os.truncate(path / "resid_mid/c/0/0/0", 9), "chunk 0 of resid_mid is truncated"),
    ],
)
def test_what_is_damaged_is_called_so(path: Path, spoil: Callable[[Path], None], what: str) -> None:
    spoil(path)
    found = inventory.look(path)
    assert found is not None
    assert found.state is State.damaged
    assert what in found.detail


def test_another_schema_is_not_called_damaged(path: Path) -> None:
    root = json.loads((path / "zarr.json").read_bytes())
    root["attributes"]["schema"] = 0
    (path / "zarr.json").write_text(json.dumps(root))
    found = inventory.look(path)
    assert found is not None
    assert (found.state, found.detail) == (State.other, "has schema 0, this version reads 1")


def test_what_is_no_cache_of_this_program_is_left_out(path: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("x")
    other = tmp_path / "group-0123456789ab"
    other.mkdir()
    (other / "zarr.json").write_text('{"attributes": {}}')
    journal = tmp_path / "other" / JOURNAL
    journal.mkdir(parents=True)
    (journal / "state.json").write_text('{"kind": "diary"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "zarr.json").write_text("{")
    assert [found.path for found in inventory.caches(tmp_path)] == [path]
    for name in ("notes", "group-0123456789ab", "other", "broken", ".", "..", str(tmp_path), str(tmp_path / "notes")):
        with pytest.raises(UserError, match="no cache"):
            inventory.find(tmp_path, name)


def test_a_cache_is_found_by_name_path_beginning_and_key(path: Path, unfinished: Path, tmp_path: Path) -> None:
    key = path.name[-12:]
    for name in (path.name, str(path), f"{path}/", key, key[:5], path.name[:-6]):
        assert inventory.find(tmp_path, name).path == path
    with pytest.raises(UserError, match=f"several caches.*{unfinished.name}"):
        inventory.find(tmp_path, "fake-text")
    with pytest.raises(UserError, match=f"no cache gpt2 .*there are: .*{path.name}"):
        inventory.find(tmp_path, "gpt2")
    with pytest.raises(UserError, match="another directory is named with --cache-dir"):
        inventory.find(tmp_path, "cache.dir=/data")


def test_an_empty_name_never_means_the_only_cache(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an empty name"):
        inventory.find(tmp_path, "")


def test_removing_leaves_nothing_and_says_what_it_freed(path: Path, tmp_path: Path) -> None:
    packing = tmp_path / ".packing" / path.name / "tokens"
    packing.mkdir(parents=True)
    (packing / "train.i32").write_bytes(bytes(5000))
    found = inventory.find(tmp_path, path.name)
    n_bytes = inventory.size_on_disk(tmp_path) - 4096 * 2  # but for tmp_path and .packing themselves
    freed = inventory.remove(found)
    assert abs(freed - n_bytes) <= 4096 * 3  # the locks, too
    assert list(tmp_path.iterdir()) == []


def test_a_reader_never_sees_half_a_cache(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree, seen = shutil.rmtree, []

    def watched(folder: Path) -> None:
        seen.append((inventory.caches(tmp_path), caches.newest(tmp_path), path.exists()))
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", watched)
    inventory.remove(inventory.find(tmp_path, path.name))
    assert len(seen) > 3
    assert all(look == ([], None, False) for look in seen)


def test_an_interrupted_removal_is_a_leftover_that_can_be_finished(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inventory.remove(inventory.find(tmp_path, path.name))
    (left,) = inventory.leftovers(tmp_path)
    assert (left.kind, left.owner) == ("removed", None)
    assert inventory.caches(tmp_path) == []
    assert inventory.remove_removed(left.path) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [JOURNAL, "packing"])
def test_a_cache_at_work_is_not_removed(unfinished: Path, tmp_path: Path, folder: str) -> None:
    found = inventory.find(tmp_path, unfinished.name)
    place = tmp_path / ".packing" / unfinished.name if folder == "packing" else unfinished / JOURNAL
    lock = take_lock(place, unfinished)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"another process .{os.getpid()}. is making"):
        inventory.remove(found)
    assert sorted(tmp_path.rglob("*")) == before
    os.close(lock)


def test_a_link_is_shown_and_not_followed_when_removing(made: Path, tmp_path: Path) -> None:
    link = tmp_path / made.name
    link.symlink_to(made)
    assert state_of(link) is State.complete
    with pytest.raises(UserError, match="is a link; remove"):
        inventory.remove(inventory.find(tmp_path, made.name))
    assert (made / "zarr.json").exists()


def check(path: Path) -> set[tuple[str, int, str]]:
    found = inventory.look(path)
    assert found is not None
    total = 0

    def report(n: int) -> None:
        nonlocal total
        total += n

    problems = list(verify.problems(path, found.about, report))
    specs = condition.read_attributes(path)["manifest"]["arrays"].values()
    spec = [spec_of(entry) for entry in specs]
    assert total == sum(each.n_chunks * each.file_bytes for each in spec)  # the bar ends at its end
    return {(problem.array or problem.file.name, problem.chunk, problem.what) for problem in problems}


def test_nothing_is_wrong_with_a_whole_cache(made: Path) -> None:
    assert check(made) == set()


def test_every_damage_is_found_not_only_the_first(path: Path) -> None:
    flip(path / "resid_mid/c/0/0/0", 100)
    flip(path / "resid_mid/c/4/0/0", -3)  # of the checksum that only Zarr reads
    flip(path / "resid_mid/c/4/0/0", -3)
    flip(path / "mlp_out/c/4/0/0", -3)
    flip(path / "evaluation/resid_mid/c/0/0/0", 0)
    flip(path / "stats/mlp_in/std/c/0/0", 7)
    flip(path / "norm/zarr.json", 5)
    os.truncate(path / "mlp_out/c/1/0/0", 20)
    (path / "mlp_out/c/3/0/0").unlink()
    (path / "calibration/tokens/c/0/0").write_bytes(bytes(9999))
    (path / "stats/mlp_out/rms/c/0").unlink()
    wrong = "does not hold what was written (wrong checksum)"
    assert check(path) == {
        ("resid_mid", 0, wrong),
        ("mlp_out", 4, "ends with a checksum that is not its own"),
        ("evaluation/resid_mid", 0, wrong),
        ("stats/mlp_in/std", 0, wrong),
        ("zarr.json", 0, wrong),
        ("mlp_out", 1, "is truncated (20 bytes, not 1,474)"),
        ("mlp_out", 3, "is missing"),
        ("calibration/tokens", 0, "is too long (9,999 bytes, not 116)"),
        ("stats/mlp_out/rms", 0, "is missing"),
    }


def test_every_single_chunk_is_read(path: Path) -> None:
    files = sorted(file for file in path.rglob("c/**/*") if file.is_file())
    for file in files:
        flip(file, len(file.read_bytes()) // 2)
    assert len(check(path)) == len(files)
