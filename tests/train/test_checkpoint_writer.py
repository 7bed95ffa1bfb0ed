"""Checkpoints beside the training: the same files, of the moment of the save, and errors that are not lost."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.errors import UserError
from pipeline.files import atomic_directory
from pipeline.train import checkpoint, checkpoint_writer, optim
from pipeline.train.checkpoint import State
from pipeline.train.checkpoint_writer import Writer
from tests import oracle
from tests.disk import files_of_at_most
from tests.train.test_optim import NAMES, D, F, L, options, train


def new(name: str = "adam") -> tuple[Transcoder, Optimizer]:
    model = oracle.transcoder("clt", "jumprelu", L, F, D, dtype=torch.float32).train()
    return model, optim.build(model.named_parameters(), options(name))


def at(step: int) -> State:
    return State(step, torch.full((L, F), step), more={"owner/what": torch.tensor([0.5, step])})


def as_bytes(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


class Held:
    """Holds the thread back before it writes, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, write = threading.Event(), checkpoint.Saving.write

        def slow(saving: checkpoint.Saving, stop: threading.Event | None = None) -> bool:
            assert self.go.wait(20)
            return write(saving, stop)

        monkeypatch.setattr(checkpoint.Saving, "write", slow)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_those_of_the_moment_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "plain").mkdir()
    for place in ("plain", "beside"):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "metrics.jsonl").write_text('{"step": 2}\n')
    model, optimizer = new(name)
    train(model, optimizer, range(2))
    state = at(2)
    checkpoint.save(tmp_path / "plain", model, optimizer, state, {"cache": "abc"})
    held = Held(monkeypatch)
    with Writer(tmp_path / "beside", beside=True) as writer:
        writer.save(model, optimizer, state, {"cache": "abc"})
        assert checkpoint.newest(tmp_path / "beside") is None
        # Everything that the file holds moves on.
        train(model, optimizer, range(2, 3))
        state.tokens_since_fired += 1
        state.more["owner/what"].zero_()
        torch.rand(3)
        (tmp_path / "beside" / "metrics.jsonl").write_text('{"step": 3}\n')
        writer.check()
        held.go.set()
    assert as_bytes(tmp_path / "beside" / "checkpoints") == as_bytes(tmp_path / "plain" / "checkpoints")
    monkeypatch.undo()
    checkpoint.save(tmp_path / "plain", model, optimizer, state, {"cache": "abc"})
    assert as_bytes(tmp_path / "beside" / "checkpoints") != as_bytes(tmp_path / "plain" / "checkpoints")


def test_saving_beside_changes_nothing_of_the_run(tmp_path: Path) -> None:
    straight, observed = new("signsgd"), new("signsgd")
    train(*straight, range(3))
    with Writer(tmp_path, beside=True) as writer:
        for step in range(3):
            writer.save(*observed, at(step), {})
            train(*observed, range(step, step + 1))
    for one, other in zip(straight[0].parameters(), observed[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_next_save_waits_for_the_one_before_and_each_is_followed_by_what_comes_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, seen = Held(monkeypatch), []

    def look(step: int) -> Callable[[], None]:
        return lambda: seen.append((step, checkpoint.newest(tmp_path).name))  # type: ignore[union-attr]

    model, optimizer = new()
    with Writer(tmp_path, beside=True) as writer:
        writer.save(model, optimizer, at(1), {}, then=look(1))
        threading.Timer(0.1, held.go.set).start()
        writer.save(model, optimizer, at(2), {}, then=look(2))
        assert seen[0] == (1, "step_1")
        writer.wait()
        assert seen == [(1, "step_1"), (2, "step_2")]
        writer.wait()


@pytest.mark.parametrize("asked", ["check", "wait", "save"])
def test_an_error_of_the_thread_is_raised_by_the_next_call(tmp_path: Path, asked: str) -> None:
    model, optimizer = new()
    done: list[int] = []
    with Writer(tmp_path, beside=True) as writer:
        with files_of_at_most(3000):
            writer.save(model, optimizer, at(1), {}, then=lambda: done.append(1))
            assert writer._at_work is not None
            writer._at_work.exception()  # until it has come to it
        calls = {"check": writer.check, "wait": writer.wait, "save": lambda: writer.save(model, optimizer, at(2), {})}
        with pytest.raises(UserError, match=r"step_1 could not be written.*free some space"):
            calls[asked]()
        writer.check()  # once
        assert not done
        assert not list((tmp_path / "checkpoints").iterdir())
        writer.save(model, optimizer, at(3), {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_3"]


def test_an_error_at_the_very_end_is_raised_too(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"step_1 could not be written"),
        files_of_at_most(3000),
        Writer(tmp_path, beside=True) as writer,
    ):
        writer.save(*new(), at(1), {})


def test_after_an_error_of_the_loop_the_checkpoint_is_still_written_and_its_own_error_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(step: int) -> None:
        with Writer(tmp_path, beside=True) as writer:
            writer.save(*new(), at(step), {})
            raise ValueError("of the loop")

    with pytest.raises(ValueError, match="of the loop"):
        run(1)
    assert (tmp_path / "checkpoints/step_1/state.json").exists()

    def fails(self: atomic_directory) -> Path:
        raise UserError("no room")

    monkeypatch.setattr(atomic_directory, "__enter__", fails)
    with pytest.raises(ValueError, match="of the loop"):
        run(2)
    assert "the last checkpoint is not there: no room" in caplog.text


def test_not_beside_it_is_there_when_save_returns(tmp_path: Path) -> None:
    seen: list[str] = []
    with Writer(tmp_path) as writer:
        writer.save(*new(), at(1), {}, then=lambda: seen.append("then"))
        assert (tmp_path / "checkpoints/step_1/state.json").exists()
        assert seen == ["then"]
        assert threading.active_count() == 1 or not any("clt-checkpoint" in t.name for t in threading.enumerate())


class OnDevice(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def test_copies_are_in_the_same_memory_each_time_pinned_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[tuple[int, ...], bool]] = []
    empty = torch.empty

    def noted(size: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        made.append((tuple(size), pin_memory))
        return empty(size, dtype=dtype)

    monkeypatch.setattr(checkpoint_writer.torch, "empty", noted)
    copies = checkpoint_writer.Copies()
    for kind in (torch.Tensor, OnDevice):
        source = torch.arange(6.0).as_subclass(kind)
        first = copies._copy("model", kind.__name__, source)
        assert torch.equal(first.as_subclass(torch.Tensor), torch.arange(6.0))
        source.zero_()
        assert copies._copy("model", kind.__name__, source).data_ptr() == first.data_ptr()
        assert not first.any()
        assert copies._copy("optimizer", kind.__name__, source).data_ptr() != first.data_ptr()
    assert made == [((6,), False)] * 2 + [((6,), True)] * 2
