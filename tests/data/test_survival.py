"""A cache survives being killed at any moment, disks that fill up, and damage to any of its files."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import inventory, journal, root, verify
from pipeline.data.cache import Cache
from pipeline.data.caches import with_key
from pipeline.data.commands import command_of
from pipeline.data.convert import convert
from pipeline.data.layout import SITES, STORED, directory_of
from pipeline.data.options import Codec
from pipeline.data.publish import mend_root
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import Crash, FakeModel, read_everything

ROOT = Path(__file__).parents[2]
NAME = directory_of(Path(), fake.request(seed=7)).name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return fake.stored_files(fake.extract(tmp_path_factory.mktemp("cache")))


def same_command(cache_dir: Path, model: FakeModel | None = None) -> Path:
    """What a second extraction of the same request does."""
    path = cache_dir / NAME
    try:
        read_everything(path)
    except UserError:
        fake.extract(cache_dir, model)
    journal.tidy(path)
    return path


def at_work(cache_dir: Path) -> subprocess.Popen[bytes]:
    """A child that extracts and has begun to touch the disk."""
    process = subprocess.Popen([sys.executable, "-m", "tests.data.fake", str(cache_dir), "0.01"], cwd=ROOT)
    while process.poll() is None and not (cache_dir / NAME).exists():
        time.sleep(0.001)
    return process


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_goes_on_to_the_same_bytes(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """One extraction, killed twenty times: all that is finished before the last of them is removed to begin anew."""
    process = at_work(tmp_path / "timed")
    began = time.monotonic()
    assert process.wait() == 0
    whole = time.monotonic() - began
    moments, found = random.Random(0), set()
    for _ in range(20):
        process = at_work(tmp_path)
        time.sleep(moments.random() * whole)
        process.kill()
        found.add(process.wait())
        path = tmp_path / NAME
        if (path / "zarr.json").exists():  # it came through: whole, and the next one begins anew
            journal.tidy(path)
            assert fake.stored_files(path) == uninterrupted
            shutil.rmtree(path)
        else:
            with pytest.raises(UserError, match=r"is not finished|is no cache"):
                Cache.open(path)
            if moments.random() < 0.5:  # finish, and begin anew; else the next one goes on
                assert fake.stored_files(same_command(tmp_path)) == uninterrupted
                shutil.rmtree(path)
    assert -signal.SIGKILL in found
    assert fake.stored_files(same_command(tmp_path)) == uninterrupted


def no_room(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the number-th call that takes room on a disk fail (-1: none). -> the calls, as they come"""
    calls: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(function.__name__)
            if len(calls) - 1 == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return call

    for owner, name in (
        (os, "posix_fallocate"),
        (os, "fsync"),
        (os, "ftruncate"),
        (os, "pwrite"),
        (Path, "write_bytes"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return calls


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_the_same_bytes_afterwards(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls = no_room(-1, patch)
        fake.extract(tmp_path / "whole", commit_seconds=0)
        total = len(calls)
    assert len(set(calls)) == 5
    for number in sorted(random.Random(0).sample(range(total), 20)):
        with monkeypatch.context() as patch:
            no_room(number, patch)
            with pytest.raises(UserError, match=r"No space left on device; make room and run the same command again"):
                fake.extract(tmp_path / str(number), commit_seconds=0)
        assert not (tmp_path / str(number) / NAME / "zarr.json").exists() or number == total - 1
        assert fake.stored_files(same_command(tmp_path / str(number))) == uninterrupted, calls[number]
        shutil.rmtree(tmp_path / str(number))


FILES = [
    *("resid_mid/c/1/0/0", "mlp_out/c/4/0/0", "tokens/c/0/0", "norm/gain/c/0/0", "norm/bias/c/0/0"),
    *(f"{split}/{name}/c/0/0/0" for split in ("calibration", "evaluation") for name in STORED),
    *(f"{split}/tokens/c/0/0" for split in ("calibration", "evaluation")),
    *(f"stats/{site}/{part}/c/0/0" for site in SITES for part in ("mean", "std")),
    *(f"stats/{site}/rms/c/0" for site in SITES),
    *("resid_mid/zarr.json", "stats/mlp_in/rms/zarr.json", "stats/zarr.json", "calibration/zarr.json"),
]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_named_and_mended_by_making_that_file_again(
    tmp_path: Path, uninterrupted: dict[str, bytes], name: str, harm: Callable[[Path], None]
) -> None:
    path = fake.extract(tmp_path)
    harm(path / name)
    with pytest.raises(UserError) as refusal:
        read_everything(path)
    message = str(refusal.value)
    array, _, chunk = name.partition("/c/")
    assert name in message or f"chunk {chunk.split('/')[0]} of {array} " in message
    assert "\n" not in message
    assert message.endswith(command_of(fake.request(seed=7), tmp_path))
    if harm is flip and chunk:
        assert f"rm {path / name} && clt extract" in message
        (path / name).unlink()
    chunks = [file for file in path.rglob("c/**/*") if file.is_file() and file != path / name]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in chunks}
    model = FakeModel()
    fake.extract(tmp_path, model)
    assert fake.stored_files(path) == uninterrupted
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in chunks} == before
    computed = {"resid_mid": 21, "mlp_out": 21, "calibration": 2, "evaluation": 2, "stats": 21}
    expected = 0 if not chunk or "tokens" in name else computed.get(name.split("/")[0], 0)
    assert model.n_calls <= expected
    assert (model.n_calls > 0) == (expected > 0)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


HARMS = [flip, truncate, cut_short, empty, Path.unlink]


def chunk_times(path: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in path.rglob("c/**/*") if file.is_file()}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_zarr_json_is_put_back_by_the_command_in_the_refusal_and_nothing_is_extracted(
    tmp_path: Path, uninterrupted: dict[str, bytes], harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = fake.extract(tmp_path)
    before, times = (path / "zarr.json").read_bytes(), chunk_times(path)
    harm(path / "zarr.json")
    what = "missing" if harm is Path.unlink else "damaged"
    command = re.escape(command_of(fake.request(seed=7), tmp_path))
    with pytest.raises(UserError, match=rf"{path}/zarr\.json is {what}; put it back with: {command}$"):
        read_everything(path)
    with pytest.raises(UserError, match="put it back with"):
        with_key(tmp_path, NAME[-12:], fake.request(seed=7))
    found = inventory.look(path)
    assert found is not None
    assert found.state is inventory.State.damaged
    assert "put it back with" in found.detail
    mend_root(path, fake.request(seed=7))
    assert "put back from its copy" in caplog.text
    assert (path / "zarr.json").read_bytes() == before
    assert not (path / ".journal").exists()
    assert fake.stored_files(path) == uninterrupted
    assert chunk_times(path) == times


def test_every_flipped_bit_of_zarr_json_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Seven bits of some bytes, all parts of the file among them: what still opens says the same."""
    path = fake.extract(tmp_path)
    whole = (path / "zarr.json").read_bytes()
    attributes = root.attributes_in(whole)
    assert attributes is not None
    n_noticed = 0
    places = [*range(0, len(whole), 37), *range(len(whole) - 60, len(whole))]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << (place % 7)
        seen = root.attributes_in(bytes(data))
        assert seen is None or seen == attributes
        n_noticed += seen is None
    assert n_noticed > 0.6 * len(places)  # the rest are spaces that became other white space, or part of no word


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_copy_is_named_by_verify_and_made_again_from_zarr_json(
    tmp_path: Path, uninterrupted: dict[str, bytes], harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = fake.extract(tmp_path)
    times = chunk_times(path)
    harm(path / root.COPY)
    read_everything(path)  # readers need it not
    problems = list(verify.problems(path, Cache.open(path).attributes, lambda n: None))
    assert [problem.file for problem in problems] == [path / root.COPY]
    model = FakeModel()
    fake.extract(tmp_path, model)
    assert f"{root.COPY} was missing or damaged: made again from zarr.json" in caplog.text
    assert model.n_calls == 0
    assert fake.stored_files(path) == uninterrupted
    assert chunk_times(path) == times


@pytest.mark.parametrize("harm", [flip, truncate])
def test_a_damaged_manifest_without_its_copy_is_refused_and_nothing_is_touched(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = fake.extract(tmp_path)
    harm(path / "zarr.json")
    harm(path / root.COPY)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for attempt in (read_everything, lambda path: fake.extract(path.parent)):
        with pytest.raises(UserError, match=rf"{path}/zarr\.json is damaged.*; remove {path} and make it again"):
            attempt(path)
    journal.tidy(path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_without_a_manifest_and_its_copy_a_cache_is_made_again_from_the_start(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """What is in its files is not known to belong to this model and text."""
    path = fake.extract(tmp_path)
    (path / "zarr.json").unlink()
    flip(path / root.COPY)
    with pytest.raises(UserError, match=r"it has no zarr\.json"):
        Cache.open(path)
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == uninterrupted
    assert model.n_calls == 25


def test_a_copy_of_another_request_is_not_put_back(tmp_path: Path) -> None:
    path = fake.extract(tmp_path)
    (path / "zarr.json").unlink()
    mend_root(path, fake.request(seed=8))
    assert not (path / "zarr.json").exists()


@pytest.mark.parametrize("step", range(8))
def test_a_copy_never_makes_a_half_mended_cache_look_finished(
    tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Stopped before the step-th file that a repair removes or renames: a shard is gone, so is its checksum."""
    path = fake.extract(tmp_path)
    (path / "resid_mid/c/1/0/0").unlink()
    left = step
    names = {"unlink": Path.unlink, "replace": Path.replace}

    def counted(name: str) -> Callable[..., Any]:
        def call(self: Path, *arguments: Any, **more: Any) -> Any:
            nonlocal left
            if not left:
                raise Crash
            left -= 1
            return names[name](self, *arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(Path, name, counted(name))
        with pytest.raises(Crash):
            fake.extract(tmp_path, after_block=lambda n: None)
    with pytest.raises(UserError, match=r"is missing|is not finished"):
        read_everything(path)
    mend_root(path, fake.request(seed=7))
    with pytest.raises(UserError, match=r"is missing|is not finished"):
        read_everything(path)
    assert fake.stored_files(fake.extract(tmp_path)) == uninterrupted


def test_an_unfinished_cache_with_a_stale_copy_is_unfinished(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """As a loss of power may leave it."""
    path = fake.extract(tmp_path)
    stale = (path / root.COPY).read_bytes()
    (path / "resid_mid/c/1/0/0").unlink()

    def stop(number: int) -> None:
        (path / root.COPY).write_bytes(stale)
        raise Crash

    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop)
    mend_root(path, fake.request(seed=7))
    with pytest.raises(UserError, match="is not finished"):
        read_everything(path)
    assert fake.stored_files(fake.extract(tmp_path)) == uninterrupted


def test_a_converted_cache_has_its_zarr_json_put_back_too(tmp_path: Path) -> None:
    raw = Cache.open(fake.extract(tmp_path))
    path = convert(raw, Codec["int8"])
    before, times = fake.stored_files(path), chunk_times(path)
    for harm in (flip, Path.unlink):
        harm(path / "zarr.json")
        assert convert(raw, Codec["int8"]) == path
        assert fake.stored_files(path) == before
        assert chunk_times(path) == times
