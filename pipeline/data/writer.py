"""Writes a cache, goes on with one, or makes again what is damaged in one.

    plan = make_plan(path, about, norm, packed, shard_mb)
    with Writer(plan, part=part, write=write) as writer:
        for block in writer.todo:
            ...  writer.write(block.split, rows) for all rows of block.contexts
            writer.finish_block(block, sums)
        if writer.finish():
            writer.publish()

1. The shard files are made at full size, so that a full disk is found before any work is done.
2. Rows are scattered over the shards through memory maps: row perm(t) for token t. Where that does not work well, they
   are spilled to files that are sorted into shards before step 4 (`data/spill.py`).
3. Every half minute the maps are synced to disk, then the blocks done since are noted (`data/journal.py`).
4. At the end each shard gets its checksum, then the small arrays and Zarr's metadata are written, the group's own
   `zarr.json` last: until then no reader takes the directory for a cache.

Processes that make parts share one journal (`data/parts.py`); the last one to end does step 4.
What was done before a crash is skipped, or done again with the same result. A finished chunk is never written again.
"""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.cache import read_attributes
from pipeline.data.harvest import Rows, statistics
from pipeline.data.journal import Journal
from pipeline.data.layout import (
    CRC_BYTES,
    JOURNAL,
    STORED,
    Json,
    checksum,
    gb,
    little,
    prefix,
    stored,
)
from pipeline.data.options import Write
from pipeline.data.parts import Part
from pipeline.data.plan import Block, Plan, check_space, disk_of, free_bytes, planned_again
from pipeline.data.shards import Maps, allocate, seal
from pipeline.data.shuffle import Permutation
from pipeline.data.spill import Spill, choose
from pipeline.data.tokens import Split
from pipeline.data.zarr_files import zarr_metadata
from pipeline.errors import UserError
from pipeline.files import remove_empty, sync, write_aside
from pipeline.progress import Progress

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 30.0
"""Time between entries of the journal, from the end of one to the start of the next: the work that a crash costs."""

Checksums = dict[str, list[int]]
"""array -> checksum of each chunk"""


