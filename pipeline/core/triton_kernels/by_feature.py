# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Operations that go through the pattern feature by feature, over the sorted entries of `Pattern.by_feature`.

    bag_of_tokens   g[i] = sum over tokens b with i active of weights[b, i] * rows[b]
    row_products    p[b, i] = rows[b] . W[i] at the active pairs
    bag_gradients   g and p: both gradients of a bag
    adam            g as above, and at once Adam's step of row i (`adam.py`)

One program is (a feature, a block of columns). It loads the feature's block of W once, goes through the feature's
tokens, and keeps g in registers; p is a product along the same rows. So nothing is added by atomics, no table is
filled with zeros first, and a feature of no token writes its zeros like any other. p of each block of columns goes to
a buffer of its own, summed in order. Where a pattern has fewer entries than there are features, row_products goes by
its entries instead (`by_token.py`).

A feature of more than CHUNK tokens is cut into chunks, one program each, whose partial sums a second kernel adds in
order. The number of programs is bounded by F + nnz / CHUNK without asking the device.

Bytes, beyond the rows [B, D], which stay in the second-level cache, with e those of one number of W: bag_of_tokens
writes 4 F D; row_products reads F D e; bag_gradients does both. adam reads and writes weight and both moments, 24 F D,
with no gradient in memory, where a gradient written and read by an optimiser makes it 32 F D.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.core.pattern import Pattern
from pipeline.core.triton_kernels import by_token
from pipeline.core.triton_kernels.shapes import blocks, columns, float_type

CHUNK = 512
"""Most tokens that one program goes through."""

ENTRIES = 8
"""Tokens in one tile."""

_NO_NUMBERS = (0.0,) * 9


class Update(NamedTuple):
    """What Adam's step of a table needs besides the terms of its gradient."""

    first: Tensor
    """[F, D], float32 as the table; `second` too."""
    second: Tensor
    grad: Tensor | None
    """[F, D], added to the terms."""
    numbers: tuple[float, ...]
    """beta1, 1 - beta1, beta2, 1 - beta2, step size, root of the second's correction, eps, decay of weights, what is
    added to the gradient for each unit of weight."""


class _Segments(NamedTuple):
    """Chunks of features in order: `features` [n], F where a segment stands for nothing; `firsts` [F + 1], each
    feature's first segment; `slots` [F], where the partial sums of a cut feature begin in a buffer of `n_slots`."""

    features: Tensor
    firsts: Tensor
    slots: Tensor
    n_slots: int


_SEGMENTS: WeakKeyDictionary[Pattern, _Segments] = WeakKeyDictionary()
"""One pattern serves the encoder and every target of the decoder."""


def bag_of_tokens(pattern: Pattern, weights: Tensor, rows: Tensor) -> Tensor:
    """For each feature the weighted sum of its tokens' rows, in their type.

    weights [nnz], rows [B, D], which may lie apart -> [F, D]
    """
    out = torch.empty(pattern.n_features, rows.shape[1], dtype=rows.dtype, device=rows.device)
    run(pattern, weights, rows, out=out)
    return out


