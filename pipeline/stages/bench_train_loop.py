"""What the trainer adds to a bare step, on a cache: loading, preparing batches, counters, the log, the progress bar.

A stretch of `Trainer.fit` and as many bare steps of a second model with the same weights take turns. The bare ones stop
where the learning does: forward, loss, backward and optimiser, on a few prepared batches in memory. Not in either:
checkpoints, whose time is what `train.checkpoint_every` makes of it. While the bare steps run the loader fills its two
batches ahead again, so that two batches of a stretch cost the trainer no time.
"""

import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data import caches, inventory
from pipeline.data.address import cache_place, folder_of
from pipeline.data.cache import Cache
from pipeline.data.harvest import Rows, sums
from pipeline.data.loader import Batch, Loader
from pipeline.data.options import CacheOptions, Targets
from pipeline.data.tokens import Split
from pipeline.data.writer import Writer
from pipeline.errors import UserError
from pipeline.files import existing
from pipeline.stages import bench_cache_passes as passes
from pipeline.stages import bench_train_kernels as kernels
from pipeline.stages import bench_train_sides as sides
from pipeline.stages.bench_options import BenchCacheConfig, BenchCacheOptions, BenchTrainConfig
from pipeline.stages.bench_report import less_one, ratios
from pipeline.stages.bench_train_clock import Clock, clock
from pipeline.stages.bench_train_shapes import Shape
from pipeline.stages.train_cache import statistics as statistics_of
from pipeline.train import inputs
from pipeline.train.loop import Trainer
from pipeline.train.options import LogOptions, Norm

logger = logging.getLogger(__name__)

TARGET = 0.05
SCRATCH_BATCHES = 64
"""Of a cache that is made for the bench."""


class _Unsaved(Trainer):
    def save(self) -> None:
        """Checkpoints are not what is timed."""


def measure(cfg: BenchTrainConfig, shape: Shape, device: torch.device, name: str) -> dict[str, Any]:
    """Overhead of the trainer under one setting of the kernels: the median of the pairs' own ratios, less 1."""
    with _cache(cfg, shape) as (cache, called), tempfile.TemporaryDirectory() as folder, kernels.use(name, device):
        shape = shape._replace(
            n_layers=cache.n_layers, d_model=cache.d_model, batch_tokens=min(shape.batch_tokens, cache.n_rows)
        )
        n_pairs, n_steps = cfg.bench.pairs, cfg.bench.pair_steps
        trainer = _trainer(cfg, cache, shape, Path(folder), device, (n_pairs + 1) * n_steps)
        bare = _bare(cfg, cache, shape, trainer)
        pairs: list[tuple[float, float]] = []
        with Loader(cache, shape.batch_tokens, 0, cfg.cache.read, shards_ahead=cfg.cache.shards_ahead) as loader:
            trainer.fit(_turns(iter(loader), n_pairs + 1, n_steps, bare, pairs, clock(cfg.bench, device)))
        theirs, own = zip(*pairs[1:], strict=True)  # the first pair warms up
        return {
            "cache": called,
            "kernels": name,
            "shape": shape._asdict(),
            "pairs": n_pairs,
            "steps": n_steps,
            "trainer_ms": 1e3 * statistics.median(theirs) / n_steps,
            "bare_ms": 1e3 * statistics.median(own) / n_steps,
            "overhead": less_one(ratios(theirs, own)),
            "all_pairs": sum(theirs) / sum(own) - 1,
            "target": TARGET,
        }


def _turns(
    batches: Iterator[Batch],
    n_pairs: int,
    n_steps: int,
    bare: Callable[[], object],
    pairs: list[tuple[float, float]],
    clock: Clock,
) -> Iterator[Batch]:
    """The trainer's batches. Whenever a stretch has been taken, it is timed, and the bare steps take their turn."""
    for _ in range(n_pairs):
        start = clock.now()
        yield from islice(batches, n_steps)  # the last one's step has ended when the trainer asks for the next batch
        middle = clock.now()
        for _ in range(n_steps):
            bare()
        pairs.append((middle - start, clock.now() - middle))
    yield next(batches)


