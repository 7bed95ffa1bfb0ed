"""Several processes that fill one cache."""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import journal
from pipeline.data.cache import Cache
from pipeline.data.journal import Journal
from pipeline.data.layout import directory_of
from pipeline.data.loader import Loader
from pipeline.data.options import Write
from pipeline.data.parts import Locks, Part, part_of
from pipeline.data.tokens import Split
from pipeline.data.writer import Writer
from pipeline.errors import UserError
from pipeline.files import take_lock
from tests.data import fake
from tests.data.fake import Crash, FakeModel

NAME = directory_of(Path(), fake.request(seed=7)).name
N_BLOCKS = 9
WRITES = [Write.scatter, Write.spill]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return fake.stored_files(fake.extract(tmp_path_factory.mktemp("cache")))


def start(directory: Path, part: str, write: Write = Write.auto, seconds: float = 0.01) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.data.fake", str(directory), str(seconds), part, write]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def test_a_part_is_named_by_the_option_or_by_torchrun() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert part_of(None, {}) is None
    assert part_of("3/16", {}) == Part(3, 16)
    assert part_of(None, torchrun) == part_of("1/4", torchrun) == Part(1, 4)
    assert part_of(None, {"RANK": "0", "WORLD_SIZE": "1"}) is None
    for wrong in ("16/16", "3", "-1/4", "a/b", "1/0", ""):
        with pytest.raises(UserError, match=f"extract.part={wrong} is no part; write I/N"):
            part_of(wrong, {})
    with pytest.raises(UserError, match=r"extract\.part=0/4, but torchrun made this process 1/4; leave"):
        part_of("0/4", torchrun)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("n", [1, 2, 3, 12])
def test_parts_one_after_the_other_give_the_bytes_of_one_process(
    tmp_path: Path, alone: dict[str, bytes], n: int, write: Write
) -> None:
    order = list(range(n))
    random.Random(n).shuffle(order)
    calls = 0
    for i in order:
        assert not (tmp_path / NAME / "zarr.json").exists()
        model = FakeModel()
        path = fake.extract(tmp_path, model, part=f"{i}/{n}", write=write)
        calls += model.n_calls
    assert fake.stored_files(path) == alone
    assert calls == 25  # nothing was done twice


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("seed", range(4))
def test_parts_whose_blocks_interleave_give_the_same_bytes(
    tmp_path: Path, alone: dict[str, bytes], write: Write, seed: int
) -> None:
    """Three writers at once in one process, each step of a random one of them; plans are made before anybody starts."""
    model, rng, n_published = FakeModel(), random.Random(seed), 0
    plans = [fake.plan_of(tmp_path, model, fake.pack(), "0.0015", 6, seed=7) for _ in range(3)]
    at_work: dict[int, Writer] = {}
    left = {}
    waiting = [0, 1, 2]
    rng.shuffle(waiting)
    while waiting or at_work:
        if waiting and (not at_work or rng.random() < 0.3):
            i = waiting.pop()
            at_work[i] = Writer(plans[i], 0, Part(i, 3), write).__enter__()
            left[i] = list(at_work[i].todo)
        i = rng.choice(sorted(at_work))
        writer = at_work[i]
        if left[i]:
            fake.fill(writer, model, left[i].pop(rng.randrange(len(left[i]))))
        else:
            if writer.finish():
                writer.publish()
                n_published += 1
            at_work.pop(i).__exit__(None, None, None)
    assert n_published == 1
    assert fake.stored_files(tmp_path / NAME) == alone


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES)
def test_parts_at_the_same_time_give_the_same_bytes(tmp_path: Path, alone: dict[str, bytes], write: Write) -> None:
    """Real processes, of which one is killed and started again."""
    killed, *others = [start(tmp_path, f"{i}/3", write, seconds=0.03) for i in range(3)]
    while killed.poll() is None and not list(tmp_path.glob("*/.journal/blocks-0")):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert [process.wait() for process in others] == [0, 0]
    with pytest.raises(UserError, match="is not finished"):
        Cache.open(tmp_path / NAME)
    done = set(range(N_BLOCKS)) - {3, 6}
    assert done <= blocks_done(tmp_path / NAME)
    assert start(tmp_path, "0/3", write).wait() == 0
    assert fake.stored_files(tmp_path / NAME) == alone


