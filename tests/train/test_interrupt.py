"""Signals become a word between steps, and ranks agree on it."""

import os
import signal

import pytest

from pipeline.errors import Preempted
from pipeline.stages import slurm
from pipeline.train.interrupt import Asked, heard, leave, stop_requests, told


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ([], Asked.nothing),
        ([signal.SIGTERM], Asked.stop),
        ([signal.SIGINT], Asked.stop),
        ([signal.SIGUSR1], Asked.requeue),
        ([signal.SIGUSR2, signal.SIGTERM], Asked.requeue),
    ],
)
def test_the_strongest_signal_is_the_word_and_handlers_come_back(sent: list[signal.Signals], asked: Asked) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with stop_requests() as requested:
        for number in sent:
            os.kill(os.getpid(), number)
        assert requested() is asked
    assert signal.getsignal(signal.SIGUSR2) is before


def test_all_ranks_hear_what_one_was_told() -> None:
    nothing, stop, requeue = Asked
    for words, highest in [
        ([nothing] * 3, nothing),
        ([nothing, stop, nothing], stop),
        ([stop] * 3, stop),
        ([nothing, requeue, nothing], requeue),
        ([stop, stop, requeue], requeue),
        ([requeue] * 3, requeue),
    ]:
        assert heard(sum(told(word, 3) for word in words), 3) is highest


def test_leaving_says_whether_the_job_is_to_come_again() -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        leave(Asked.stop)
    assert not isinstance(stopped.value, Preempted)
    with pytest.raises(Preempted):
        leave(Asked.requeue)


def test_requeueing_is_what_was_there_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    old = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with stop_requests():
            pass
        with pytest.raises(SystemExit) as ended:
            slurm.requeue()
    finally:
        signal.signal(signal.SIGUSR2, old)
    assert called == [signal.SIGUSR2]
    assert ended.value.code == 130
