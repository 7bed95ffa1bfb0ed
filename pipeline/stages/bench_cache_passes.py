"""What `clt bench cache` times: ways of reading a scratch cache and of writing one, and the memory of reading."""

import gc
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core.normalize import MlpNorm
from pipeline.data.cache import Cache
from pipeline.data.harvest import Rows
from pipeline.data.layout import KIND, SCHEMA, SITES, STORED
from pipeline.data.loader import Loader
from pipeline.data.options import Read
from pipeline.data.plan import Plan, make_plan
from pipeline.data.tokens import Packed, Split
from pipeline.data.writer import Writer
from pipeline.stages.bench_options import BenchCacheConfig

AHEAD = (1, 2, 4)
"""Shards in flight that are tried."""
CONTEXT = 128
STATUS = Path("/proc/self/status")

Variants = dict[str, Callable[[], float]]
"""name -> a run of it, which gives bytes a second"""


def plan_of(cfg: BenchCacheConfig, path: Path, n_contexts: int) -> Plan:
    random = np.random.default_rng(0)

    def packed(n: int) -> Packed:
        return Packed(random.integers(50_000, size=(n, CONTEXT), dtype=np.int32), n * (CONTEXT - 1))

    ones = torch.ones(cfg.bench.n_layers, cfg.bench.d_model)
    norm = MlpNorm("layer", ones, ones, 1e-5)
    about = {
        "kind": KIND,
        "schema": SCHEMA,
        "request": {"targets": cfg.cache.targets.value},
        "norm": {"kind": norm.kind, "eps": norm.eps},
        "seed": 0,
        "context": CONTEXT,
        "block_contexts": n_contexts,
    }
    splits = {split: packed(n_contexts if split is Split.train else 1) for split in Split}
    return make_plan(path, about, norm, splits, cfg.cache.shard_mb)


def random_rows(n: int, n_layers: int, d_model: int) -> Rows:
    """The same for every batch: what is in them does not matter."""
    bits = np.random.default_rng(0).integers(1 << 15, size=(2, n, n_layers, d_model), dtype=np.uint16)
    return Rows(0, *torch.from_numpy(bits).view(torch.bfloat16))


def write(plan: Plan, rows: Rows) -> None:
    with Writer(plan) as writer:
        for block in writer.todo:
            n_rows = plan.packed[block.split].n_rows
            for first in range(0, n_rows, len(rows.resid_mid)):
                n = min(len(rows.resid_mid), n_rows - first)
                writer.write(block.split, Rows(first, rows.resid_mid[:n], rows.mlp_out[:n]))
            writer.finish_block(block, np.zeros((len(SITES), 2, *rows.resid_mid.shape[1:])))
        is_last = writer.finish()
        assert is_last
        writer.publish()


def reading(path: Path, batch_tokens: int) -> Variants:
    """Every way of reading, hot and cold."""
    cache = Cache.open(path)
    spec, n_batches = cache.specs[STORED[0]], cache.n_rows // batch_tokens
    files = [spec.file(path, name, shard.chunk) for shard in cache.shards() for name in cache.stored]
    buffer = np.empty(spec.file_bytes, np.uint8)
    buffer.fill(1)  # its pages are there before anything is timed

    def bare(cold: bool) -> float:
        if cold:
            forget(files)
        else:
            _read_all(files, buffer)
        start = time.perf_counter()
        return _read_all(files, buffer) / (time.perf_counter() - start)

    def epoch(cold: bool, read: Read, ahead: int) -> float:
        if cold:
            forget(files)
        opened, start = Cache.open(path), time.perf_counter()
        with Loader(opened, batch_tokens, 0, read, shards_ahead=ahead) as loader:
            if not cold:
                _consume(loader, n_batches)
                start = time.perf_counter()
            return _consume(loader, n_batches) / (time.perf_counter() - start)

    variants: Variants = {}
    for heat in ["hot", "cold"] if hasattr(os, "posix_fadvise") else ["hot"]:
        cold = heat == "cold"
        variants[f"{heat} bare"] = partial(bare, cold)
        for read in (Read.mmap, Read.readinto):
            variants |= {f"{heat} {read} {ahead}": partial(epoch, cold, read, ahead) for ahead in AHEAD}
    return variants


def _read_all(files: list[Path], buffer: NDArray[np.uint8]) -> int:
    n_bytes = 0
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while n := stream.readinto(buffer.data):
                n_bytes += n
    return n_bytes


def _consume(loader: Loader, n_batches: int) -> int:
    sites = ((batch.resid_mid, batch.mlp_out) for batch in islice(loader, n_batches))
    return sum(site.nbytes for both in sites for site in both if site is not None)


def forget(files: list[Path]) -> None:
    """Ask the system to keep nothing of the files in memory, where it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    gc.collect()  # pages that are mapped are not forgotten
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def writing(plan: Plan, rows: Rows) -> Variants:
    """Both ways of writing; what was written is removed before the next."""
    sizes = [spec.file_bytes for _, spec, _ in plan.chunks()]
    data = np.random.default_rng(0).integers(256, size=max(sizes), dtype=np.uint8).data

    def bare() -> None:
        plan.path.mkdir()
        for number, n_bytes in enumerate(sizes):
            with (plan.path / str(number)).open("wb", buffering=0) as stream:
                assert stream.write(data[:n_bytes]) == n_bytes
                os.fsync(stream.fileno())

    def rate(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        shutil.rmtree(plan.path)
        return plan.total_bytes / seconds

    return {"write bare": partial(rate, bare), "write cache": partial(rate, partial(write, plan, rows))}


def memory(path: Path, batch_tokens: int, ahead: int) -> dict[str, int]:
    """Bytes of the loader's buffers, and what the process has in memory of its own (RssAnon) while it reads an epoch
    into them, above what it had before. Nothing where the system does not say."""
    if not STATUS.exists():
        return {}
    cache = Cache.open(path)
    gc.collect()
    before = most = _own_bytes()
    with Loader(cache, batch_tokens, 0, Read.readinto, shards_ahead=ahead) as loader:
        for _ in islice(loader, cache.n_rows // batch_tokens):
            most = max(most, _own_bytes())
        return {"buffers": loader.buffer_bytes, "measured": most - before}


def _own_bytes() -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
