"""`clt bench train`: a training step against a dense one of the same model, and against what the machine allows.

    clt bench train                                       shapes A and B, TopK; on CUDA GPT-2 small's too
    clt bench train bench.shapes=[A] activation=batchtopk --json bench/batchtopk.json

dense      the same model in plain torch, every product dense, autograd, the same fused Adam (`bench_train_dense.py`)
torch ...  `Trainer.step` under each setting of train.kernels that the machine has, from stored bfloat16 rows to the
           counters
floor      what the machine needs for the arithmetic and the bytes that cannot be saved (`bench_train_floor.py`)

Before anything is timed both sides take a step from the same weights on the same batch: loss and gradients have to
agree. Then they take turns with the machine's rates, in another order each round, so that whatever else the machine
does falls on all of them. A ratio is the median of the rounds' own ratios, with its quartiles. The parts of a step and
the peak of memory are measured apart (`bench_train_parts.py`, `bench_train_memory.py`), and so is what the trainer adds
to a step (`bench_train_loop.py`).
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.core import activations
from pipeline.data.models import resolve_device
from pipeline.data.tokens import count
from pipeline.errors import UserError
from pipeline.stages import bench_train_dense, bench_train_loop, bench_train_scaling, bench_train_shapes
from pipeline.stages import bench_train_kernels as kernels
from pipeline.stages import bench_train_table as table
from pipeline.stages import bench_train_timing as timing
from pipeline.stages.bench_options import BenchTrainConfig
from pipeline.stages.bench_report import hand_over
from pipeline.stages.bench_train_clock import clock
from pipeline.stages.bench_train_floor import FORMULA, Floor, Rates, work
from pipeline.stages.bench_train_shapes import SHAPES, Shape

logger = logging.getLogger(__name__)


def run(cfg: BenchTrainConfig) -> Path:
    """Measures, prints a table and writes it as JSON. -> the file"""
    _check(cfg)
    device = resolve_device(cfg.bench.device)
    names = kernels.chosen(cfg.bench.kernels, device)
    clock(cfg.bench, device)
    shapes, skipped = bench_train_shapes.chosen(cfg.bench, device, len(names))
    for line in skipped.values():
        logger.warning("left out: %s", line)
    with _threads(cfg.bench.threads) as threads:
        report: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "cpus": os.cpu_count(),
            "threads": threads,
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "activation": cfg.activation.name,
            "loss": cfg.loss.name,
            "timed_by": cfg.bench.timed_by.value,
            "rounds": cfg.bench.rounds,
            "kernels": names,
            "formula": FORMULA,
            "skipped": skipped,
            "shapes": {},
        }
        _say(table.head(report))
        for name, shape in shapes.items():
            found = timing.measure(_for(cfg, shape), shape, device, threads, names, name)
            report["shapes"][name] = found
            _say(table.of_shape(name, found))
        report["estimate"] = _estimate(cfg, report, shapes)
        _say(table.of_estimate(report["estimate"]))
        if cfg.bench.scaling:
            report["scaling"] = {}
            for name, shape in shapes.items():
                found = bench_train_scaling.measure(_for(cfg, shape), shape, device, names[-1])
                report["scaling"][name] = found
                _say(table.of_scaling(name, found))
        if cfg.bench.loop:
            shape = next(iter(shapes.values()))
            report["loop"] = bench_train_loop.measure(_for(cfg, shape), shape, device, names[-1])
            _say(table.of_loop(report["loop"]))
    return hand_over(report, cfg.to, "train", "clt train with train.kernels= as it measured best")


def _say(lines: Iterator[str]) -> None:
    for line in lines:
        logger.info(line)


def _check(cfg: BenchTrainConfig) -> None:
    """UserError for what measures nothing, before anything is built."""
    bench = cfg.bench
    if bench.rounds < 3 or bench.pairs < 3 or bench.pair_steps < 1:
        raise UserError("bench.rounds >= 3, bench.pairs >= 3 and bench.pair_steps >= 1 are needed; mend what is below")
    if bench.threads is not None and bench.threads < 1:
        raise UserError(f"bench.threads={bench.threads} must be at least 1; leave it out for one thread")
    if bench.l0 is not None and bench.l0 < 1:
        raise UserError(f"bench.l0={bench.l0} must be at least 1")
    bench_train_dense.check(cfg.activation, cfg.loss)
    if bench.l0 is not None and activations.ACTIVATIONS[cfg.activation.name].chooses:
        raise UserError(f"bench.l0 has no meaning for activation={cfg.activation.name}; use activation.k={bench.l0}")
    count(bench.tokens)


def _for(cfg: BenchTrainConfig, shape: Shape) -> BenchTrainConfig:
    """The settings with the shape's own k, or its l0 for a rule without a k, where none was given."""
    if activations.ACTIVATIONS[cfg.activation.name].chooses:
        k = shape.k if cfg.activation.k is None else cfg.activation.k
        return replace(cfg, activation=replace(cfg.activation, k=k))
    return replace(cfg, bench=replace(cfg.bench, l0=cfg.bench.l0 or shape.k))


@contextmanager
def _threads(asked: int | None) -> Iterator[int]:
    """So many CPU threads while the context lasts. Null: OMP_NUM_THREADS, or one."""
    before = torch.get_num_threads()
    set_already = os.environ.get("OMP_NUM_THREADS", "").isdigit()
    torch.set_num_threads(asked or (before if set_already else 1))
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _estimate(cfg: BenchTrainConfig, report: dict[str, Any], shapes: dict[str, Shape]) -> dict[str, Any]:
    """Hours of a run of GPT-2 small's shape, from the rates and the times_floor of the largest shape timed."""
    nearest = max(shapes, key=lambda name: shapes[name].n_parameters)
    found = report["shapes"][nearest]
    target, n_tokens = SHAPES["gpt2"], count(cfg.bench.tokens)
    floor: Floor = work(target, target.k).at(Rates(**found["rates"]))
    seconds = floor.seconds * found["times_floor"]
    return {
        "what": "GPT-2 small, F=24,576, k=32, 4,096 tokens a step",
        "tokens": n_tokens,
        "from_shape": nearest,
        "floor_ms": 1e3 * floor.seconds,
        "times_floor": found["times_floor"],
        "ms": 1e3 * seconds,
        "tokens_per_s": target.batch_tokens / seconds,
        "hours": seconds * n_tokens / target.batch_tokens / 3600,
        "bytes": target.side_bytes,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