def _trainer(
    cfg: BenchTrainConfig, cache: Cache, shape: Shape, folder: Path, device: torch.device, n_steps: int
) -> Trainer:
    """As `clt train` makes it, with its log in `folder`."""
    model = sides.transcoder(shape, cfg.activation, cfg.bench.l0 or shape.k, device)
    made = sides.trainer(model, cfg.loss, shape)
    site, target = model.options.site, model.options.writes
    y = statistics_of(cache, target)
    maps = inputs.scaling(Norm.rms, statistics_of(cache, site), y)
    prepare = inputs.build(cache.norm, site, maps, device)
    plan = replace(made.plan, n_steps=n_steps + 1, log_steps=LogOptions.every, y_variance=y.std.square())
    return _Unsaved(folder, model, made.optimizer, made.objective, prepare, plan, made.optim)


def _bare(cfg: BenchTrainConfig, cache: Cache, shape: Shape, trainer: Trainer) -> Callable[[], object]:
    device = trainer.model.b_enc.device
    model = sides.transcoder(shape, cfg.activation, cfg.bench.l0 or shape.k, device).train()
    other = sides.trainer(model, cfg.loss, shape)
    with Loader(cache, shape.batch_tokens, 1, cfg.cache.read) as loader:
        ready = cycle([trainer.inputs(b.resid_mid, b.mlp_out) for b in islice(loader, sides.N_BATCHES)])
    none = torch.zeros(shape.n_layers, shape.d_features, dtype=torch.bool, device=device)

    def step() -> Tensor:
        x, y = next(ready)
        out = other.objective.forward(model, x, 0)
        loss = torch.stack(list(other.objective(model, out, x, y, none, 0).values())).sum()
        other.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        other.optimizer.step()
        return loss

    return step


@contextmanager
def _cache(cfg: BenchTrainConfig, shape: Shape) -> Iterator[tuple[Cache, str]]:
    """The one that is named, the newest with stored targets, or a scratch one of random rows; and what to call it."""
    root = cache_place(cfg.cache)
    if cfg.cache.path is not None:
        cache = Cache.open(inventory.find(root, cfg.cache.path).path)
        if cache.targets is not Targets.stored:
            raise UserError(f"cache.path={cfg.cache.path} holds no targets, which would be recomputed; name another")
        yield cache, str(cache.path)
        return
    found = caches.newest(root, Targets.stored)
    if found is not None:
        yield found, str(found.path)
        return
    logger.info("no finished cache under %s/: a scratch one of random rows is made for the trainer", root)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=existing(folder_of(cfg.cache, "clt bench train"))) as folder:
        yield scratch(cfg.cache, shape, Path(folder) / "cache", SCRATCH_BATCHES), "a scratch cache"


def scratch(options: CacheOptions, shape: Shape, path: Path, n_batches: int) -> Cache:
    """A cache of random rows, of so many batches."""
    n_contexts = -(-n_batches * shape.batch_tokens // (passes.CONTEXT - 1))
    sizes = BenchCacheOptions(n_layers=shape.n_layers, d_model=shape.d_model)
    plan = passes.plan_of(BenchCacheConfig(options, sizes), path, n_contexts)
    rows = sides.batches(shape._replace(batch_tokens=passes.CONTEXT * 8))[0]
    with Writer(plan) as writer:
        for block in writer.todo:
            n_rows = plan.packed[block.split].n_rows
            total = np.zeros((3, 2, shape.n_layers, shape.d_model))
            for first in range(0, n_rows, len(rows.rows)):
                n = min(len(rows.rows), n_rows - first)
                assert rows.mlp_out is not None
                part = Rows(first, rows.resid_mid[:n], rows.mlp_out[:n])
                writer.write(block.split, part)
                total += sums(part, plan.norm).numpy() if block.split is Split.train else 0
            writer.finish_block(block, total)
        is_last = writer.finish()
        assert is_last
        writer.publish()
    return Cache.open(path)
