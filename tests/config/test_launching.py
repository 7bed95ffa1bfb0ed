"""From a command line to its exit code: what a stage's errors become, and what is left behind."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from tests.config.starting import Stub, fail_when, refusal, start


def test_what_the_user_can_mend_is_one_line_and_exit_code_2(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: True, UserError("no cache;\nrun clt extract"))
    assert refusal([], capsys) == "error: no cache; run clt extract\n"


def test_our_bug_is_raised(stub: Stub) -> None:
    stub.then = fail_when(lambda cfg: True, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        start()


def test_ctrl_c_is_exit_code_130_and_ends_a_sweep(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: True, KeyboardInterrupt())
    assert start() == 130
    assert start("activation.k=1,2", multirun=True) == 130
    assert len(stub.seen) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_hydra_creates_no_file_and_no_directory(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    start()
    start("optim.lr=1,2", multirun=True)
    start("+experiment=nope")
    assert list(scratch.iterdir()) == []
    assert [cfg.optim.lr for cfg in stub.seen][1:] == [1.0, 2.0]


def test_argv_and_environment_are_put_back(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = list(sys.argv)
    start()
    assert "HYDRA_FULL_ERROR" not in os.environ
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    start("optim.lrr=1")
    assert os.environ["HYDRA_FULL_ERROR"] == "0"
    assert sys.argv == argv


def test_our_messages_are_plain_and_other_packages_are_quiet(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    def speak(cfg: Any) -> None:
        logging.getLogger("pipeline.stages.train").info("done: runs/x")
        logging.getLogger("elsewhere").info("chatter")
        logging.getLogger("elsewhere").warning("trouble")

    stub.then = speak
    start()
    assert capsys.readouterr().err == "done: runs/x\nwarning: trouble\n"


def test_the_configuration_can_be_printed_without_running(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    assert start("+experiment=topk", "optim.lr=0.25", cfg="job") == 0
    out = capsys.readouterr().out
    assert "lr: 0.25" in out
    assert "hydra" not in out
    assert stub.seen == []
