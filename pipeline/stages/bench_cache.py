"""`clt bench cache`: how fast shuffled batches are read and rows are written, over what the disk itself gives.

    clt bench cache                                        random rows of GPT-2 small's shape
    clt bench cache bench.mb=256 cache.dir=/data/cache run=runs/demo

bare         the same shard files, one after the other, each with `readinto` into one buffer that is used again
mmap 1, ...  an epoch of the loader's batches, by `cache.read` and `cache.shards_ahead`; whoever asks for a batch does
             nothing with it
write bare   as many bytes in as many files, each followed by fsync
write cache  the same rows scattered in their random order over a new cache, committed and published

hot: a second epoch of a loader, the files lying in the system's memory. cold: the first epoch from the start of the
loader, its checksums and fresh buffers included; the system was told to forget the files (posix_fadvise: it is advice).

Variants take turns, in another order each round, each just after the bare one that it is compared with, so that
whatever else the machine does falls on both. A ratio is the median of the rounds' own ratios of bytes a second, with
its quartiles, and beside it the ratio of all rounds together. The scratch caches lie on the disk of cache.dir and are
removed afterwards.
"""

import json
import logging
import os
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.data.address import folder_of
from pipeline.data.layout import STORED, gb, stored
from pipeline.data.options import Targets
from pipeline.data.plan import disk_of, free_bytes
from pipeline.errors import UserError
from pipeline.files import existing
from pipeline.progress import Progress
from pipeline.stages import bench_cache_passes as passes
from pipeline.stages.bench_options import BenchCacheConfig
from pipeline.stages.bench_report import hand_over, ratios
from pipeline.train import run as runs

logger = logging.getLogger(__name__)

TARGETS = {"cold": 0.8, "hot": 0.45, "write": 0.4}
"""Bytes a second over those of the bare variant. Hot, a batch is copied twice where the bare read copies once."""
ALLOWANCE = 32 << 20
"""Memory of the loader that is in no buffer: indices of a shard, stacks and heaps of two threads."""


