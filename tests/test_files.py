"""Locked directories: who removes one does not disturb who comes next. Files of tensors: who may read them."""

import os
import stat
from pathlib import Path

import pytest
import torch

from pipeline import files
from pipeline.errors import UserError
from pipeline.files import empty_held, holder, remove_empty, remove_held, save_tensors, take_lock
from tests.dist import processes


def filled(directory: Path) -> int:
    lock = take_lock(directory, "this")
    (directory / "inner").mkdir()
    (directory / "inner" / "file").write_text("x")
    (directory / "link").symlink_to(directory / "inner")
    return lock


def test_a_held_directory_is_emptied_but_for_its_lock(tmp_path: Path) -> None:
    lock = filled(tmp_path / "a")
    empty_held(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["lock"]
    with pytest.raises(UserError, match="another process"):
        take_lock(tmp_path / "a", "this")
    remove_held(tmp_path / "a")
    os.close(lock)
    assert not (tmp_path / "a").exists()


def test_a_directory_that_another_process_has_locked_anew_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the lock and that of the directory."""
    lock, others = filled(tmp_path / "a"), []

    def meanwhile(directories: list[Path]) -> None:
        others.append(take_lock(tmp_path / "a", "this"))
        remove_empty(directories)

    monkeypatch.setattr(files, "remove_empty", meanwhile)
    remove_held(tmp_path / "a")
    os.close(lock)
    assert holder(tmp_path / "a") == str(os.getpid())
    os.close(others[0])


def test_only_empty_directories_go(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    remove_empty(
        [tmp_path / "a" / "b" / "c" / "none", tmp_path / "a" / "b" / "c", tmp_path / "a" / "b", tmp_path / "a"]
    )
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_processes_that_lock_and_remove_the_same_directory_never_meet_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "packing" / "cache"

    def work() -> int:
        for _ in range(150):
            lock = take_lock(folder, "this", wait="it is at work")
            (folder / "alone").touch(exist_ok=False)
            (folder / "inner").mkdir()
            remove_held(folder)
            os.close(lock)
            remove_empty([folder, folder.parent])
        return 150

    assert processes.run(4, work) == [150] * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_lock_where_a_file_or_a_dead_link_is_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OSError, match=r"File exists|Not a directory"):
            take_lock(tmp_path / name / inside, "this")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that makes no directories")
def test_a_lock_where_no_directory_can_be_made_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match="/proc/none"):
        take_lock(Path("/proc/none/deeper"), "this")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_file_of_tensors_may_be_read_by_whom_any_new_file_may(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "any").touch()
        for _ in range(2):  # the second time over the first
            save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("any", "a.safetensors")}
    assert modes == {0o666 & ~umask}


def test_files_of_tensors_are_written_through_one_function() -> None:
    package = Path(files.__file__).parent
    callers = {str(f.relative_to(package)) for f in package.rglob("*.py") if "save_file" in f.read_text()}
    assert callers == {"files.py"}
