"""Being asked to stop, in the middle of a step."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import NoReturn

from pipeline.errors import Preempted


class Asked(IntEnum):
    """What a process has been asked for. Of several ranks, and of several signals, the highest counts."""

    nothing = 0
    stop = 1
    """SIGINT, SIGTERM: save a checkpoint and end."""
    requeue = 2
    """SIGUSR1, SIGUSR2, which clusters send before they take a machine away: the same, and be queued again."""


SIGNALS = {
    signal.SIGINT: Asked.stop,
    signal.SIGTERM: Asked.stop,
    signal.SIGUSR1: Asked.requeue,
    signal.SIGUSR2: Asked.requeue,
}


@contextmanager
def stop_requests() -> Iterator[Callable[[], Asked]]:
    """Turn signals into a word that is looked at between steps, so that what is saved is a whole step. What handled
    them before (submitit's requeueing, say) does so again afterwards."""
    asked = [Asked.nothing]

    def note(number: int, frame: FrameType | None) -> None:
        asked[0] = max(asked[0], SIGNALS[signal.Signals(number)])

    old = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def told(asked: Asked, world: int) -> float:
    """What a rank adds to the sum of all, of which `heard` makes the highest."""
    return float(world + 1 if asked is Asked.requeue else asked)


def heard(total: float, world: int) -> Asked:
    """What some rank has been asked for."""
    return Asked.requeue if total > world else Asked(min(int(total), Asked.stop))


def leave(asked: Asked) -> NoReturn:
    """End the process, now that everything is saved. Several ranks are to agree on `asked` first: whichever of them was
    told, all of them leave, and the first of them has the job queued again."""
    raise Preempted if asked is Asked.requeue else KeyboardInterrupt