def row_products(pattern: Pattern, x: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x[b] . table[i] at the pattern's pairs (b, i), in `out` or added to it.

    x [B, D], table [F, D], whose rows may lie apart -> [nnz] in the type of `x`
    """
    if pattern.indices.numel() < pattern.n_features:
        return by_token.row_products(pattern, x, table, out, add)
    return _into(run(pattern, None, x, table=table, products=True), out, add)


def bag_gradients(
    pattern: Pattern, values: Tensor, rows: Tensor, table: Tensor, so_far: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of a bag whose output's is rows: by its values [nnz], added to `so_far`, and by its table [F, D].

    values [nnz], rows [B, D], table [F, D]; both in rows' type
    """
    by_table = torch.empty(table.shape, dtype=rows.dtype, device=rows.device)
    by_values = run(pattern, values, rows, table=table, out=by_table, products=True)
    return _into(by_values, so_far, so_far is not None), by_table


def _into(result: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        return result
    return out.add_(result) if add else out.copy_(result)


def _segments(pattern: Pattern) -> _Segments:
    if pattern not in _SEGMENTS:
        _, _, offsets = pattern.by_feature
        counts = offsets.diff()
        each = ((counts + CHUNK - 1) // CHUNK).clamp(min=1)
        firsts = torch.cat([offsets[:1] * 0, each.cumsum(0)])
        spare = pattern.indices.numel() // CHUNK
        places = torch.arange(pattern.n_features + spare, device=offsets.device)
        features = torch.searchsorted(firsts[1:], places, right=True)
        cut = torch.where(each > 1, each, 0)
        # A feature of c > CHUNK tokens has at most 2 floor(c / CHUNK) chunks.
        _SEGMENTS[pattern] = _Segments(features, firsts, cut.cumsum(0) - cut, 2 * spare)
    return _SEGMENTS[pattern]


def run(
    pattern: Pattern,
    weights: Tensor | None,
    rows: Tensor,
    table: Tensor | None = None,
    out: Tensor | None = None,
    products: bool = False,
    update: Update | None = None,
) -> Tensor:
    """The kernels with what they need; -> the products [nnz], empty where not asked for. No weights, no gradient."""
    width, n_entries, gradient = rows.shape[1], pattern.indices.numel(), weights is not None
    weights = rows[:0] if weights is None else weights
    segments = _segments(pattern)
    table = rows if table is None else table
    assert rows.stride(1) == table.stride(1) == 1
    sums = float_type(weights, rows, table)
    dtype = torch.float64 if sums == tl.float64 else torch.float32
    block = columns(width)
    n_blocks = blocks(width, block)
    partials = torch.empty(segments.n_slots, width, dtype=dtype, device=rows.device)
    dots = torch.empty(n_blocks if products else 0, n_entries, dtype=dtype, device=rows.device)
    out = partials if out is None else out
    first, second, grad, numbers = (out, out, None, _NO_NUMBERS) if update is None else update
    dense = out if grad is None else grad
    shared = (table, out, partials, first, second, dense, width, table.stride(0), *numbers)
    settings = {"ADAM": update is not None, "DENSE": grad is not None, "FLOAT": sums, "COLUMNS": block, "num_warps": 2}
    if pattern.n_features and width:
        with torch.cuda.device_of(rows):
            _by_feature[(segments.features.numel(), n_blocks)](
                *pattern.by_feature, *segments[:3], weights.contiguous(), rows, dots,
                pattern.n_features, n_entries, rows.stride(0), *shared,
                GRADIENT=gradient, PRODUCTS=products, CHUNK=CHUNK, ENTRIES=ENTRIES, **settings,
            )  # fmt: skip
            if gradient and segments.n_slots:
                _add_chunks[(pattern.n_features, n_blocks)](segments.firsts, segments.slots, *shared, **settings)
    return dots.sum(0).to(rows.dtype)


@triton.jit
def _finish(
    total, at, inside, place, table, out, first, second, dense,
    keep1, fresh1, keep2, fresh2, rate, root, eps, shrink, decay,
    ADAM: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """A row's gradient goes to memory, or into Adam's step."""
    if ADAM:
        w = tl.load(table + place, mask=inside, other=0)
        if DENSE:
            total += tl.load(dense + at, mask=inside, other=0)
        total += decay * w
        m = keep1 * tl.load(first + at, mask=inside, other=0) + fresh1 * total
        v = keep2 * tl.load(second + at, mask=inside, other=0) + fresh2 * total * total
        tl.store(first + at, m, mask=inside)
        tl.store(second + at, v, mask=inside)
        step = tl.div_rn(rate * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        tl.store(table + place, shrink * w - step, mask=inside)
    else:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _by_feature(
    order, tokens, offsets, features, firsts, slots, weights, rows, dots, n_features, n_entries, rows_stride,
    table, out, partials, first, second, dense, width, stride,
    keep1, fresh1, keep2, fresh2, rate, root, eps, shrink, decay,
    GRADIENT: tl.constexpr, PRODUCTS: tl.constexpr, CHUNK: tl.constexpr, ENTRIES: tl.constexpr,
    ADAM: tl.constexpr, DENSE: tl.constexpr, FLOAT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    feature = tl.load(features + segment)
    if feature < n_features:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        place = feature * stride + columns
        start_segment = tl.load(firsts + feature)
        chunk = segment - start_segment
        start = tl.load(offsets + feature) + chunk * CHUNK
        stop = tl.minimum(start + CHUNK, tl.load(offsets + feature + 1))
        if PRODUCTS:
            row = tl.load(table + place, mask=inside, other=0).to(FLOAT)
        total = tl.full([COLUMNS], 0, FLOAT)
        for begin in range(start, stop, ENTRIES):
            entries = begin + tl.arange(0, ENTRIES)
            live = entries < stop
            source = tl.load(order + entries, mask=live, other=0)
            token = tl.load(tokens + entries, mask=live, other=0)
            both = live[:, None] & inside[None, :]
            block = tl.load(rows + token[:, None] * rows_stride + columns[None, :], mask=both, other=0).to(FLOAT)
            if GRADIENT:
                scale = tl.load(weights + source, mask=live, other=0).to(FLOAT)
                total += tl.sum(scale[:, None] * block, axis=0)
            if PRODUCTS:
                own = dots + tl.program_id(1).to(tl.int64) * n_entries
                tl.store(own + source, tl.sum(block * row[None, :], axis=1), mask=live)
        if GRADIENT:
            if tl.load(firsts + feature + 1) - start_segment == 1:
                at = feature * width + columns
                _finish(
                    total, at, inside, place, table, out, first, second, dense,
                    keep1, fresh1, keep2, fresh2, rate, root, eps, shrink, decay, ADAM, DENSE,
                )  # fmt: skip
            else:
                tl.store(partials + (tl.load(slots + feature) + chunk) * width + columns, total, mask=inside)


@triton.jit
def _add_chunks(
    firsts, slots,
    table, out, partials, first, second, dense, width, stride,
    keep1, fresh1, keep2, fresh2, rate, root, eps, shrink, decay,
    ADAM: tl.constexpr, DENSE: tl.constexpr, FLOAT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    n_chunks = tl.load(firsts + feature + 1) - tl.load(firsts + feature)
    if n_chunks > 1:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < width
        slot = tl.load(slots + feature)
        total = tl.full([COLUMNS], 0, FLOAT)
        for chunk in range(n_chunks):
            total += tl.load(partials + (slot + chunk) * width + columns, mask=inside, other=0)
        _finish(
            total, feature * width + columns, inside, feature * stride + columns, table, out, first, second, dense,
            keep1, fresh1, keep2, fresh2, rate, root, eps, shrink, decay, ADAM, DENSE,
        )  # fmt: skip