class Writer:
    """At work on a cache, or on a part of it: holds its lock from the start of `with` to the end.

    share: the blocks that are this process's to extract; todo: those of them that are left; n_done: blocks of the whole
    cache that are done, as far as is known; is_finished: others have finished the cache since the plan was made, so
    nothing is left to do. `plan` is made again when other parts have begun since.
    """

    def __init__(
        self,
        plan: Plan,
        commit_seconds: float = COMMIT_SECONDS,
        part: Part | None = None,
        write: Write = Write.auto,
    ) -> None:
        self.plan = plan
        self.share: list[Block] = []
        self.todo: list[Block] = []
        self.n_done = 0
        self.is_finished = False
        self._part, self._write = part, write
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
        with _disk_errors(path):
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
                with _disk_errors(self.plan.path):
                    self._commit()
        finally:
            self._maps.close()
            if self._spill is not None:
                self._spill.close()
            self._journal.close()

    def write(self, split: Split, rows: Rows) -> None:
        """Put rows where they belong."""
        index = np.arange(rows.first, rows.first + len(rows.resid_mid))
        if split is Split.train:
            index = self._order.forward(index)
        by_place = np.argsort(index)
        with _disk_errors(self.plan.path):
            sites = {"resid_mid": rows.resid_mid, "mlp_out": rows.mlp_out}
            for name in stored(self.plan.specs, split):
                values = sites[name]
                bits = values.cpu().view(torch.uint16).numpy()
                put = self._scatter if self._spill is None else self._spill.put
                put(prefix(split) + name, index[by_place], bits, by_place)

    def finish_block(self, block: Block, sums: NDArray[np.float64]) -> None:
        """All rows of a block have been written, and these are their sums."""
        self._pending.append((block.number, sums))
        if time.monotonic() - self._last_commit >= self._commit_seconds:
            with _disk_errors(self.plan.path):
                self._commit()

    def finish(self) -> bool:
        """Every block of `todo` is done. -> whether this process is to publish the cache: every other block is done
        too, and nobody else is at work. The rows are in their shards then."""
        with _disk_errors(self.plan.path):
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
        with _disk_errors(plan.path):
            crcs = self._crcs | self._seal() | self._write_small_arrays()
            children = zarr_metadata(plan.specs, {})
            del children["zarr.json"]
            for name, data in children.items():
                (plan.path / name).write_bytes(data)
            sync(Path(place, name) for place, _, names in os.walk(plan.path) for name in [".", *names])
            metadata = {name: google_crc32c.value(data) for name, data in children.items()}
            attributes = (
                plan.about | (found or {}) | {"manifest": {"arrays": _manifest(plan, crcs), "metadata": metadata}}
            )
            attributes = json.loads(json.dumps(attributes | {"created": datetime.now(UTC).isoformat()}))
            attributes["checksum"] = checksum(attributes)
            write_aside(plan.path / "zarr.json", zarr_metadata({}, attributes)["zarr.json"])
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
        """Make the files at full size, and find what is left to do. Where nothing was before, nothing is left by an
        error."""
        try:
            self._make_files()
        except BaseException:
            if self.plan.before is None:
                shutil.rmtree(self.plan.path)
            raise
        done = self._journal.load(self.plan.sums_shape)
        needed = self.plan.needed()
        self.share = self.plan.blocks
        if self._part is not None:
            needed = self.share = needed[self._part.number :: self._part.of]
        self.todo = [block for block in needed if block.number not in done]
        if self._spill is not None:
            self._spill.start()
        self._last_commit = time.monotonic()

    def _make_files(self) -> None:
        plan, published = self.plan, (self.plan.path / "zarr.json").exists()
        if plan.before is None:
            _clear(plan.path)
        write = self._choose_write(None if published else plan.before)
        if write is Write.spill:
            self._spill = Spill(plan, "whole" if self._part is None else self._part.label)
        lost = self._lost()
        if lost and not published and self._journal.load(plan.sums_shape):
            if others := self._journal.locks.others():
                fix = f"stop the other parts ({', '.join(others)}) and start them all again"
                raise UserError(f"{lost[0]} has gone while others are at work; {fix}")
            logger.warning("%s has gone: extracting from the start", lost[0])
        check_space(plan, 0 if self._spill is None else self._spill.more_bytes())
        if plan.before is None or published or lost:
            # Before the files are made: a file of zeros must never look like one that holds rows.
            manifest = {"arrays": _manifest(plan, plan.finished)}
            self._journal.start(plan.about | {"write": str(write), "manifest": manifest})
            (plan.path / "zarr.json").unlink(missing_ok=True)
        if self._spill is None:
            for file, n_bytes in self._missing():
                allocate(file, n_bytes)
        self._crcs = self._write_tokens()

    def _choose_write(self, state: Json | None) -> Write:
        """What is begun goes on as it began."""
        begun = None if state is None else Write(state.get("write", Write.scatter))
        if begun is not None and self._write not in (Write.auto, begun):
            logger.warning("%s was begun with cache.write=%s and goes on so", self.plan.path, begun)
        return begun or choose(self._write, self.plan.path)

    def _lost(self) -> list[Path]:
        """Files that are gone although an earlier start made or filled them."""
        if self.plan.before is None:
            return []
        return [file for file, _ in self._missing()] if self._spill is None else self._spill.lost()

    def _missing(self) -> list[tuple[Path, int]]:
        """Shard files that have yet to be made, and their sizes."""
        plan = self.plan
        return [
            (spec.file(plan.path, name, chunk), spec.file_bytes)
            for name, spec, chunk in plan.chunks()
            if name.endswith(STORED) and chunk not in plan.finished.get(name, {}) and not plan.is_whole(name, chunk)
        ]

    def _scatter(self, name: str, index: NDArray[np.int64], bits: NDArray[np.uint16], order: NDArray[np.int64]) -> None:
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
                crcs.setdefault(name, []).append(seal(spec, spec.file(plan.path, name, chunk)) if crc is None else crc)
                progress.update(1)
        return crcs

    def _write_tokens(self) -> Checksums:
        arrays = {prefix(split) + "tokens": packed.contexts for split, packed in self.plan.packed.items()}
        return {name: self._write_array(name, contexts) for name, contexts in arrays.items()}

    def _write_small_arrays(self) -> Checksums:
        plan = self.plan
        arrays = {"norm/gain": plan.norm.gain.numpy(), "norm/bias": plan.norm.bias.numpy()}
        stats = [name for name in plan.specs if name.startswith("stats/")]
        if not all(plan.is_finished(name) for name in stats):
            blocks = [block.number for block in plan.blocks if block.split is Split.train]
            found = statistics(self._journal.total(blocks), plan.packed[Split.train].n_rows)
            arrays |= {f"stats/{name}": values for name, values in found.items()}
        crcs = {name: self._write_array(name, values) for name, values in arrays.items()}
        return {name: [plan.finished[name][0]] for name in stats if plan.is_finished(name)} | crcs

    def _write_array(self, name: str, values: NDArray[Any]) -> list[int]:
        """A whole array from memory, chunk by chunk; those that are there already are left alone."""
        spec, crcs = self.plan.specs[name], []
        for chunk in range(spec.n_chunks):
            data = np.zeros(spec.chunk_shape, little(spec.dtype))
            data[: spec.rows_in(chunk)] = values[chunk * spec.chunk_rows : (chunk + 1) * spec.chunk_rows]
            crcs.append(int(google_crc32c.value(data)))
            content = data.tobytes() + crcs[-1].to_bytes(CRC_BYTES, "little")
            file = spec.file(self.plan.path, name, chunk)
            if not self.plan.is_whole(name, chunk) or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        return crcs


def _manifest(plan: Plan, crcs: Checksums | dict[str, dict[int, int]]) -> Json:
    """Shape and checksums of every array; null for a chunk that is not finished."""
    arrays: Json = {}
    for name, spec in plan.specs.items():
        known = crcs.get(name, {})
        known = known if isinstance(known, dict) else dict(enumerate(known))
        arrays[name] = spec._asdict() | {"crc32c": [known.get(i) for i in range(spec.n_chunks)]}
    manifest: Json = json.loads(json.dumps(arrays))
    return manifest


def _clear(path: Path) -> None:
    """Remove what a start that did not come far has left."""
    for child in path.iterdir():
        if child.is_dir() and child.name != JOURNAL:
            shutil.rmtree(child)
        elif not child.is_dir():
            child.unlink()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the operating system says about a disk, as one line."""
    try:
        yield
    except OSError as error:
        where = f"{path} on {disk_of(path)} ({gb(free_bytes(path))} free)"
        remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        fix = f"{remedy} and run the same command again, which goes on from what was done"
        raise UserError(f"cannot write {where}: {error.strerror or error}; {fix}") from error
