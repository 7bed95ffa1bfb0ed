"""Lines that are shown elsewhere: TensorBoard's files, W&B's files, and a stand-in for W&B on line."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.train import loggers
from pipeline.train.loggers import Note, live
from pipeline.train.options import Logger, LogOptions, WandbMode
from pipeline.train.run_log import RunLog

Line = dict[str, Any]
CONFIG = {"optim": {"lr": 1e-3}, "name": "sweep/3"}


def metrics(step: int) -> Line:
    return {"step": step, "loss": 1 / step, "dead_fraction": None if step < 3 else step / 7, "held_out/fvu": 0.1 * step}


def times(step: int) -> Line:
    return {"step": step, "tokens_per_s": 1000 / step}


def numbers(step: int) -> Line:
    """What is to be seen of a step."""
    return {name: value for name, value in {**metrics(step), **times(step)}.items() if value is not None}


def run(directory: Path, options: LogOptions, steps: Iterator[int] | range, checkpoint: int | None = None) -> None:
    """A process that logs these steps, after those that the log has up to the checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    with live(options, directory, "sweep/3", CONFIG) as watchers:
        log = RunLog(directory)
        log.watchers = [*watchers]
        log.begin(None if checkpoint is None else directory / "checkpoints", checkpoint or 0)
        for step in steps:
            log.add(metrics(step), times(step))


class Cut(Exception):
    """What ends a process in the middle."""


def cut_after(last: int) -> Iterator[int]:
    yield from range(1, last + 1)
    raise Cut


# ------------------------------------------------------------------------------------------------------ TensorBoard


