"""How a step's time grows: with twice the features, and with twice the active ones."""

from dataclasses import replace
from typing import Any

import torch

from pipeline.data.layout import gb
from pipeline.stages import bench_train_kernels as kernels
from pipeline.stages import bench_train_sides as sides
from pipeline.stages.bench_options import BenchTrainConfig
from pipeline.stages.bench_report import ratios
from pipeline.stages.bench_train_clock import clock
from pipeline.stages.bench_train_shapes import Shape, doubled, memory
from pipeline.stages.bench_train_timing import alternate

TARGETS = {"d_features": 2.1, "k": 1.3}
"""Times the step of half as many; that of k holds at shape B."""


def measure(cfg: BenchTrainConfig, shape: Shape, device: torch.device, name: str) -> dict[str, Any]:
    """Ratios of steps that take turns: what is doubled -> the ratio, or why it was not timed."""
    found: dict[str, Any] = {"kernels": name, "targets": TARGETS}
    larger = doubled(shape)
    needed, there = shape.side_bytes + larger.side_bytes, memory(device)
    with kernels.use(name, device):
        base = _ours(cfg, shape, device)
        if needed > there:
            found["skipped"] = f"twice the features needs {gb(needed)}, {gb(there)} there"
        else:
            found["d_features"] = _ratio(cfg, {"once": base, "twice": _ours(cfg, larger, device)}, device)
        if cfg.activation.k is None:
            more = replace(cfg, bench=replace(cfg.bench, l0=2 * (cfg.bench.l0 or shape.k)))
        else:
            more = replace(cfg, activation=replace(cfg.activation, k=2 * cfg.activation.k))
        found["k"] = _ratio(cfg, {"once": base, "twice": _ours(more, shape, device)}, device)
    return found


def _ours(cfg: BenchTrainConfig, shape: Shape, device: torch.device) -> sides.Ours:
    model = sides.transcoder(shape, cfg.activation, cfg.bench.l0, device)
    return sides.Ours(sides.trainer(model, cfg.loss, shape), sides.batches(shape))


def _ratio(cfg: BenchTrainConfig, steps: dict[str, sides.Ours], device: torch.device) -> dict[str, float]:
    times = alternate(dict(steps), cfg.bench.rounds, clock(cfg.bench, device), "scaling")
    return ratios(times["twice"], times["once"])