def blocks_done(path: Path) -> set[int]:
    opened = Journal(path)
    try:
        return opened.load((3, 2, fake.L, fake.D))
    finally:
        opened.close()


@pytest.mark.parametrize("write", WRITES)
def test_the_whole_command_does_what_parts_have_left(tmp_path: Path, alone: dict[str, bytes], write: Write) -> None:
    fake.extract(tmp_path, part="1/3", write=write)

    def crash(number: int) -> None:
        raise Crash

    with pytest.raises(Crash):
        fake.extract(tmp_path, part="0/2", after_block=crash, write=write)
    model = FakeModel()
    assert fake.stored_files(fake.extract(tmp_path, model)) == alone
    assert model.n_calls == 25 - 3 * 3 + 1 - 3  # without blocks 1, 4, 7 (of two passes) and 0


def test_whoever_would_disturb_is_refused(tmp_path: Path, alone: dict[str, bytes]) -> None:
    def meanwhile(number: int) -> None:
        with pytest.raises(UserError, match=rf"another process \({os.getpid()}\) is making part 0/2 of .*{NAME}; wait"):
            fake.extract(tmp_path, part="0/2")
        with pytest.raises(UserError, match=rf"part 0/2 of .*{NAME} are being made by other processes; wait for them"):
            fake.extract(tmp_path)
        with pytest.raises(UserError, match=r"part 0/2 of .* is being made, which does not go with 1/3; .*part=I/2"):
            fake.extract(tmp_path, part="1/3")

    fake.extract(tmp_path, part="0/2", after_block=meanwhile)
    fake.extract(tmp_path, part="1/3")  # one after the other is fine

    def whole(number: int) -> None:
        with pytest.raises(UserError, match=rf"another process \({os.getpid()}\) is making .*{NAME}; wait for it"):
            fake.extract(tmp_path, part="0/2")

    assert fake.stored_files(fake.extract(tmp_path, after_block=whole)) == alone


@pytest.mark.slow
def test_of_parts_that_end_at_the_same_moment_one_publishes(tmp_path: Path, alone: dict[str, bytes]) -> None:
    """All have noted their blocks and stepped back before any of them asks for the lock."""
    plan = fake.plan_of(tmp_path, FakeModel(), fake.pack(), "0.0015", 6, seed=7)
    writers = [Writer(plan, 0, Part(i, 3)).__enter__() for i in range(3)]
    for writer in writers:
        for block in writer.todo:
            fake.fill(writer, FakeModel(), block)
        writer._commit()
        writer._journal.locks.step_back()
    assert [writer.finish() for writer in writers] == [True, False, False]
    late = start(tmp_path, "0/1")
    writers[0].publish()
    writers[0].__exit__(None, None, None)
    assert not writers[1].finish()  # asked again, it finds the cache finished
    assert writers[1].is_finished
    for writer in writers[1:]:
        writer.__exit__(None, None, None)
    assert late.wait() == 0  # waited, or found it there
    journal.tidy(tmp_path / NAME)
    assert fake.stored_files(tmp_path / NAME) == alone


