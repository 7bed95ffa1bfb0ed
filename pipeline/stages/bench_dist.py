"""`clt bench dist`: what several processes cost a training step, and what they say to each other.

    clt bench dist                                      shape A; one process plain and under torchrun, then two
    clt bench dist bench.ranks=[2,4] --json bench/dist.json

plain        one process, as `clt train` is started
torchrun     one process again, by `torchrun --nproc-per-node=1`
features     N processes that share the features of the transcoder
data         N processes that share the tokens of each batch

All of them wait in processes of their own (`bench_dist_rank.py`), and one variant at a time is told to take a stretch
of steps (`Trainer.advance`, from batches in memory). Plain and torchrun take turns; the overhead is the median of the
pairs' own ratios, less 1. Between the ranks of the last world sums are timed, small and large ones, which gives the
link's latency and rate, for `plan.links`. Processes of one machine share its cores and its memory: their speed here
says little of machines and links of their own.
"""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import torch

from pipeline.data.layout import gb
from pipeline.errors import UserError
from pipeline.plain import to_plain
from pipeline.progress import Progress
from pipeline.stages.bench_report import hand_over, less_one, quartiles, ratios, scaled
from pipeline.stages.bench_train_shapes import SHAPES
from pipeline.stages.plan_options import BenchDistConfig

logger = logging.getLogger(__name__)

TARGET = 0.03
PATIENCE = 120.0
"""Seconds in which processes have to be ready."""
SMALL = 8
"""Bytes of the sum that the latency is taken from."""
SUMS = 20


class Spent(NamedTuple):
    """Seconds of a step: those that pass, and those that a process computes, which others on the same cores change
    far less."""

    wall: float
    cpu: float


class World:
    """The ranks of a variant, each at the other end of a connection, which wait for work."""

    def __init__(self, ranks: Sequence[Connection]) -> None:
        self._ranks = ranks

    def ask(self, *question: Any) -> list[Any]:
        """What every rank answers."""
        for rank in self._ranks:
            rank.send(question)
        return [rank.recv() for rank in self._ranks]

    def seconds(self, n_steps: int) -> Spent:
        """Of a step, in a stretch of so many; those of the slowest rank."""
        wall, cpu = (max(each) / n_steps for each in zip(*self.ask("steps", n_steps), strict=True))
        return Spent(wall, cpu)


def run(cfg: BenchDistConfig) -> Path:
    """Measures, prints a table and writes it as JSON. -> the file"""
    bench = cfg.bench
    if bench.shape not in SHAPES:
        raise UserError(f"bench.shape={bench.shape} does not exist; choose from {', '.join(SHAPES)}")
    if bench.pairs < 3 or bench.steps < 1 or bench.threads < 1 or bench.mb < 1:
        raise UserError("bench.pairs >= 3 and bench.steps, bench.threads, bench.mb >= 1 are needed; mend what is below")
    if any(n < 2 for n in bench.ranks):
        raise UserError(f"bench.ranks={list(bench.ranks)} are worlds beside that of one; give numbers from 2 on")
    report = _measure(cfg)
    for line in _table(report):
        logger.info(line)
    return hand_over(report, cfg.to, "dist", "clt plan plan.links={to}")


