"""Writes a cache, goes on with one, or makes again what is damaged in one.

    plan = make_plan(path, about, norm, packed, shard_mb)
    with Writer(plan, part=part, write=write) as writer:
        for block in writer.todo:
            ...  writer.write(block.split, rows) for all rows of block.contexts
            writer.finish_block(block, sums)
        if writer.finish():
            writer.publish()

1. The shard files are made at full size, so that a full disk is found before any work is done; for int8, the codes are
   fitted to a sample (`data/setting_up.py`, `data/scales.py`).
2. Rows are scattered over the shards through memory maps: row perm(t) for token t. Where that does not work well, they
   are spilled to files that are sorted into shards before step 4 (`data/spill.py`).
3. Every half minute the maps are synced to disk, then the blocks done since are noted (`data/journal.py`).
4. At the end each shard gets its checksum, then the small arrays and Zarr's metadata are written (`data/publish.py`),
   the group's own `zarr.json` last: until then no reader takes the directory for a cache.

Processes that make parts share one journal (`data/parts.py`); the last one to end does step 4.
What was done before a crash is skipped, or done again with the same result. A finished chunk is never written again.
"""

import logging
import time
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.codecs import Int8, told
from pipeline.data.condition import read_attributes
from pipeline.data.harvest import Rows, statistics
from pipeline.data.journal import Journal
from pipeline.data.layout import JOURNAL, SITES, STORED, Json, prefix, stored
from pipeline.data.options import Write
from pipeline.data.parts import Part
from pipeline.data.plan import Block, Plan, planned_again
from pipeline.data.publish import disk_errors, publish
from pipeline.data.scales import Sample
from pipeline.data.setting_up import Checksums, set_up, write_array
from pipeline.data.shards import Maps, seal
from pipeline.data.shuffle import Permutation
from pipeline.data.spill import Spill
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.files import remove_empty
from pipeline.progress import Progress

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 30.0
"""Time between entries of the journal, from the end of one to the start of the next: the work that a crash costs."""


