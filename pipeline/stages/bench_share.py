"""`clt bench share`: the time of K runs that read the cache one after the other, over that of K which share a pass.

    clt bench share                          8 runs, rows of GPT-2 small's shape, 256 MB, this disk and 100 MB/s
    clt bench share bench.runs=4 bench.throttle_mb=400 cache.dir=/data/cache

separate     K times: a loader from the first batch on, one trainer
shared       one loader, K trainers in turns (`train/shared.py`)
reading      one loader, and whoever asks for a batch does nothing with it

Each of them on the local disk and with reads slowed down to `bench.throttle_mb`, a second: whoever reads a shard file
waits until that file would have come at that speed. Before each pass the system is told to forget the files
(posix_fadvise: it is advice), and shards are read into buffers, so that no pass finds what an earlier one has read.

The variants take turns, in another order each round; a ratio is the median of the rounds' own. A trainer here is one of
`clt train` without its start, checkpoints and end, which cost the same either way. What sharing saves depends on how
long a step takes beside the reading of its batch: with r seconds for a batch to be read and c for a run's step, K runs
take about K max(r, c) a batch, and sharing max(r, K c). The transcoders here are small, so that reading is what counts
at 100 MB/s; the table says r and c.

On a machine that others use, computing takes longer and a throttled disk does not. So the last line says what that
formula gives for the throttled disk with the time that this process computed (all of its threads), as if it had a core
to itself.
"""

import itertools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from pipeline.arch import init, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Init
from pipeline.core import activations, products
from pipeline.core.options import ActivationOptions, Kernels, LossOptions
from pipeline.data.address import folder_of
from pipeline.data.cache import Cache
from pipeline.data.layout import STORED, gb
from pipeline.data.loader import Loader
from pipeline.data.options import Read
from pipeline.data.pieces import Shard, Source
from pipeline.data.plan import disk_of, free_bytes
from pipeline.errors import UserError
from pipeline.files import existing
from pipeline.progress import Progress
from pipeline.stages import bench_cache_passes as passes
from pipeline.stages import bench_train_sides as sides
from pipeline.stages.bench_options import BenchShareConfig
from pipeline.stages.bench_report import hand_over, ratios
from pipeline.stages.bench_train_loop import scratch
from pipeline.stages.bench_train_shapes import Shape
from pipeline.train import shared
from pipeline.train.loop import Trainer
from pipeline.train.options import LogOptions
from pipeline.train.shared import Generators, Member

logger = logging.getLogger(__name__)

TARGETS = {"local": 1.0, "throttled": 1 / 3}
"""Time of the shared runs over that of the separate ones."""


