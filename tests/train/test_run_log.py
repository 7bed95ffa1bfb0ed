"""What metrics.jsonl is after a stop: what the checkpoint says, whatever became of the file."""

import json
from pathlib import Path

import pytest

from pipeline.train.run_log import RunLog, last_line


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 1 / step}) + "\n"


FIVE = "".join(map(line, (5, 10, 15, 20, 25)))


def run(directory: Path) -> RunLog:
    log = RunLog(directory)
    for step in (5, 10, 15, 20, 25):
        log.add(json.loads(line(step)), {"step": step, "step_ms": 2.0})
    return log


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint at step 15."""
    path = tmp_path / "checkpoints" / "step_15"
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text(line(5) + line(10) + line(15))
    return path


@pytest.mark.parametrize(
    "found",
    [None, "", FIVE, FIVE[:-9], line(5), line(5) + line(10)[:-3], FIVE + "\0" * 40, "something else\n"],
    ids=["missing", "empty", "more", "cut short", "lost", "lost and cut short", "zeros", "another file"],
)
def test_whatever_became_of_the_metrics_they_are_those_of_the_checkpoint(
    tmp_path: Path, saved: Path, found: str | None
) -> None:
    log = run(tmp_path)
    log.metrics.unlink()
    if found is not None:
        log.metrics.write_text(found)
    log.begin(saved, 15)
    assert log.metrics.read_text() == line(5) + line(10) + line(15)


def test_a_checkpoint_without_a_copy_keeps_the_lines_up_to_its_step(tmp_path: Path, saved: Path) -> None:
    log = run(tmp_path)
    (saved / "metrics.jsonl").unlink()
    log.begin(saved, 17)
    assert log.metrics.read_text() == line(5) + line(10) + line(15)


def test_lines_before_the_first_checkpoint_do_not_count(tmp_path: Path) -> None:
    log = run(tmp_path)
    log.begin(None, 0)
    assert log.metrics.read_text() == ""


def test_timings_stay_but_for_a_line_that_was_cut_short(tmp_path: Path, saved: Path) -> None:
    log = run(tmp_path)
    before = log.timings.read_text()
    log.timings.write_text(before + '{"step": 3')
    log.begin(saved, 15)
    assert log.timings.read_text() == before


def test_the_last_line_is_the_last_whole_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_line(file) == {}
    file.write_text(line(5) + line(10) + line(15)[:-1])
    assert last_line(file)["step"] == 10
