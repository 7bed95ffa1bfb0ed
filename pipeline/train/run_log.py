"""metrics.jsonl and timings.jsonl: whole lines, and after a stop those of the steps that count."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.files import write_aside

METRICS = "metrics.jsonl"

Line = dict[str, Any]


class Watcher(Protocol):
    """Whoever is told of the lines as they are written."""

    def begin(self, lines: Sequence[tuple[Line, Line]]) -> None:
        """The lines so far, of metrics and of times: a run begins, or goes on."""

    def add(self, metrics: Line, times: Line) -> None: ...


class RunLog:
    """The two files of a run directory. metrics.jsonl repeats to the byte, timings.jsonl does not. writes: whether this
    process writes them, of several that train one run."""

    def __init__(self, directory: Path, writes: bool = True) -> None:
        self.writes = writes
        self.metrics, self.timings = directory / METRICS, directory / "timings.jsonl"
        self.watchers: list[Watcher] = []

    def begin(self, checkpoint: Path | None, step: int) -> None:
        """Make metrics.jsonl what it was at the checkpoint, whatever became of it: later steps are taken again.

        The checkpoint has its own copy, unless nothing had been logged or an older version wrote it; then the file's
        lines up to `step` stay. Lines that a crash cut short go from both files.
        """
        if not self.writes:
            return
        copy = None if checkpoint is None else checkpoint / METRICS
        if copy is not None and copy.exists():
            write_aside(self.metrics, copy.read_bytes())
        elif self.metrics.exists():
            kept = [line for line in whole_lines(self.metrics) if json.loads(line)["step"] <= step]
            write_aside(self.metrics, "".join(kept).encode())
        if self.timings.exists():
            write_aside(self.timings, "".join(whole_lines(self.timings)).encode())
        lines = self._lines() if self.watchers else []
        for watcher in self.watchers:
            watcher.begin(lines)

    def add(self, metrics: dict[str, object], times: dict[str, object]) -> None:
        """A line for each file."""
        if not self.writes:
            return
        for path, line in ((self.metrics, metrics), (self.timings, times)):
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        for watcher in self.watchers:
            watcher.add(metrics, times)

    def _lines(self) -> list[tuple[Line, Line]]:
        """What was logged, each step with its times as they were last."""
        metrics, times = (
            [json.loads(line) for line in whole_lines(file)] if file.exists() else []
            for file in (self.metrics, self.timings)
        )
        last = {line["step"]: line for line in times}
        return [(line, last.get(line["step"], {})) for line in metrics]


def last_line(file: Path) -> dict[str, Any]:
    """{} where there is none."""
    lines = whole_lines(file) if file.exists() else []
    return json.loads(lines[-1]) if lines else {}


def whole_lines(file: Path) -> list[str]:
    """Those that are JSON to their end: a crash may cut the last one short, a loss of power fill it with zeros."""
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n") and _is_json(line)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
