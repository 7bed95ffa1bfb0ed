"""What stands before the first row: files of full size, tokens, the codes of int8, and the journal's first word."""

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.data import root
from pipeline.data.codecs import Int8
from pipeline.data.journal import Journal
from pipeline.data.layout import CRC_BYTES, JOURNAL, STORED, Json, little, prefix
from pipeline.data.options import Write
from pipeline.data.parts import Part
from pipeline.data.plan import Plan, check_space
from pipeline.data.publish import manifest
from pipeline.data.scales import Sample, prepare
from pipeline.data.shards import allocate
from pipeline.data.spill import Spill, choose
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

Checksums = dict[str, dict[int, int]]
"""array -> chunk -> checksum"""


class Ready(NamedTuple):
    plan: Plan
    spill: Spill | None
    """None: rows are scattered."""
    codes: dict[str, Int8]
    crcs: Checksums
    """Of the tokens."""


def set_up(plan: Plan, journal: Journal, part: Part | None, write: Write, sample: Sample | None) -> Ready:
    """Under the lock. Where nothing was before, nothing is left by an error."""
    try:
        return _set_up(plan, journal, part, write, sample)
    except BaseException:
        if plan.before is None:
            shutil.rmtree(plan.path)
        raise


def _set_up(plan: Plan, journal: Journal, part: Part | None, write: Write, sample: Sample | None) -> Ready:
    published = (plan.path / root.NAME).exists()
    if plan.before is None:
        _clear(plan.path)
    way, writer = _choose_write(plan, write, published), "whole" if part is None else part.label
    check_space(plan, Spill(plan, writer).more_bytes() if way is Write.spill else 0)
    plan, codes, changed = prepare(plan, sample)
    spill = Spill(plan, writer) if way is Write.spill else None
    lost = _lost(plan, spill, changed)
    if lost and not published and journal.load(plan.sums_shape):
        if others := journal.locks.others():
            fix = f"stop the other parts ({', '.join(others)}) and start them all again"
            raise UserError(f"{lost[0]} has gone while others are at work; {fix}")
        logger.warning("%s has gone: extracting from the start", lost[0])
    if plan.before is None or published or lost:
        if published or changed:
            _remove_damaged(plan)
        # Before the files are made: a file of zeros must never look like one that holds rows.
        state = {"write": str(way), "manifest": {"arrays": manifest(plan.path, plan.specs, plan.finished)}}
        journal.start(plan.about | state)
        root.forget(plan.path)
    if spill is None:
        for file, n_bytes in _missing(plan):
            allocate(file, n_bytes)
    return Ready(plan, spill, codes, _write_tokens(plan))


def write_array(plan: Plan, name: str, values: NDArray[Any]) -> dict[int, int]:
    """A whole array from memory, chunk by chunk; those that are there already are left alone. -> their checksums"""
    spec, crcs = plan.specs[name], {}
    for chunk in range(spec.n_chunks):
        data = np.zeros(spec.chunk_shape, little(spec.dtype))
        data[: spec.rows_in(chunk)] = values[chunk * spec.chunk_rows : (chunk + 1) * spec.chunk_rows]
        crcs[chunk] = int(google_crc32c.value(data))
        content = data.tobytes() + crcs[chunk].to_bytes(CRC_BYTES, "little")
        file = spec.file(plan.path, name, chunk)
        if not plan.is_whole(name, chunk) or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return crcs


def _write_tokens(plan: Plan) -> Checksums:
    arrays = {prefix(split) + "tokens": packed.contexts for split, packed in plan.packed.items()}
    return {name: write_array(plan, name, contexts) for name, contexts in arrays.items()}


def _choose_write(plan: Plan, wanted: Write, published: bool) -> Write:
    """What is begun goes on as it began."""
    state: Json | None = None if published else plan.before
    begun = None if state is None else Write(state.get("write", Write.scatter))
    if begun is not None and wanted not in (Write.auto, begun):
        logger.warning("%s was begun with cache.write=%s and goes on so", plan.path, begun)
    return begun or choose(wanted, plan.path, plan.codec)


def _lost(plan: Plan, spill: Spill | None, changed: bool) -> list[Path]:
    """Files that are gone although an earlier start made or filled them."""
    if plan.before is None:
        return []
    codes = [plan.path / "codec"] if changed else []
    return codes + ([file for file, _ in _missing(plan)] if spill is None else spill.lost())


def _missing(plan: Plan) -> list[tuple[Path, int]]:
    """Shard files that have yet to be made, and their sizes."""
    return [
        (spec.file(plan.path, name, chunk), spec.file_bytes)
        for name, spec, chunk in plan.chunks()
        if name.endswith(STORED) and chunk not in plan.finished.get(name, {}) and not plan.is_whole(name, chunk)
    ]


def _remove_damaged(plan: Plan) -> None:
    """Files of shards that are to be made again: from here on, a compressed one that is there is whole."""
    for name, spec, chunk in plan.chunks():
        if name.endswith(STORED) and chunk not in plan.finished.get(name, {}):
            spec.file(plan.path, name, chunk).unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Remove what a start that did not come far has left."""
    for child in path.iterdir():
        if child.is_dir() and child.name != JOURNAL:
            shutil.rmtree(child)
        elif not child.is_dir():
            child.unlink()
