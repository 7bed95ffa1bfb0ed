"""What `clt bench train` measures of one shape: steps, rates, parts and memory."""

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from pipeline.progress import Progress
from pipeline.stages import bench_train_clock
from pipeline.stages import bench_train_kernels as kernels
from pipeline.stages import bench_train_memory as memory
from pipeline.stages import bench_train_sides as sides
from pipeline.stages.bench_options import BenchTrainConfig
from pipeline.stages.bench_report import quartiles, ratios, scaled
from pipeline.stages.bench_train_clock import Clock
from pipeline.stages.bench_train_dense import Dense
from pipeline.stages.bench_train_floor import Machine, Rates, work
from pipeline.stages.bench_train_parts import parts
from pipeline.stages.bench_train_shapes import Shape

DENSE = "dense"
TURN = 0.3
"""Seconds that a turn takes at least, in steps: short steps are taken several at a time."""
MOST = 10
"""Steps of a turn at most."""

Times = dict[str, list[float]]
"""name -> seconds of a step, round by round"""


def measure(
    cfg: BenchTrainConfig, shape: Shape, device: torch.device, threads: int, names: list[str], title: str
) -> dict[str, Any]:
    """Of one shape: the dense reference and our step under each setting of the kernels in `names`, the last of which is
    the one that the summary is of."""
    peaks: dict[str, int] = {}
    if cfg.bench.memory:
        peaks = {name: memory.peak(cfg, shape, device, threads, name) for name in (DENSE, *names)}
    steps, exact = _sides(cfg, shape, device, names)
    model = next(step.trainer.model for step in steps.values() if isinstance(step, sides.Ours))
    k = exact[names[-1]]["l0"]
    machine = Machine(model, shape, round(k))
    rates: list[Rates] = []
    clock = bench_train_clock.clock(cfg.bench, device)
    machine.rates(clock.of)  # warms up
    variants = {name: partial(_step, name, step, device) for name, step in steps.items()}
    times = alternate(variants, cfg.bench.rounds, clock, title, lambda: rates.append(machine.rates(clock.of)))
    floors = [work(shape, k).at(rate) for rate in rates]
    watched = {}
    for name, step in steps.items():
        with _kernels(name, device):
            watched[name] = parts(step, clock)
    found: dict[str, Any] = {
        "shape": shape._asdict() | {"n_parameters": model.n_parameters, "n_tables": shape.n_tables},
        "l0": k,
        "rates": {name: statistics.median(getattr(rate, name) for rate in rates) for name in Rates._fields},
        "floor_ms": {
            "gemm": _ms([floor.gemm for floor in floors]),
            "gather": _ms([floor.gather for floor in floors]),
            "parameters": _ms([floor.parameters for floor in floors]),
            "parameters_copied": _ms([floor.parameters_copied for floor in floors]),
            "all": _ms([floor.seconds for floor in floors]),
            "copy": _ms([floor.copy_seconds for floor in floors]),
        },
        DENSE: _side(DENSE, times, shape, watched, peaks),
        "kernels": {},
    }
    found[DENSE]["times_floor"] = ratios(times[DENSE], [floor.seconds for floor in floors])
    for name in names:
        side = _side(name, times, shape, watched, peaks)
        side["speedup_vs_dense"] = ratios(times[DENSE], times[name])
        side["times_floor"] = ratios(times[name], [floor.seconds for floor in floors])
        side["times_copy_floor"] = ratios(times[name], [floor.copy_seconds for floor in floors])
        side["percent_of_floor"] = 100 / side["times_floor"]["median"]
        side["exact"] = exact[name]
        if peaks:
            side["peak_over_dense"] = peaks[name] / peaks[DENSE]
        found["kernels"][name] = side
    return _summary(found, names[-1])


def _sides(
    cfg: BenchTrainConfig, shape: Shape, device: torch.device, names: list[str]
) -> tuple[dict[str, sides.Ours | sides.Reference], dict[str, dict[str, float]]]:
    """Every variant, each with weights of its own, and how exactly ours agree with the dense one."""
    gc.collect()
    data = sides.batches(shape)
    found: dict[str, sides.Ours | sides.Reference] = {}
    exact = {}
    reference: sides.Reference | None = None
    for name in names:
        with kernels.use(name, device):
            trainer = sides.trainer(sides.transcoder(shape, cfg.activation, cfg.bench.l0, device), cfg.loss, shape)
            if reference is None:
                dense = Dense(trainer.model.state_dict(), cfg.activation, cfg.loss)
                reference = sides.Reference(dense, trainer.objective, trainer.inputs, data)
                found[DENSE] = reference
            ours = sides.Ours(trainer, data)
            exact[name] = sides.compare(ours, reference)
        found[name] = ours
    return found, exact


def _step(name: str, step: sides.Step, device: torch.device) -> None:
    with _kernels(name, device):
        step()


def _kernels(name: str, device: torch.device) -> AbstractContextManager[object]:
    return kernels.use(kernels.PORTABLE if name == DENSE else name, device)


def alternate(
    steps: Mapping[str, Callable[[], object]],
    n_rounds: int,
    clock: Clock,
    title: str,
    between: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds of a step of each variant, round by round, another one first in each; `between` ends a round. One step of
    each, and what it takes to know how many fill a turn, is not counted."""
    n_steps = {}
    for name, step in steps.items():
        first = clock.of(step)  # makes the moments
        n_steps[name] = 1 if first > TURN * MOST else max(1, min(MOST, math.ceil(TURN / clock.of(step))))
    times: Times = {name: [] for name in steps}
    with Progress(n_rounds, unit="rounds", desc=f"bench {title}") as progress:
        for n in range(n_rounds):
            turn = n % len(steps)
            for name in [*list(steps)[turn:], *list(steps)[:turn]]:
                repeated = partial(_repeat, steps[name], n_steps[name])
                times[name].append(clock.of(repeated) / n_steps[name])
            between()
            progress.update(1)
    return times


def _repeat(step: Callable[[], object], n: int) -> None:
    for _ in range(n):
        step()


def _side(
    name: str, times: Times, shape: Shape, watched: dict[str, dict[str, float]], peaks: dict[str, int]
) -> dict[str, Any]:
    seconds = quartiles(times[name])
    return {
        "ms": scaled(seconds, 1e3),
        "tokens_per_s": shape.batch_tokens / seconds["median"],
        "ms_by_part": scaled(watched[name], 1e3),
        "peak_memory_bytes": peaks.get(name),
    }


def _summary(found: dict[str, Any], best: str) -> dict[str, Any]:
    """The figures of the setting that `auto` takes, one level up."""
    side = found["kernels"][best]
    return {
        "speedup_vs_dense": side["speedup_vs_dense"]["median"],
        "times_floor": side["times_floor"]["median"],
        "percent_of_floor": side["percent_of_floor"],
        "tokens_per_s": side["tokens_per_s"],
        "ms": side["ms"]["median"],
        "ms_by_part": side["ms_by_part"],
        "peak_memory_bytes": side["peak_memory_bytes"],
        "peak_over_dense": side.get("peak_over_dense"),
        "summary_of": best,
        **found,
    }


def _ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)
