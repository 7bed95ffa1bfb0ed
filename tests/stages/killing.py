"""Training in processes that are killed: `python -m tests.stages.killing random SEED WORD...`, or `everywhere STRIDE
WORD...`, in a directory with a cache. Writes one JSON line: the names of the runs that were killed and went on.

Children are forked from a process that has imported everything and computed nothing.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable

import torch._dynamo  # noqa: F401  # optimisers import it: once here, not in every child

from pipeline.config import compose
from pipeline.stages import train
from pipeline.stages.options import TrainConfig

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile"}
NO_FD = -1


def start(config: TrainConfig, name: str, arm: Callable[[], None] = lambda: None) -> int:
    """A child that trains under a name. -> its process id"""
    child = os.fork()
    if child == 0:
        config.name = name
        arm()
        train.run(config)
        os._exit(0)
    return child


def finished(child: int) -> bool:
    """Wait for a child. Whether it came to its end; anything but being killed on the way is an error."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def kill_at_file_event(number: int) -> Callable[[], None]:
    """Arms a child to kill itself before it touches a file of a run for the n-th time."""
    left = [number]

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in FILE_EVENTS and ("runs/" in str(args[0]) or (event != "open" and args[-1] not in {NO_FD, None})):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def at_random(config: TrainConfig, drawn: random.Random, kills: int = 20) -> list[str]:
    """Kill at random moments of what a whole run takes, again and again; a run that gets through is followed by one."""
    begun = time.monotonic()
    assert finished(start(config, "whole"))
    took = time.monotonic() - begun
    names = ["killed-0"]
    while kills:
        child = start(config, names[-1])
        time.sleep(drawn.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        if finished(child):
            names.append(f"killed-{len(names)}")
        else:
            kills -= 1
    assert finished(start(config, names[-1]))
    return names


def everywhere(config: TrainConfig, stride: int) -> list[str]:
    """Kill before every stride-th touch of a file, each time another run, and let it go on."""
    assert finished(start(config, "whole"))
    names: list[str] = []
    for number in itertools.count(1, stride):
        name = f"killed-{number}"
        if finished(start(config, name, kill_at_file_event(number))):
            break
        assert finished(start(config, name))
        names.append(name)
    return names


if __name__ == "__main__":
    how, seed, *words = sys.argv[1:]
    given = compose("train", [*words, "name=whole"])
    assert isinstance(given, TrainConfig)
    found = at_random(given, random.Random(seed)) if how == "random" else everywhere(given, int(seed))
    sys.stdout.write(json.dumps(found) + "\n")