class Spent(NamedTuple):
    """Seconds of a variant: those that passed, and those that this process computed."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, start: "Spent") -> "Spent":
        return cls(time.perf_counter() - start.wall, time.process_time() - start.cpu)

    @classmethod
    def now(cls) -> "Spent":
        return cls(time.perf_counter(), time.process_time())


class _Unsaved(Trainer):
    def save(self) -> None:
        """Checkpoints cost the same either way."""


def run(cfg: BenchShareConfig) -> Path:
    """Measures, prints a table and writes it as JSON. -> the file"""
    bench = cfg.bench
    if min(bench.runs, bench.mb, bench.n_layers, bench.d_model, bench.d_features, bench.k, bench.batch_tokens) < 1:
        raise UserError("the sizes in bench.* and bench.runs must be 1 or more; mend the one that is below")
    if bench.rounds < 3 or bench.throttle_mb <= 0:
        raise UserError("bench.rounds >= 3 and bench.throttle_mb > 0 are needed; mend the one that is below")
    shape = Shape(bench.n_layers, bench.d_model, bench.d_features, bench.batch_tokens, bench.k)
    n_batches = (bench.mb << 20) // _batch_bytes(shape)
    if n_batches < 2:
        raise UserError(f"bench.mb={bench.mb} holds {n_batches} batches; use more, or a smaller bench.batch_tokens")
    place = existing(folder_of(cfg.cache, "clt bench share"))
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=place) as folder:
        if (needed := n_batches * _batch_bytes(shape)) > free_bytes(Path(folder)):
            raise UserError(f"the scratch cache of {gb(needed)} does not fit on the disk; use a smaller bench.mb")
        with products.using(Kernels.auto, torch.device("cpu")):
            report = _measure(cfg, shape, n_batches, Path(folder))
    for line in _table(report):
        logger.info(line)
    return hand_over(report, cfg.to, "share", "clt train -m train.share_pass=true")


def _measure(cfg: BenchShareConfig, shape: Shape, n_batches: int, folder: Path) -> dict[str, Any]:
    bench, path = cfg.bench, folder / "cache"
    cache = scratch(cfg.cache, shape, path, n_batches)
    n_steps = cache.n_rows // shape.batch_tokens
    variants: dict[str, Callable[[], Spent]] = {}
    for disk, rate in (("local", None), ("throttled", bench.throttle_mb * 1e6)):
        open_cache = partial(_open, path, rate)
        make = partial(_trainers, bench.runs, shape, n_steps, folder)
        variants |= {
            f"{disk} separate": partial(_separate, make, open_cache, n_steps),
            f"{disk} shared": partial(_shared, make, open_cache),
            f"{disk} reading": partial(_reading, open_cache, shape.batch_tokens, n_steps),
        }
    spent: dict[str, list[Spent]] = {name: [] for name in variants}
    with Progress(bench.rounds * len(variants), unit="passes", desc="bench") as progress:
        for n in range(bench.rounds):
            turn = n * len(variants) // bench.rounds
            for name in [*list(variants)[turn:], *list(variants)[:turn]]:
                spent[name].append(variants[name]())
                progress.update(1)
    seconds = {name: [one.wall for one in values] for name, values in spent.items()}
    computed = {name: statistics.median(one.cpu for one in values) for name, values in spent.items()}
    n_bytes = n_steps * _batch_bytes(shape)
    return {
        "shape": shape._asdict(),
        "runs": bench.runs,
        "steps": n_steps,
        "bytes": n_bytes,
        "throttle_mb": bench.throttle_mb,
        "rounds": bench.rounds,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "shared_over_separate": {
            disk: ratios(seconds[f"{disk} shared"], seconds[f"{disk} separate"]) for disk in TARGETS
        },
        "cpu_seconds": computed,
        "throttled_by_cpu_time": _expected(computed, n_bytes / (bench.throttle_mb * 1e6), bench.runs),
        "targets": TARGETS,
        "disk": str(disk_of(folder)),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _expected(computed: dict[str, float], read: float, n: int) -> float:
    """Of shared over separate, where `read` seconds of reading run beside the computing."""
    return max(read, computed["throttled shared"]) / (n * max(read, computed["throttled separate"] / n))


def _batch_bytes(shape: Shape) -> int:
    return 2 * len(STORED) * shape.batch_tokens * shape.n_layers * shape.d_model


def _open(path: Path, rate: float | None) -> Cache:
    """The cache, none of it in memory; with a rate (bytes a second) its shards come no faster."""
    cache = Cache.open(path)
    passes.forget(
        [cache.specs[name].file(path, name, shard.chunk) for shard in cache.shards() for name in cache.stored]
    )
    if rate is not None:
        given, n_bytes = cache.bring, cache.specs[STORED[0]].file_bytes

        def bring(shard: Shard, name: str, out: NDArray[Any] | None) -> list[Source]:
            start = time.perf_counter()
            rows = given(shard, name, out)
            time.sleep(max(0.0, n_bytes / rate - (time.perf_counter() - start)))
            return rows

        cache.bring = bring  # type: ignore[method-assign]
    return cache


def _trainers(n: int, shape: Shape, n_steps: int, folder: Path) -> list[Trainer]:
    return [_trainer(shape, n_steps, folder, seed) for seed in range(n)]


def _trainer(shape: Shape, n_steps: int, folder: Path, seed: int) -> Trainer:
    """One run's, of a transcoder for each layer, with weights of its own."""
    made = sides.trainer(_transcoder(shape, seed), LossOptions("mse"), shape, seed)
    made.plan.n_steps, made.plan.log_steps = n_steps, LogOptions.every
    place = folder / "runs" / str(seed)
    place.mkdir(parents=True, exist_ok=True)
    return _Unsaved(place, made.model, made.optimizer, made.objective, made.inputs, made.plan, made.optim)


