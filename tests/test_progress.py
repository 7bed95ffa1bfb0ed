"""What a long job says of itself where there is no terminal, and on one."""

import io
import logging

import pytest

from pipeline.progress import Progress, clock_time


class Clock:
    """Seconds, moved by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_are_ten_seconds_apart_and_one_ends_the_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    clock = Clock()
    with Progress(6000, unit="tok", desc="extract", clock=clock) as progress:
        for _ in range(6):
            clock.now += 4
            progress.update(1000, loss=1.23456, site="mlp_in")
    assert caplog.messages == [
        "extract: 3,000 of 6,000 tok (50 %), 250 tok/s, 0:12 left, loss 1.235, site mlp_in",
        "extract: 6,000 of 6,000 tok (100 %), 250 tok/s, 0:00 left, loss 1.235, site mlp_in",
        "extract: 6,000 tok in 0:24, 250 tok/s, loss 1.235, site mlp_in",
    ]


def test_what_was_done_before_counts_as_done_but_not_towards_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    clock = Clock()
    with Progress(1000, unit="tok", initial=800, clock=clock) as progress:
        clock.now += 20
        progress.update(100)
        progress.update(100)
    assert caplog.messages == ["900 of 1,000 tok (90 %), 5 tok/s, 0:20 left", "1,000 tok in 0:20, 10 tok/s"]


def test_an_interrupted_job_says_how_far_it_came(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    clock = Clock()
    job = Progress(10, unit="step", desc="train", clock=clock)

    def interrupted() -> None:
        with job as progress:
            clock.now += 2
            progress.update(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert caplog.messages == ["train: 4 of 10 step (40 %), 2 step/s, 0:03 left"]


def test_a_job_with_nothing_to_do_ends_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    with Progress(0, desc="extract", clock=Clock()):
        pass
    assert caplog.messages == ["extract: 0 it in 0:00"]


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    caplog.set_level(logging.INFO, logger="pipeline")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(2000, unit="tok", desc="extract") as progress:
        progress.update(2000, loss=0.5)
    assert caplog.messages == []
    assert "extract: 100%" in terminal.getvalue()
    assert "2.00k/2.00k" in terminal.getvalue()
    assert "loss=0.5" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (75.4, "1:15"), (59.6, "1:00"), (4000, "1:06:40")])
def test_times_are_shown_as_a_clock_does(seconds: float, shown: str) -> None:
    assert clock_time(seconds) == shown


def test_a_total_that_nobody_knows_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, "pipeline.progress"), Progress(None, unit="doc", clock=clock) as progress:
        clock.now += 20
        progress.update(400)
        clock.now += 20
    assert caplog.messages == ["400 doc, 20 doc/s", "400 doc in 0:40, 10 doc/s"]
