"""Ranks for a test: forked processes of this one, which have torch loaded already, under gloo."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as td

T = TypeVar("T")

PATIENCE = 120.0
"""Seconds after which ranks that say nothing are ended."""


def run(n: int, work: Callable[..., T], *args: Any, **kwargs: Any) -> list[T]:
    """work(*args) in each of n ranks, as torchrun would start them: RANK, WORLD_SIZE and LOCAL_RANK are set and a
    process group exists, n = 1 without one. Whatever it closes over is the fork's own copy. -> what each rank returned,
    plain numbers, texts and tensors. Raises AssertionError with the traceback of the first rank that failed."""
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(n):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, n, folder, theirs, work, args, kwargs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            return _results(pipes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Connection]) -> list[Any]:
    said: dict[int, tuple[str | None, Any]] = {}
    deadline = time.monotonic() + PATIENCE
    while len(said) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in said]
        ready = wait(left, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                said[rank] = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} ended without a word") from None
            if said[rank][0] is not None:  # perhaps because of another, which has ended without a word
                deadline = min(deadline, time.monotonic() + 1)
    for rank, (failure, _) in said.items():
        assert failure is None, f"rank {rank}:\n{failure}"
    assert len(said) == len(pipes), f"ranks {[rank for rank in range(len(pipes)) if rank not in said]} said nothing"
    return [said[rank][1] for rank in range(len(pipes))]


def _rank(
    rank: int, n: int, folder: str, pipe: Connection, work: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> None:
    # Threads do not survive a fork: torch must not wait for those of the parent.
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    try:
        if n > 1:
            td.init_process_group("gloo", init_method=f"file://{Path(folder) / 'ranks'}", rank=rank, world_size=n)
        result = work(*args, **kwargs)
        if n > 1:
            td.barrier()  # a rank that ends early would take its sockets along
        pipe.send((None, result))
    except BaseException:  # noqa: BLE001  (it is told, in the parent)
        pipe.send((traceback.format_exc(), None))
    finally:
        pipe.close()
        os._exit(0)