def _transcoder(shape: Shape, seed: int) -> Transcoder:
    rule = activations.build(ActivationOptions("topk", k=shape.k), shape.n_layers, shape.d_features)
    options = ArchOptions("per_layer", shape.d_features, init=Init.uniform)
    model = table.build(options, Dims(shape.n_layers, shape.d_model), rule)
    nothing = torch.empty(0, shape.n_layers, shape.d_model)
    init.initialise(model, nothing, nothing, torch.Generator().manual_seed(seed))
    return model


def _loader(cache: Cache, batch_tokens: int) -> Loader:
    return Loader(cache, batch_tokens, 0, Read.readinto)


def _separate(make: Callable[[], list[Trainer]], open_cache: Callable[[], Cache], n_steps: int) -> Spent:
    parts = []
    for trainer in make():
        cache, start = open_cache(), Spent.now()
        with _loader(cache, trainer.plan.batch_tokens) as batches:
            trainer.fit(itertools.islice(batches, n_steps))
        parts.append(Spent.since(start))
    return Spent(sum(part.wall for part in parts), sum(part.cpu for part in parts))


def _shared(make: Callable[[], list[Trainer]], open_cache: Callable[[], Cache]) -> Spent:
    trainers, cache = make(), open_cache()
    cpu = torch.device("cpu")
    members = [
        Member(n, trainer, Generators(cpu), lambda record: None, lambda: None) for n, trainer in enumerate(trainers)
    ]
    start = Spent.now()
    with _loader(cache, trainers[0].plan.batch_tokens) as batches:
        shared.train(members, iter(batches), _directly)
    return Spent.since(start)


def _directly(jobs: Sequence[int], work: Callable[[], None]) -> bool:
    work()
    return True


def _reading(open_cache: Callable[[], Cache], batch_tokens: int, n_steps: int) -> Spent:
    cache, start = open_cache(), Spent.now()
    with _loader(cache, batch_tokens) as batches:
        for _ in itertools.islice(batches, n_steps):
            pass
    return Spent.since(start)


def _table(report: dict[str, Any]) -> list[str]:
    shape, seconds = report["shape"], report["seconds"]
    steps, n = report["steps"], report["runs"]
    lines = [
        f"{n} runs of {steps} steps of {shape['batch_tokens']} rows of {shape['n_layers']} x {shape['d_model']}, "
        f"{gb(report['bytes'])}, {shape['d_features']} features a layer; {report['rounds']} rounds, "
        f"{report['threads']} of {report['cpus']} CPUs, load {report['load']:.1f}, on {report['disk']}",
        f"{'':12}{'separate':>10}{'shared':>10}{'over separate':>15}{'quartiles':>16}{'target':>8}{'read alone':>12}",
    ]
    for disk, target in TARGETS.items():
        ratio = report["shared_over_separate"][disk]
        lines.append(
            f"{disk:12}{seconds[f'{disk} separate']:8.2f} s{seconds[f'{disk} shared']:8.2f} s{ratio['median']:15.3f}"
            f"{ratio['q1']:10.3f} {ratio['q3']:.3f}{target:8.3f}{seconds[f'{disk} reading']:10.2f} s"
        )
    batch = 1e3 / steps
    lines.append(
        f"a batch: {batch * seconds['throttled reading']:.1f} ms to read at {report['throttle_mb']:g} MB/s, "
        f"{batch * seconds['local reading']:.1f} ms on the local disk; a run's step "
        f"about {batch * seconds['local shared'] / n:.1f} ms"
    )
    lines.append(
        f"by the time computed, {1e3 / steps * report['cpu_seconds']['throttled shared'] / n:.1f} ms a step: "
        f"{report['throttled_by_cpu_time']:.3f} of the time at {report['throttle_mb']:g} MB/s with a core to itself"
    )
    return lines
