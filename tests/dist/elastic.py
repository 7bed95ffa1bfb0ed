"""Training under torchrun's agent, by the function that torchrun itself calls, in forked processes that have torch
loaded already: `python -m tests.dist.elastic HOW SEED WORD...`, in a directory with a cache. Writes one JSON line.

killed    three ranks, of which one after the other is killed at random moments, ten times: the names of the runs
elastic   4, 2 and 3 ranks one after the other, one of each told to stop, on the way: how many steps each came to
"""

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import synchronize
from pathlib import Path

import torch
import torch._dynamo  # optimisers import it: once here, not in every child
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from pipeline import ranks
from pipeline.config import Request, launch

KILLS = 10


def polled(event: synchronize.Event, timeout: float | None = None) -> bool:
    """Event.wait without a sleeper: whoever sets an event waits for each sleeper to wake, a killed one too."""
    while not event.is_set():
        time.sleep(0.05)
    return True


def train(words: list[str]) -> None:
    """What a rank does, as `python -m pipeline train` would. Its agent's word that all have ended is polled for."""
    synchronize.Event.wait = polled  # type: ignore[assignment]
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the agent's, inherited by the fork
        signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)
    code = launch("train", Request(overrides=tuple(words)))
    if code:
        sys.exit(code)


def start(n: int, restarts: int, words: list[str]) -> bool:
    """n ranks, from their start to their end. -> whether they came to it"""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=n, run_id=str(time.time_ns()), rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, train)(words)
    except ChildFailedError:
        return False
    return True


def workers() -> list[int]:
    """The processes of the ranks."""
    found = [Path(f"/proc/self/task/{thread.native_id}/children") for thread in threading.enumerate()]
    return [int(pid) for file in found if file.exists() for pid in file.read_text().split()]


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def killed(drawn: random.Random, words: list[str]) -> list[str]:
    """Kill at random moments of what a whole run takes; a run that gets through is followed by another."""
    begun = time.monotonic()
    assert start(3, 0, [*words, "name=whole"])
    took = time.monotonic() - begun
    left = [KILLS]
    done = threading.Event()

    def kill() -> None:
        while left[0] and not done.is_set():
            time.sleep(drawn.uniform(0.1, took))
            alive = workers()
            if len(alive) == 3:
                os.kill(drawn.choice(alive), signal.SIGKILL)
                left[0] -= 1

    names: list[str] = []
    killer = meanwhile(kill)
    while left[0]:
        names.append(f"killed-{len(names)}")
        assert start(3, KILLS, [*words, f"name={names[-1]}"])
    done.set()
    killer.join()
    return names


def elastic(drawn: random.Random, words: list[str]) -> list[int]:
    """4 ranks, then 2, then 3; where one of them is told to stop, all do, at the same step."""
    assert start(1, 0, [*words, "name=whole"])
    steps: list[int] = []
    for n in (4, 2):
        done = threading.Event()

        def stop(done: threading.Event = done, after: int = len(steps)) -> None:
            lines = Path("runs/changing/metrics.jsonl")
            known = lines.read_text().count("\n") if after and lines.exists() else 0
            while not done.wait(0.05):
                if lines.exists() and lines.read_text().count("\n") > known + 3:
                    os.kill(drawn.choice(workers()), signal.SIGTERM)
                    return

        stopper = meanwhile(stop)
        start(n, 0, [*words, "name=changing"])
        done.set()
        stopper.join()
        (last,) = Path("runs/changing/checkpoints").iterdir()
        steps.append(int(last.name.removeprefix("step_")))
    assert start(3, 0, [*words, "name=changing"])
    return steps


if __name__ == "__main__":
    assert ranks.world() == 1
    how, seed, *given = sys.argv[1:]
    did = {"killed": killed, "elastic": elastic}[how](random.Random(seed), given)
    sys.stdout.write(json.dumps(did) + "\n")
