"""The codes of an int8 cache that is being extracted: fitted once, before any row is written.

1. A seeded sample of the training contexts is run through the model, in passes of a size of their own, so that neither
   `extract.batch_tokens` nor the number of processes changes the result.
2. The codes are fitted to it and written as arrays of the cache, with their checksums in the journal. Whoever goes on,
   makes another part, or mends the finished cache reads them there: no two chunks have different scales.
3. A code that is lost is fitted again. When that gives another one, all rows of its array are made again.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data.codecs import Int8, encoded, fit_int8, loss_of, sample_rows, warning_of
from pipeline.data.harvest import Buffers, Rows, harvest, sums
from pipeline.data.layout import CRC_BYTES, STORED, code_array, little
from pipeline.data.models import LanguageModel
from pipeline.data.options import Codec
from pipeline.data.plan import Plan
from pipeline.data.shuffle import Permutation, derive
from pipeline.data.tokens import Packed, Split
from pipeline.files import write_aside

logger = logging.getLogger(__name__)

PASS_TOKENS = 1024
"""Of a forward pass over the sample."""

Sample = Callable[[], dict[str, Tensor]]
"""Runs the model over the sample -> array -> bfloat16 [n, L, D]"""


class Codes(NamedTuple):
    plan: Plan
    """With the checksums of the codes; without those of chunks that are of no use any more."""
    by_name: dict[str, Int8]
    """Of each stored array; {} for codecs that need none."""
    changed: bool
    """Whether there is a code that was not in the plan."""


def sample_of(model: LanguageModel, plan: Plan) -> dict[str, Tensor]:
    """The rows of the sampled contexts, on the CPU: bfloat16 [n, L, D] of each stored array."""
    packed = plan.packed[Split.train]
    n, width = packed.contexts.shape
    width -= 1
    n_chosen = min(n, -(-sample_rows(*plan.norm.gain.shape) // width))
    chosen = np.sort(Permutation(n, derive(plan.about["seed"], "int8 sample")).forward(np.arange(n_chosen)))
    missing = n * width - packed.n_rows if chosen[-1] == n - 1 else 0  # padding of the last context
    sampled = Packed(packed.contexts[chosen], n_chosen * width - missing)
    buffers = Buffers(model, width + 1, PASS_TOKENS, n=1)
    logger.info("int8: fitting the scales to %s rows of %s contexts", f"{sampled.n_rows:,}", f"{n_chosen:,}")
    found: dict[str, list[Tensor]] = {name: [] for name in STORED}
    for rows in harvest(model, sampled, range(n_chosen), buffers):
        for name, values in zip(STORED, (rows.resid_mid, rows.mlp_out), strict=True):
            found[name].append(values.to("cpu", copy=True))
    return {name: torch.cat(values) for name, values in found.items()}


def prepare(plan: Plan, sample: Sample | None) -> Codes:
    """The codes of a plan: read where they are whole, else fitted and written. `sample` is needed for int8."""
    if plan.codec is not Codec["int8"]:
        return Codes(plan, {}, False)
    codes: dict[str, Int8] = {}
    rows: dict[str, Tensor] | None = None
    finished, changed = dict(plan.finished), False
    arrays = {} if plan.before is None else plan.before["manifest"]["arrays"]
    for name in STORED:
        code = _read(plan, name)
        if code is None:
            assert sample is not None, "int8 needs a sample"
            rows = rows or sample()
            code = fit_int8(rows[name])
            _say(name, code, rows[name])
            crcs = _write(plan, name, code)
            if any(array not in arrays or arrays[array]["crc32c"] != [crc] for array, crc in crcs.items()):
                changed = True
                finished.pop(name, None)  # rows in another code
            finished |= {array: {0: crc} for array, crc in crcs.items()}
        codes[name] = code
    about = plan.about | {"codec": {"name": plan.codec.value, "from": None}} if changed else plan.about
    return Codes(plan._replace(finished=finished, about=about), codes, changed)


def as_stored(split: Split, rows: Rows, norm: MlpNorm, codes: dict[str, Int8]) -> tuple[Rows, Tensor]:
    """Rows as they are stored, and their sums, float64 [n, 2, L, D] (`Plan.sums_shape`; of held-out rows, which are
    never encoded, without what a code loses). norm and codes on the rows' device."""
    total = sums(rows, norm)
    if split is not Split.train or not codes:
        return rows, total
    both = [encoded(codes[name], values) for name, values in zip(STORED, rows[1:], strict=True)]
    return Rows(rows.first, *(q for q, _ in both)), torch.cat([total, torch.stack([lost for _, lost in both])])


def _say(name: str, code: Int8, rows: Tensor) -> None:
    """What it loses of the sample: before hours of work rather than after."""
    exact = rows.double()
    loss, _ = loss_of(encoded(code, rows)[1].numpy(), exact.std(dim=0, correction=0).numpy(), len(rows))
    logger.info("int8: %s of the sample: FVU %.2g, worst channel %.2g", name, loss.fvu, loss.worst_fvu)
    if line := warning_of(name, loss):
        logger.warning(line)


def _write(plan: Plan, name: str, code: Int8) -> dict[str, int]:
    """-> checksums of its arrays"""
    crcs = {}
    for part in Int8._fields:
        array = code_array(name, part)
        spec = plan.specs[array]
        data = np.ascontiguousarray(getattr(code, part).numpy(), little(spec.dtype)).tobytes()
        crcs[array] = int(google_crc32c.value(data))
        file = spec.file(plan.path, array, 0)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, data + crcs[array].to_bytes(CRC_BYTES, "little"))
    return crcs


def _read(plan: Plan, name: str) -> Int8 | None:
    """None where it is not what the plan says."""
    parts = []
    for part in Int8._fields:
        array = code_array(name, part)
        spec, crc = plan.specs[array], plan.finished.get(array, {}).get(0)
        if crc is None:
            return None
        data = spec.file(plan.path, array, 0).read_bytes()[:-CRC_BYTES]
        if google_crc32c.value(data) != crc:
            return None
        parts.append(torch.from_numpy(np.frombuffer(data, little(spec.dtype)).reshape(spec.shape).copy()))
    return Int8(*parts)
