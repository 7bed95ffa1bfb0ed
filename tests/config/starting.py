"""A stage that keeps what reaches it, and command lines that start it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Request, launch


class Stub:
    """Stands in for a stage: keeps the configurations that reach it, and does what it is told with them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.then: Callable[[Any], None] = lambda cfg: None

    def run(self, cfg: Any) -> Path:
        self.seen.append(cfg)
        self.then(cfg)
        return Path("runs/x")


def start(*words: str, stage: str = "train", **flags: Any) -> int:
    return launch(stage, Request(overrides=words, **flags))


def refusal(words: list[str], capsys: pytest.CaptureFixture, stage: str = "train", **flags: Any) -> str:
    """The one line on stderr; checks the exit code, and that there is nothing else."""
    assert start(*words, stage=stage, **flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def write(folder: Path, **files: str) -> Path:
    """YAML files: experiment__mine="..." is experiment/mine.yaml."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def fail_when(condition: Callable[[Any], bool], error: BaseException) -> Callable[[Any], None]:
    def then(cfg: Any) -> None:
        if condition(cfg):
            raise error

    return then