class Writer:
    """At work on a cache, or on a part of it: holds its lock from the start of `with` to the end.

    share: the blocks that are this process's to extract; todo: those of them that are left; n_done: blocks of the whole
    cache that are done, as far as is known; is_finished: others have finished the cache since the plan was made, so
    nothing is left to do. `plan` is made again when other parts have begun since. codes: how an int8 cache stores its
    training rows; `sample` is asked for rows to fit them to, unless they are there.
    """

    def __init__(
        self,
        plan: Plan,
        commit_seconds: float = COMMIT_SECONDS,
        part: Part | None = None,
        write: Write = Write.auto,
        sample: Sample | None = None,
    ) -> None:
        self.plan = plan
        self.share: list[Block] = []
        self.todo: list[Block] = []
        self.n_done = 0
        self.is_finished = False
        self.codes: dict[str, Int8] = {}
        self._part, self._write, self._sample = part, write, sample
        self._spill: Spill | None = None
        self._commit_seconds = commit_seconds
        self._order = Permutation(plan.packed[Split.train].n_rows, plan.about["seed"])
        self._maps = Maps()
        self._pending: list[tuple[int, NDArray[np.float64]]] = []
        self._last_commit = 0.0
        self._crcs = Checksums()
        self._sealed: dict[str, dict[int, int]] = {}

    def __enter__(self) -> Self:
        """Raises UserError when another extraction is at work there, or when the disk does not take the files; where
        nothing was before, nothing is left then."""
        path = self.plan.path
        new = [place for place in (path, *path.parents) if not place.exists()]
        with disk_errors(path):
            try:
                self._journal = Journal(path, self._part)
                try:
                    self._check_unchanged()
                    if not self.is_finished:
                        self._prepare()
                    self._journal.locks.set_up()
                except BaseException:
                    self._journal.close()
                    raise
            except BaseException:
                remove_empty([path / JOURNAL, *new])
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                with disk_errors(self.plan.path):
                    self._commit()
        finally:
            self._maps.close()
            if self._spill is not None:
                self._spill.close()
            self._journal.close()

    def write(self, split: Split, rows: Rows) -> None:
        """Put rows where they belong: as they are stored (`scales.stored`)."""
        index = np.arange(rows.first, rows.first + len(rows.resid_mid))
        if split is Split.train:
            index = self._order.forward(index)
        by_place = np.argsort(index)
        with disk_errors(self.plan.path):
            sites = {"resid_mid": rows.resid_mid, "mlp_out": rows.mlp_out}
            for name in stored(self.plan.specs, split):
                values = sites[name].cpu()
                bits = (values.view(torch.uint16) if values.dtype is torch.bfloat16 else values).numpy()
                put = self._scatter if self._spill is None else self._spill.put
                put(prefix(split) + name, index[by_place], bits, by_place)

    def finish_block(self, block: Block, sums: NDArray[np.float64]) -> None:
        """All rows of a block have been written, and these are their sums. Of held-out rows, what a codec loses may be
        left out: they are stored raw."""
        lossless = np.zeros((self.plan.sums_shape[0] - len(sums), *sums.shape[1:]))
        sums = np.concatenate([sums, lossless])
        self._pending.append((block.number, sums))
        if time.monotonic() - self._last_commit >= self._commit_seconds:
            with disk_errors(self.plan.path):
                self._commit()

    def finish(self) -> bool:
        """Every block of `todo` is done. -> whether this process is to publish the cache: every other block is done
        too, and nobody else is at work. The rows are in their shards then."""
        with disk_errors(self.plan.path):
            self._commit()
            self._maps.close()
            if self._part is not None:
                self._journal.locks.step_back()
            done = self._journal.load(self.plan.sums_shape)
            needed = self.plan.needed()
            left = {block.number for block in needed} - done
            self.n_done = len(self.plan.blocks) - len(left)
            if left or not self._journal.locks.claim():
                assert self._part is not None, "blocks are left"
                self.is_finished = (self.plan.path / "zarr.json").exists()
                return False
            if self._spill is not None:
                self._sealed = self._spill.sort()
        return True

    def publish(self, found: Json | None = None) -> None:
        """Checksums, small arrays, metadata: then it is a cache. `finish` must have said so. found: attributes that
        were not known before."""
        plan = self.plan
        with disk_errors(plan.path):
            small, about = self._write_small_arrays()
            publish(plan.path, plan.specs, about | (found or {}), self._crcs | self._seal() | small)
        self._journal.remove()

    def _check_unchanged(self) -> None:
        """The plan was made before the lock was held."""
        path = self.plan.path
        published = (path / "zarr.json").exists()
        now = read_attributes(path) if published else self._journal.state()
        if now == self.plan.before:
            return
        if self._part is None or now is None:
            raise UserError(f"another extraction has worked on {path} meanwhile; run the same command again")
        self.is_finished = published
        if not published:
            self.plan = planned_again(self.plan)

    def _prepare(self) -> None:
        """Set up, and find what is left to do."""
        ready = set_up(self.plan, self._journal, self._part, self._write, self._sample)
        self.plan, self._spill, self.codes, self._crcs = ready
        done = self._journal.load(self.plan.sums_shape)
        needed = self.plan.needed()
        self.share = self.plan.blocks
        if self._part is not None:
            needed = self.share = needed[self._part.number :: self._part.of]
        self.todo = [block for block in needed if block.number not in done]
        if self._spill is not None:
            self._spill.start()
        self._last_commit = time.monotonic()

    def _scatter(self, name: str, index: NDArray[np.int64], bits: NDArray[Any], order: NDArray[np.int64]) -> None:
        """Write bits[order] to the rows `index`, which ascend, of an array."""
        spec, finished = self.plan.specs[name], self.plan.finished.get(name, {})
        chunk = index // spec.chunk_rows
        starts = np.flatnonzero(np.diff(chunk, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(index)], strict=True):
            number = int(chunk[start])
            if number not in finished:
                target = self._maps.get(spec.file(self.plan.path, name, number), spec)
                target[index[start:stop] - number * spec.chunk_rows] = bits[order[start:stop]]

    def _commit(self) -> None:
        """Note the pending blocks, once their rows are on disk."""
        if self._pending:
            if self._spill is None:
                self._maps.sync()
            else:
                self._spill.sync()
            numbers, sums = zip(*self._pending, strict=True)
            self._journal.append(list(numbers), np.stack(sums))
            self._pending = []
        self._last_commit = time.monotonic()

    def _seal(self) -> Checksums:
        """Append the checksum to every shard, as Zarr's crc32c codec has it."""
        plan, crcs = self.plan, Checksums()
        shards = [(name, spec, chunk) for name, spec, chunk in plan.chunks() if name.endswith(STORED)]
        with Progress(len(shards), unit="shards", desc="checksums") as progress:
            for name, spec, chunk in shards:
                crc = (plan.finished.get(name, {}) | self._sealed.get(name, {})).get(chunk)
                file = spec.file(plan.path, name, chunk)
                crcs.setdefault(name, {})[chunk] = seal(spec, file) if crc is None else crc
                progress.update(1)
        return crcs

    def _write_small_arrays(self) -> tuple[Checksums, Json]:
        """-> checksums, and the attributes with what the codec lost"""
        plan = self.plan
        arrays = {"norm/gain": plan.norm.gain.numpy(), "norm/bias": plan.norm.bias.numpy()}
        about, small = plan.about, [name for name in plan.specs if name.startswith(("stats/", "codec/"))]
        measured = not self.codes or STORED[0] in about["codec"]
        if not all(plan.is_finished(name) for name in small) or not measured:
            blocks = [block.number for block in plan.blocks if block.split is Split.train]
            total, n_rows = self._journal.total(blocks), plan.packed[Split.train].n_rows
            found = statistics(total[: len(SITES)], n_rows)
            arrays |= {f"stats/{name}": values for name, values in found.items()}
            if not measured:
                lost = zip(STORED, total[len(SITES) :], strict=True)
                said = {name: told(own, found[f"{name}/std"], n_rows) for name, own in lost}
                about = about | {"codec": about["codec"] | said}
        crcs = {name: write_array(plan, name, values) for name, values in arrays.items()}
        return {name: plan.finished[name] for name in small if plan.is_finished(name)} | crcs, about