def test_a_part_that_starts_while_the_cache_is_finished_waits_and_finds_it(
    tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fake.plan_of(tmp_path, FakeModel(), fake.pack(), "0.0015", 6, seed=7)
    last = Writer(plan, 0, Part(0, 1)).__enter__()
    for block in last.todo:
        fake.fill(last, FakeModel(), block)
    assert last.finish()
    flock, waited = fcntl.flock, []

    def wait(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH:  # the late part waits: meanwhile the cache is finished
            waited.append(fd)
            monkeypatch.setattr(fcntl, "flock", flock)
            last.publish()
            last.__exit__(None, None, None)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", wait)
    with Writer(plan, 0, Part(1, 2)) as late:
        assert late.is_finished
    assert waited
    journal.tidy(plan.path)
    assert fake.stored_files(plan.path) == alone


def test_a_part_that_waited_for_a_directory_that_has_gone_keeps_others_out_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part that finished the cache has removed `.journal`, with the locks in it."""
    directory, flock = tmp_path / ".journal", fcntl.flock

    def removed_meanwhile(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_SH:
            monkeypatch.setattr(fcntl, "flock", flock)
            shutil.rmtree(directory)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    locks = Locks(directory, tmp_path, Part(0, 2))
    with pytest.raises(UserError, match="another process"):
        take_lock(directory, tmp_path, "setup")
    locks.set_up()
    Locks(directory, tmp_path, Part(1, 2)).set_up()
    with pytest.raises(UserError, match=r"another process .* is making part 0/2"):
        Locks(directory, tmp_path, Part(0, 2))


def test_what_another_part_is_just_noting_is_left_alone(tmp_path: Path) -> None:
    def half_written(number: int) -> None:
        aside = tmp_path / NAME / ".journal/blocks-99.aside"
        aside.write_bytes(b"half")
        fake.extract(tmp_path, part="1/2")
        assert aside.exists()
        raise Crash

    with pytest.raises(Crash):
        fake.extract(tmp_path, part="0/2", after_block=half_written)


def test_parts_make_a_damaged_cache_whole(tmp_path: Path, alone: dict[str, bytes]) -> None:
    path = fake.extract(tmp_path)
    (path / "resid_mid/c/1/0/0").unlink()
    (path / "stats/mlp_out/std/c/0/0").unlink()
    shards = list(path.glob("mlp_out/c/*/0/0"))
    times = {file: file.stat().st_mtime_ns for file in shards}
    calls = []
    for i in range(2):
        model = FakeModel()
        fake.extract(tmp_path, model, part=f"{i}/2")
        calls.append(model.n_calls)
    assert calls == [12, 9]  # 7 training blocks for the statistics
    assert fake.stored_files(path) == alone
    assert {file: file.stat().st_mtime_ns for file in shards} == times


def test_shards_that_go_while_parts_are_at_work_are_not_made_anew_under_them(tmp_path: Path) -> None:
    def meanwhile(number: int) -> None:
        (tmp_path / NAME / "resid_mid/c/1/0/0").unlink()
        with pytest.raises(UserError, match=r"c/1/0/0 has gone while others are at work; stop the other parts \(0/2\)"):
            fake.extract(tmp_path, part="1/2")
        raise Crash

    with pytest.raises(Crash):
        fake.extract(tmp_path, part="0/2", after_block=meanwhile)


N_CONTEXTS, CONTEXT, BATCH, EPOCHS = 1200, 64, 2400, 3


@pytest.mark.parametrize(
    ("n", "write"), [(1, Write.scatter), (2, Write.scatter), (1, Write.spill)], ids=["one", "two parts", "spill"]
)
def test_batches_mix_contexts_as_an_ideal_shuffle_does(tmp_path: Path, n: int, write: Write) -> None:
    """Pairs of rows of the same context in a batch are within 2 % of what drawing without replacement gives: 74,000 an
    epoch, so chance alone makes 0.4 %. 1,200 contexts of 63 rows in 48 shards; a batch takes from two or three."""
    sizes = {Split.train: (N_CONTEXTS, 0), Split.calibration: (2, 0), Split.evaluation: (2, 0)}
    packed = fake.pack(sizes=sizes, context=CONTEXT)
    for i in range(n):
        more = {"shard_mb": "0.0453", "block_contexts": 100, "batch_tokens": 6400}
        path = fake.extract(tmp_path, packed=packed, part=f"{i}/{n}", write=write, **more)
    cache = Cache.open(path)
    assert len(cache.shards()) == 48
    n_batches, pairs = EPOCHS * cache.n_rows // BATCH, 0
    with Loader(cache, BATCH, seed=0) as loader:
        for batch in islice(loader, n_batches):
            context, _, _ = cache.locate(batch.rows.numpy())
            counts = np.bincount(context)
            pairs += int((counts * (counts - 1) // 2).sum())
    ideal = n_batches * BATCH * (BATCH - 1) / 2 * (CONTEXT - 2) / (cache.n_rows - 1)
    assert abs(pairs / ideal - 1) < 0.02