def _measure(cfg: BenchDistConfig) -> dict[str, Any]:
    bench, shape = cfg.bench, SHAPES[cfg.bench.shape]
    link: dict[str, float] | None = None
    with ExitStack() as stack:
        plain, alone = (stack.enter_context(_world(cfg, 1, 1, by_torchrun)) for by_torchrun in (False, True))
        pairs = _turns(plain, alone, bench.pairs, bench.steps)
    own, theirs = zip(*pairs, strict=True)
    worlds = {"plain": _figures(shape.batch_tokens, own, {}), "torchrun 1": _figures(shape.batch_tokens, theirs, {})}
    for n in bench.ranks:
        for name, features, data in ((f"features {n}", n, 1), (f"data {n}", 1, n)):
            with _world(cfg, features, data, by_torchrun=True) as world:
                world.seconds(bench.steps)  # warms up
                times = [world.seconds(bench.steps) for _ in range(max(3, bench.pairs // 3))]
                worlds[name] = _figures(shape.batch_tokens, times, world.ask("wire")[0])
                link = _link(world, n, bench.mb * 10**6)
    return {
        "shape": shape._asdict(),
        "activation": cfg.activation.name,
        "pairs": bench.pairs,
        "steps": bench.steps,
        "overhead": less_one(ratios([one.wall for one in theirs], [one.wall for one in own])),
        "overhead_computed": less_one(ratios([one.cpu for one in theirs], [one.cpu for one in own])),
        "target": TARGET,
        "worlds": worlds,
        "link": link,
        "threads": bench.threads,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _turns(plain: World, other: World, n_pairs: int, n_steps: int) -> list[tuple[Spent, Spent]]:
    """Seconds of a step of both, pair by pair, the one first and then the other. The first pair warms up."""
    found = []
    with Progress(n_pairs + 1, unit="pairs", desc="bench") as progress:
        for n in range(n_pairs + 1):
            if n % 2:
                theirs, own = other.seconds(n_steps), plain.seconds(n_steps)
            else:
                own, theirs = plain.seconds(n_steps), other.seconds(n_steps)
            found.append((own, theirs))
            progress.update(1)
    return found[1:]


def _figures(batch_tokens: int, times: Sequence[Spent], counts: dict[str, Any]) -> dict[str, Any]:
    """counts: {what: [calls, bytes]} of a rank in a step."""
    seconds = quartiles([one.wall for one in times])
    return {
        "ms": scaled(seconds, 1e3),
        "tokens_per_s": batch_tokens / seconds["median"],
        "sent": counts,
        "sent_bytes": sum(sent for _, sent in counts.values()),
    }


def _link(world: World, n: int, n_bytes: int) -> dict[str, float]:
    """Rate of what a rank sends in a large sum, and the time of a small one."""
    small, large = (max(world.ask("sum", size, SUMS)) for size in (SMALL, n_bytes))
    sent = 2 * n_bytes * (n - 1) / n
    return {"ranks": n, "latency_s": small, "bytes_per_s": sent / max(large - small, 1e-9)}


@contextmanager
def _world(cfg: BenchDistConfig, features: int, data: int, by_torchrun: bool) -> Iterator[World]:
    """The ranks of a variant, started and ready; ended afterwards."""
    n = features * data
    with tempfile.TemporaryDirectory(prefix="clt-bench-") as folder:
        address = str(Path(folder) / "ranks")
        with Listener(address, "AF_UNIX", backlog=n) as listener:
            started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if by_torchrun else []
            command = [sys.executable, *started, "-m", "pipeline.stages.bench_dist_rank", address]
            environment = os.environ | {"OMP_NUM_THREADS": str(cfg.bench.threads)}
            with open(Path(folder) / "errors", "w+b") as errors:
                process = subprocess.Popen(command, env=environment, stdout=errors, stderr=errors)
                try:
                    ranks = _connected(listener, n, process, Path(folder) / "errors")
                    world = World(ranks)
                    settings = {"shape": cfg.bench.shape, "activation": to_plain(cfg.activation)}
                    world.ask("begin", settings, features, data)
                    yield world
                    world.ask("end")
                finally:
                    process.terminate()
                    process.wait()


def _connected(listener: Listener, n: int, process: "subprocess.Popen[bytes]", errors: Path) -> list[Connection]:
    """The ranks, in their order, when all have come. UserError with their last words when they do not."""
    waiting: SimpleQueue[Connection] = SimpleQueue()

    def accept() -> None:  # in a thread: the listener itself waits without an end
        for _ in range(n):
            waiting.put(listener.accept())

    Thread(target=accept, daemon=True).start()
    found: dict[int, Connection] = {}
    deadline = time.monotonic() + PATIENCE
    while len(found) < n:
        try:
            rank = waiting.get(timeout=0.2)
            found[rank.recv()] = rank
        except (Empty, EOFError):
            if process.poll() is None and time.monotonic() < deadline:
                continue
            words = errors.read_text(errors="replace").strip().splitlines() or ["without a word"]
            raise UserError(
                f"{n} processes did not start: {words[-1]}; see what torchrun needs on this machine"
            ) from None
    return [found[rank] for rank in range(n)]


def _table(report: dict[str, Any]) -> list[str]:
    shape, overhead, link = report["shape"], report["overhead"], report["link"]
    lines = [
        f"{shape['n_layers']} layers of {shape['d_model']}, {shape['d_features']:,} features a layer, "
        f"{shape['batch_tokens']:,} tokens a step, {report['activation']}; {report['threads']} thread a process, "
        f"{report['cpus']} CPUs, load {report['load']:.1f}",
        f"{'':14}{'ms a step':>12}{'quartiles':>20}{'tokens/s':>12}{'sent a step':>14}",
    ]
    for name, world in report["worlds"].items():
        ms = world["ms"]
        lines.append(
            f"{name:14}{ms['median']:12.1f}{ms['q1']:11.1f} {ms['q3']:8.1f}{world['tokens_per_s']:12,.0f}"
            f"{gb(world['sent_bytes']) if world['sent_bytes'] else '':>14}"
        )
        lines += [f"  {what}: {gb(sent)} in {calls:g}" for what, (calls, sent) in world["sent"].items()]
    for name, ratio in (("passed", overhead), ("computed", report["overhead_computed"])):
        lines.append(
            f"torchrun over plain, time {name}: {100 * ratio['median']:+.1f} % (quartiles {100 * ratio['q1']:+.1f} to "
            f"{100 * ratio['q3']:+.1f}; {report['pairs']} pairs of {report['steps']} steps), "
            f"target {100 * report['target']:.0f} %"
        )
    if link is not None:
        lines.append(
            f"link between {link['ranks']} ranks here: {1e6 * link['latency_s']:,.0f} us a sum, "
            f"{link['bytes_per_s'] / 1e9:.2f} GB/s"
        )
    return lines
