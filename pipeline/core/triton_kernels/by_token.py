# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Operations that go through the pattern token by token.

    bag             y[b] = sum over active i of values[b, i] * W[i]
                    program = (token, block of columns): gathers the token's rows, sums in registers, writes y once
    row_products    p[b, i] = x[b] . W[i]
                    program = a few entries of the pattern, whatever their tokens, so that long rows need no splitting

Bytes, with e those of one number of the table: bag reads nnz D e where no two tokens share a row of the cache, and
F D e where they do: all programs of one block of columns run before those of the next, so that this block of the
table, F * 256 * e, stays in the second-level cache. It writes 4 B D. row_products reads nnz D e and writes 4 nnz.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.core.pattern import Pattern
from pipeline.core.triton_kernels.shapes import blocks, columns, float_type

ENTRIES = 8
"""Entries of the pattern in one tile."""


def bag(pattern: Pattern, values: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Sum of the active features' rows, weighted, in `out` or added to it.

    values [nnz], table [F, D], whose rows may lie apart -> [B, D] in the type of `values`, whatever the table's
    """
    n_tokens, width = pattern.n_tokens, table.shape[1]
    if out is None:
        out = torch.empty(n_tokens, width, dtype=values.dtype, device=table.device)
    assert table.stride(1) == out.stride(1) == 1
    block = columns(width)
    if out.numel():
        with torch.cuda.device_of(table):
            _bag[(n_tokens, blocks(width, block))](
                pattern.indices,
                pattern.offsets,
                values.contiguous(),
                table,
                out,
                width,
                table.stride(0),
                out.stride(0),
                ADD=add,
                FLOAT=float_type(values, table),
                ENTRIES=ENTRIES,
                COLUMNS=block,
                num_warps=2,
            )
    return out


def row_products(pattern: Pattern, x: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x[b] . table[i] at the pattern's pairs (b, i), in `out` or added to it.

    x [B, D], table [F, D], whose rows may lie apart -> [nnz] in the type of `x`
    """
    n_entries, width = pattern.indices.numel(), table.shape[1]
    if out is None:
        out = torch.empty(n_entries, dtype=x.dtype, device=x.device)
    assert x.stride(1) == table.stride(1) == out.stride(0) == 1
    if n_entries:
        with torch.cuda.device_of(table):
            _row_products[(blocks(n_entries, ENTRIES),)](
                pattern.indices,
                pattern.tokens,
                x,
                table,
                out,
                n_entries,
                width,
                x.stride(0),
                table.stride(0),
                ADD=add,
                FLOAT=float_type(x, table),
                ENTRIES=ENTRIES,
                COLUMNS=columns(width),
                num_warps=2,
            )
    return out


@triton.jit
def _bag(
    indices,
    offsets,
    values,
    table,
    out,
    width,
    stride,
    out_stride,
    ADD: tl.constexpr,
    FLOAT: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    stop = tl.load(offsets + token + 1)
    total = tl.full([COLUMNS], 0, FLOAT)
    for first in range(tl.load(offsets + token), stop, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        live = entries < stop
        rows = tl.load(indices + entries, mask=live, other=0)
        scale = tl.load(values + entries, mask=live, other=0).to(FLOAT)
        both = live[:, None] & inside[None, :]
        block = tl.load(table + rows[:, None] * stride + columns[None, :], mask=both, other=0).to(FLOAT)
        total += tl.sum(scale[:, None] * block, axis=0)
    place = out + token * out_stride + columns
    if ADD:
        total += tl.load(place, mask=inside, other=0).to(FLOAT)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _row_products(
    indices,
    tokens,
    x,
    table,
    out,
    n_entries,
    width,
    x_stride,
    stride,
    ADD: tl.constexpr,
    FLOAT: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    live = entries < n_entries
    rows = tl.load(indices + entries, mask=live, other=0)[:, None] * stride
    places = tl.load(tokens + entries, mask=live, other=0)[:, None] * x_stride
    total = tl.full([ENTRIES, COLUMNS], 0, FLOAT)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)[None, :]
        both = live[:, None] & (columns < width)
        total += (
            tl.load(x + places + columns, mask=both, other=0).to(FLOAT)
            * tl.load(table + rows + columns, mask=both, other=0).to(FLOAT)
        )  # fmt: skip
    products = tl.sum(total, axis=1)
    if ADD:
        products += tl.load(out + entries, mask=live, other=0).to(FLOAT)
    tl.store(out + entries, products.to(out.dtype.element_ty), mask=live)
