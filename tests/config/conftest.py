"""A stage that stands in for every other."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config.table import STAGES
from tests.config.starting import Stub


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    stub = Stub()
    for stage in STAGES.values():
        monkeypatch.setitem(sys.modules, stage.module, SimpleNamespace(run=stub.run))
    monkeypatch.chdir(tmp_path)
    return stub


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    yield
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if handler.name != "clt"]
