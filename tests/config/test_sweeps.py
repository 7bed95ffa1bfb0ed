"""Sweeps: what their jobs are called, and what becomes of one that fails."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.config.starting import Stub, fail_when, start


def test_jobs_of_a_sweep_are_numbered_below_its_name(stub: Stub) -> None:
    start("name=mine", "activation.k=1,2", "optim.lr=3,4", multirun=True)
    assert [(cfg.name, cfg.activation.k, cfg.optim.lr) for cfg in stub.seen] == [
        ("mine/0", 1, 3.0), ("mine/1", 1, 4.0), ("mine/2", 2, 3.0), ("mine/3", 2, 4.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "words", "to", "numbered"),
    [
        ("generate", ["prompt=Once", "generate.seed=1,2"], "out/a.b.json", ["out/a.b-0.json", "out/a.b-1.json"]),
        ("report", ["report.resamples=0,9"], "page.html", ["page-0.html", "page-1.html"]),
        ("convert", ["run=runs/x", "device=cpu,auto"], "new.1", ["new.1-0", "new.1-1"]),
    ],
)
def test_what_jobs_of_a_sweep_write_is_numbered(
    stub: Stub, stage: str, words: list[str], to: str, numbered: list[str]
) -> None:
    assert start(*words, f"to={to}", stage=stage, multirun=True) == 0
    assert start(words[0].partition(",")[0], f"to={to}", stage=stage) == 0
    assert start(*words, stage=stage, multirun=True) == 0
    assert [cfg.to for cfg in stub.seen] == [*numbered, to, None, None]


def test_a_sweep_without_a_name_stays_together_though_its_folder_appears_meanwhile(stub: Stub) -> None:
    stub.then = lambda cfg: Path("runs", cfg.name).mkdir(parents=True)
    start("+experiment=topk", "optim.lr=1,2", multirun=True)
    start("+experiment=topk,batchtopk", "optim.lr=1,2", multirun=True)
    assert [cfg.name for cfg in stub.seen] == [
        "topk-0/0", "topk-0/1", "sweep-0/0", "sweep-0/1", "sweep-0/2", "sweep-0/3",
    ]  # fmt: skip


def test_in_a_sweep_it_fails_its_own_job_only(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: cfg.activation.k == 2, UserError("k is odd"))
    assert start("activation.k=1,2,3", multirun=True) == 2
    assert [cfg.activation.k for cfg in stub.seen] == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert "error: job 1: k is odd" in lines
    assert lines[-1] == (
        "error: 1 of 3 jobs failed; the others are done. job 1 (activation.k=2): k is odd. That mended, go on with "
        "clt train -m activation.k=1,2,3 name=clt-0"
    )


def test_our_bug_in_a_sweep_shows_its_trace_and_the_other_jobs_run(stub: Stub, capsys: pytest.CaptureFixture) -> None:
    stub.then = fail_when(lambda cfg: cfg.activation.k == 1, ZeroDivisionError("ours"))
    assert start("activation.k=1,2", multirun=True) == 1
    assert len(stub.seen) == 2
    err = capsys.readouterr().err
    assert "ZeroDivisionError: ours" in err
    assert "Traceback" in err