def tensorboard_steps(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: {name: {step: value}}. Fails where a step stands there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    assert found.Tags()["tensors"] == ["config/text_summary"]
    shown: dict[str, dict[int, float]] = {}
    for name in found.Tags()["scalars"]:
        events = found.Scalars(name)
        assert len({event.step for event in events}) == len(events), name
        shown[name] = {event.step: event.value for event in events}
    return shown


def expected(steps: range) -> dict[str, dict[int, float]]:
    shown: dict[str, dict[int, float]] = {}
    for step in steps:
        for name, value in numbers(step).items():
            shown.setdefault(name, {})[step] = float(np.float32(value))
    del shown["step"]
    return shown


def test_tensorboard_shows_every_number_of_every_line(tmp_path: Path) -> None:
    run(tmp_path, LogOptions(Logger.tensorboard), range(1, 6))
    assert tensorboard_steps(tmp_path) == expected(range(1, 6))


def test_tensorboard_shows_a_run_that_went_on_once(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        run(tmp_path, LogOptions(Logger.tensorboard), cut_after(5))
    run(tmp_path, LogOptions(Logger.tensorboard), range(4, 8), checkpoint=3)
    assert tensorboard_steps(tmp_path) == expected(range(1, 8))


def test_a_run_that_goes_on_with_tensorboard_shows_what_came_before(tmp_path: Path) -> None:
    run(tmp_path, LogOptions(), range(1, 4))
    assert not (tmp_path / "live.json").exists()
    run(tmp_path, LogOptions(Logger.tensorboard), range(4, 6), checkpoint=3)
    run(tmp_path, LogOptions(), range(6, 8), checkpoint=5)
    run(tmp_path, LogOptions(Logger.tensorboard), range(8, 9), checkpoint=7)
    assert tensorboard_steps(tmp_path) == expected(range(1, 9))


# --------------------------------------------------------------------------------------------------------- W&B, offline


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: protobuf in LevelDB's log format, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or the last piece
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_runs(directory: Path) -> list[tuple[Any, dict[int, Line]]]:
    """(the run, {step: line}) of each process that wrote, in their order."""
    found = []
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        records = list(wandb_records(file))
        about = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        lines = {}
        for record in records:
            if record.WhichOneof("record_type") == "history":
                line = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = line.pop("_step")
                lines[step] = {name: value for name, value in line.items() if not name.startswith("_")} | {"step": step}
        found.append((about, lines))
    return found


def when_written(directory: Path) -> list[tuple[Any, dict[int, Line]]]:
    """The same once W&B's own processes, which write a little later, have come to the end of two runs."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ends = [
            record
            for file in directory.glob("wandb/offline-run-*/*.wandb")
            for record in wandb_records(file)
            if record.WhichOneof("record_type") == "exit"
        ]
        if len(ends) == 2:
            break
        time.sleep(0.1)
    return wandb_runs(directory)


@pytest.mark.slow
def test_wandb_offline_holds_every_line_once_over_two_processes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    options = LogOptions(Logger.wandb, project="clt", mode=WandbMode.offline, tags=["a"])
    with pytest.raises(Cut):
        run(tmp_path, options, cut_after(5))
    run(tmp_path, options, range(4, 8), checkpoint=3)
    (first, before), (second, after) = when_written(tmp_path)
    assert before == {step: numbers(step) for step in range(1, 6)}
    assert after == {step: numbers(step) for step in range(6, 8)}
    assert first.run_id == second.run_id == Note(tmp_path, "wandb").id
    assert first.run_id.startswith("sweep-3-")
    assert (first.project, first.display_name, first.run_group, list(first.tags)) == ("clt", "sweep/3", "sweep", ["a"])
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["optim"] == {"lr": 1e-3}
    assert "to send it: wandb sync" in caplog.text


# ----------------------------------------------------------------------------------------------------- W&B, on line


class FakeWandb:
    """The part of the package that is used, and a server that keeps runs."""

    class Error(Exception):
        pass

    class CommError(Error):
        pass

    class AuthenticationError(CommError):
        pass

    def __init__(self) -> None:
        self.errors = self
        self.runs: dict[str, dict[int, Line]] = {}
        self.inits: list[Line] = []
        self.failed_ids: set[str] = set()
        self.unreachable = self.wrong_key = self.no_project = self.service_died = self.slow = False
        self.logged_in = True
        self.ended: list[int] = []

    def Settings(self, **settings: Any) -> Line:
        return settings

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt, "nothing waits for a terminal"
        assert not verify, "nothing waits for the network"
        return self.logged_in

    def init(self, **asked: Any) -> "FakeRun":
        self.inits.append(asked)
        assert asked["id"] not in self.failed_ids, "the id is in use"
        if asked["mode"] == "online":
            error = self.AuthenticationError("401: a wrong\n key") if self.wrong_key else None
            error = self.CommError("Run initialization\n has timed out") if self.unreachable else error
            error = self.Error("no such project") if self.no_project else error
            if error is not None:
                self.failed_ids.add(asked["id"])
                raise error
        self.last = FakeRun(self, asked)
        return self.last


class FakeRun:
    def __init__(self, server: FakeWandb, asked: Line) -> None:
        self.server, self.url, self.dir = server, "https://wandb.example/run", str(asked["dir"] / "wandb/run-1/files")
        online = asked["mode"] == "online"
        known = server.runs.get(asked["id"], {}) if online else {}
        self.resumed, self.starting_step = bool(known), max(known, default=-1) + 1
        self.lines = server.runs.setdefault(asked["id"], known) if online else {}

    def log(self, line: Line, step: int) -> None:
        if self.server.service_died:
            raise ConnectionResetError("Connection lost")
        assert step not in self.lines, "W&B drops a step that it has, and says so each time"
        self.lines[step] = line | {"step": step}

    def finish(self, exit_code: int) -> None:
        self.server.ended.append(exit_code)
        if self.server.slow:
            raise TimeoutError("Timed out finishing run.")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


ONLINE = LogOptions(Logger.wandb, project="clt", entity="us")


def test_a_run_that_goes_on_is_the_same_run_at_wandb_and_no_step_comes_twice(tmp_path: Path, wandb: FakeWandb) -> None:
    with pytest.raises(Cut):
        run(tmp_path, ONLINE, cut_after(5))
    run(tmp_path, ONLINE, range(4, 8), checkpoint=3)
    assert list(wandb.runs.values()) == [{step: numbers(step) for step in range(1, 8)}]
    first, second = wandb.inits
    assert first["id"] == second["id"]
    assert first["resume"] == "allow"
    assert first["project"] == "clt"
    assert first["entity"] == "us"
    assert first["group"] == "sweep"
    assert first["name"] == "sweep/3"
    assert first["config"] == CONFIG
    assert wandb.ended == [1, 0]


def test_what_wandb_never_got_of_a_run_is_sent_when_it_goes_on(tmp_path: Path, wandb: FakeWandb) -> None:
    run(tmp_path, ONLINE, range(1, 6))
    (lines,) = wandb.runs.values()
    del lines[4], lines[5]  # the machine went down before they were sent
    run(tmp_path, ONLINE, range(6, 7), checkpoint=5)
    assert sorted(lines) == [1, 2, 3, 4, 5, 6]


def test_another_run_of_the_same_name_is_another_run_at_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    for place in ("a", "b"):
        run(tmp_path / place, ONLINE, range(1, 3))
    assert len(wandb.runs) == 2


def test_where_wandb_cannot_be_reached_the_run_goes_on_offline_and_says_so(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    run(tmp_path, ONLINE, range(1, 3))
    wandb.unreachable = True
    run(tmp_path, ONLINE, range(3, 4), checkpoint=2)
    assert [asked["mode"] for asked in wandb.inits] == ["online", "online", "offline"]
    assert "cannot be reached, so this goes on offline: Run initialization has timed out" in caplog.text
    assert f"wandb sync {tmp_path}/wandb/run-1" in caplog.text
    assert sorted(wandb.last.lines) == [1, 2, 3], "another run, and all of it"
    wandb.unreachable = False
    run(tmp_path, ONLINE, range(4, 5), checkpoint=3)
    assert wandb.inits[3]["id"] == wandb.inits[2]["id"]
    assert sorted(wandb.last.lines) == [1, 2, 3, 4]


def test_a_failure_in_the_middle_is_said_once_and_stops_nothing(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    with live(ONLINE, tmp_path, "demo", CONFIG) as watchers:
        log = RunLog(tmp_path)
        log.watchers = [*watchers]
        log.begin(None, 0)
        for step in range(1, 6):
            wandb.service_died = step >= 3
            log.add(metrics(step), times(step))
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["log=wandb has failed and shows nothing more of this run, which goes on: Connection lost"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert wandb.inits[0]["group"] is None


def test_what_is_not_sent_at_the_end_is_said_with_the_command_that_sends_it(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.slow = True
    run(tmp_path, ONLINE, range(1, 3))
    assert f"not everything was sent; the rest is kept: wandb sync {tmp_path}/wandb/run-1" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("wrong_key", r"log=wandb: 401: a wrong key; run: wandb login --relogin"),
        ("no_project", r"log=wandb: no such project; mend that, or add log\.mode=offline"),
    ],
)
def test_what_wandb_refuses_is_the_users_to_mend(tmp_path: Path, wandb: FakeWandb, wrong: str, message: str) -> None:
    setattr(wandb, wrong, True)
    with pytest.raises(UserError, match=message):
        run(tmp_path, ONLINE, range(1, 3))


# ----------------------------------------------------------------------------------------------------------- settings


def test_nobody_logged_in_is_refused_unless_offline(wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.logged_in = False
    monkeypatch.setattr(loggers, "find_spec", lambda name: sys)
    monkeypatch.setattr(sys, "origin", "here", raising=False)
    with pytest.raises(UserError, match=r"nobody is logged in at W&B; run: wandb login, or add log\.mode=offline"):
        loggers.check(ONLINE)
    loggers.check(LogOptions(Logger.wandb, mode=WandbMode.offline))
    monkeypatch.setenv("WANDB_MODE", "offline")
    loggers.check(ONLINE)
    with pytest.raises(UserError, match="nobody is logged in"):
        loggers.check(LogOptions(Logger.wandb, mode=WandbMode.online))


@pytest.mark.parametrize("name", [Logger.wandb, Logger.tensorboard])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    name: Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()  # which is no package, however much Python takes it for one
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=f"log={name} needs {name}; run: pip install {name}"):
        loggers.check(LogOptions(name))


@pytest.mark.parametrize(
    ("options", "key"),
    [(LogOptions(project="p"), "project"), (LogOptions(Logger.tensorboard, mode=WandbMode.offline), "mode")],
)
def test_settings_of_wandb_without_it_are_refused(options: LogOptions, key: str) -> None:
    with pytest.raises(UserError, match=rf"log\.{key} has no meaning for log={options.name}; add log=wandb"):
        loggers.check(options)


def test_a_note_that_a_loss_of_power_emptied_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "live.json").write_text("")
    note = Note(tmp_path, "wandb")
    assert note.step == -1
    note.step = 7
    assert Note(tmp_path, "wandb").step == 7
    assert Note(tmp_path, "tensorboard").step == -1