def run(cfg: BenchCacheConfig) -> Path:
    """Measures, prints a table and writes it as JSON. -> the file"""
    bench = cfg.bench
    row_bytes = row_bytes_of(cfg)
    if min(bench.mb, bench.n_layers, bench.d_model, bench.write_tokens, bench.batch_tokens) < 1 or bench.rounds < 3:
        raise UserError("bench.rounds >= 3 is needed, and the sizes in bench.* from 1 on; mend the one that is below")
    if (n_rows := (bench.mb << 20) // row_bytes) < max(bench.batch_tokens, passes.CONTEXT):
        fix = f"use more bench.mb, or a smaller bench.batch_tokens (now {bench.batch_tokens})"
        raise UserError(f"bench.mb={bench.mb} holds {n_rows} rows of {row_bytes:,} bytes, no batch; {fix}")
    speed = _trainer_speed(cfg.run)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=existing(folder_of(cfg.cache, "clt bench cache"))) as folder:
        report = _measure(cfg, Path(folder), n_rows // (passes.CONTEXT - 1))
    report["trainer_tokens_per_s"] = speed
    for line in _table(report):
        logger.info(line)
    return hand_over(
        report, cfg.to, "cache", "clt train with cache.shards_ahead= and cache.read= as they measured best"
    )


def _measure(cfg: BenchCacheConfig, folder: Path, n_contexts: int) -> dict[str, Any]:
    bench = cfg.bench
    plan = passes.plan_of(cfg, folder / "read", n_contexts)
    logger.info("2 x %s for the time of the bench in %s", gb(plan.total_bytes), folder)
    if 2 * plan.total_bytes > free_bytes(folder):
        raise UserError(f"the scratch caches do not fit: {gb(free_bytes(folder))} free; use a smaller bench.mb")
    rows = passes.random_rows(bench.write_tokens, bench.n_layers, bench.d_model)
    passes.write(plan, rows)
    variants = passes.reading(plan.path, bench.batch_tokens) | passes.writing(
        passes.plan_of(cfg, folder / "write", n_contexts), rows
    )
    rates, base = _time(variants, bench.rounds)
    spec = plan.specs[STORED[0]]
    memory = {str(ahead): passes.memory(plan.path, bench.batch_tokens, ahead) for ahead in passes.AHEAD}
    bare: dict[str, list[float]] = {}
    for name in rates:
        bare.setdefault(_bare(name), []).extend(base[name])
    shape = {"rows": spec.shape[0], "n_layers": bench.n_layers, "d_model": bench.d_model}
    return {
        "shape": shape
        | {
            "bytes": plan.total_bytes,
            "shards": len(stored(plan.specs)) * spec.n_chunks,
            "shard_bytes": spec.file_bytes,
        },
        "batch_tokens": bench.batch_tokens,
        "write_tokens": bench.write_tokens,
        "rounds": bench.rounds,
        "disk": str(disk_of(folder)),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "bytes_per_s": {name: statistics.median(values) for name, values in (bare | rates).items()},
        "over_bare": {name: _ratio(rates[name], base[name]) for name in rates},
        "memory": memory,
        "row_bytes": row_bytes_of(cfg),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def row_bytes_of(cfg: BenchCacheConfig) -> int:
    """Of a row of the scratch caches, in all of its arrays."""
    n_arrays = len(STORED) if cfg.cache.targets is Targets.stored else 1
    return 2 * n_arrays * cfg.bench.n_layers * cfg.bench.d_model


def _time(variants: passes.Variants, n_rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Bytes a second of each variant round by round, and of the bare one that ran just before it."""
    rates: dict[str, list[float]] = {name: [] for name in variants if not name.endswith(" bare")}
    base: dict[str, list[float]] = {name: [] for name in rates}
    with Progress(n_rounds * len(rates), unit="passes", desc="bench") as progress:
        for n in range(n_rounds):
            turn = n * len(rates) // n_rounds
            for name in [*list(rates)[turn:], *list(rates)[:turn]]:
                base[name].append(variants[_bare(name)]())
                rates[name].append(variants[name]())
                progress.update(1)
    return rates, base


def _bare(name: str) -> str:
    return f"{name.split()[0]} bare"


def _trainer_speed(run: str | None) -> float | None:
    """Tokens a second of a run: the median of what it noted."""
    if run is None:
        return None
    file = runs.named(run) / "timings.jsonl"
    if not file.exists():
        raise UserError(f"{file} does not exist; name a run that has trained with run=DIR, or leave run= out")
    return statistics.median(json.loads(line)["tokens_per_s"] for line in file.read_text().splitlines())


def _ratio(rates: list[float], base: list[float]) -> dict[str, float]:
    """Of bytes a second; `all_rounds` of the same bytes in the time of all rounds."""
    return {**ratios(rates, base), "all_rounds": statistics.harmonic_mean(rates) / statistics.harmonic_mean(base)}


def _table(report: dict[str, Any]) -> list[str]:
    shape, memory = report["shape"], report["memory"]
    size = f"{shape['rows']:,} rows of {shape['n_layers']} x {shape['d_model']}, {gb(shape['bytes'])}"
    lines = [
        f"{size} in {shape['shards']} shards on {report['disk']}, {report['batch_tokens']} rows a batch, "
        f"{report['rounds']} rounds, {report['cpus']} CPUs, load {report['load']:.1f}",
        f"{'':16}{'MB/s':>8}{'rows/s':>12}{'over bare':>12}{'quartiles':>16}{'all rounds':>12}{'target':>8}",
    ]
    for name, rate in report["bytes_per_s"].items():
        line, ratio = f"{name:16}{rate / 1e6:8,.0f}", report["over_bare"].get(name)
        if ratio:
            line += f"{rate / report['row_bytes']:12,.0f}{ratio['median']:12.3f}{ratio['q1']:10.3f} {ratio['q3']:.3f}"
            line += f"{ratio['all_rounds']:12.3f}{TARGETS[name.split()[0]]:8.2f}"
        lines.append(line)
    for ahead, found in memory.items():
        bound = found["buffers"] + ALLOWANCE
        verdict = "within" if found["measured"] <= bound else "ABOVE"
        lines.append(
            f"memory, {ahead} ahead: {gb(found['measured'])} measured, {verdict} {gb(bound)} "
            f"({gb(found['buffers'])} of buffers and {gb(ALLOWANCE)})"
        )
    if speed := report["trainer_tokens_per_s"]:
        slowest = min(rate for name, rate in report["bytes_per_s"].items() if not name.startswith("write"))
        times = slowest / report["row_bytes"] / speed
        lines.append(f"the trainer takes {speed:,.0f} rows/s; the slowest way of reading gives {times:.1f} times that")
    return lines
