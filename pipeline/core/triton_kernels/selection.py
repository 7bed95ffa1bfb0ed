# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The largest of relu(h): of each row (TopK), and of all values together (BatchTopK). Exact, ties to the lowest place.

The pre-activations are read once. Neighbours form groups, and only each group's largest value is kept at first. Of
the groups the k with the largest maxima are chosen, ties to the lowest group, and the k largest values lie in these:
of a value elsewhere each chosen group holds one that is larger, or as large at a lower place, so that k come before
it. What is left to rank are k groups in place of F values.

Values are compared as whole numbers: the bits of floats above 0 grow with them. Among N of them in registers the
k-th largest is found by its bits, the highest first, each set where at least k numbers are no smaller. Among more, its
digits of 16 bits come from histograms in memory, whose counts do not depend on the order of additions.

Bytes of `topk`, e those of one pre-activation, groups of 32: B F e, read once; 4 B F / 32 for the maxima, written and
read; 32 B k e for the chosen groups. Rows of up to 4,096 values are ranked whole. `largest`: the same, but the maxima
are read four times more, and the values of the chosen groups kept and read four times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.core.triton_kernels.shapes import blocks, float_type, power_of_two, warps

GROUP = 32
"""Neighbours in a group: 128 bytes of float32, one line of the cache."""

WHOLE = 4096
"""Values of a row, or of its chosen groups, that are ranked at once where that is possible."""

TILE = 4096
"""Values that one program reads when it goes through all of them."""

DIGIT = 16
"""Bits of a digit."""


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(pre_acts) of each row, in ascending order of index. k <= F

    [..., F] -> values [..., k], indices [..., k]; where fewer than k are above 0, entries of value 0 at index 0 follow.
    """
    with torch.cuda.device_of(pre_acts):
        values, indices = _topk(pre_acts.reshape(-1, pre_acts.shape[-1]).contiguous(), k)
    shape = (*pre_acts.shape[:-1], k)
    return values.view(shape), indices.view(shape)


def largest(flat: Tensor, n: int, guess: float = 0.0) -> tuple[Tensor, Tensor]:
    """Positions of the n largest values above 0, ascending, ties to the lowest position; and the smallest of them.

    flat [N]. Waits for the device: how many there are is not known before. No use is made of `guess`.
    """
    with torch.cuda.device_of(flat):
        positions = _positions(flat.contiguous(), n)
    values = flat[positions]
    return positions, values.min() if positions.numel() else flat.new_zeros(())


def _topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[B, F] -> 2 x [B, k]"""
    n_rows, n_features = rows.shape
    values = torch.zeros(n_rows, k, dtype=rows.dtype, device=rows.device)
    indices = torch.zeros(n_rows, k, dtype=torch.int64, device=rows.device)
    integer, n_bits = _integer(rows.dtype)
    size = min(GROUP, max(4, WHOLE // power_of_two(k)))
    n_groups, whole = blocks(n_features, size), n_features <= max(WHOLE, size * k)
    if whole or not n_rows:
        chosen, n_chosen = indices, n_groups
    else:
        maxima = _maxima(rows, size)
        n_chosen = min(k, n_groups)
        chosen = torch.empty(n_rows, n_chosen, dtype=torch.int32, device=rows.device)
        width = power_of_two(n_groups)
        _choose_groups[(n_rows,)](
            maxima, chosen, n_groups, n_chosen, WIDTH=width, BITS=n_bits, num_warps=warps(width)
        )  # fmt: skip
    if n_rows:
        width = power_of_two(n_features if whole else n_chosen * size)
        _choose_features[(n_rows,)](
            rows, chosen, values, indices, n_features, n_chosen, k,
            WHOLE=whole, SIZE=size, WIDTH=width, FLOAT=float_type(rows), INTEGER=integer, BITS=n_bits,
            num_warps=warps(width),
        )  # fmt: skip
    return values, indices


def _positions(flat: Tensor, n: int) -> Tensor:
    if not n or not flat.numel():
        return torch.zeros(0, dtype=torch.int64, device=flat.device)
    if n * GROUP >= flat.numel():
        return _largest_numbers(_maxima(flat[None], 1)[0], n)
    groups = _largest_numbers(_maxima(flat[None], GROUP)[0], n)
    places = (groups[:, None] * GROUP + torch.arange(GROUP, device=flat.device)).reshape(-1)
    inside = places < flat.numel()  # the last group may be short
    values = torch.where(inside, flat[torch.where(inside, places, 0)], 0)
    return places[_largest_numbers(_maxima(values[None], 1)[0], n)] if values.numel() else places


def _maxima(rows: Tensor, size: int) -> Tensor:
    """relu of the largest of each group, as whole numbers in the same order. [B, F] -> [B, ceil(F / size)]"""
    n_rows, n_features = rows.shape
    n_groups = blocks(n_features, size)
    integer, _ = _integer(rows.dtype)
    maxima = torch.empty(
        n_rows, n_groups, dtype=torch.int64 if integer == tl.int64 else torch.int32, device=rows.device
    )
    groups = min(TILE // size, power_of_two(n_groups))
    n_tiles = blocks(n_groups, groups)
    _group_maxima[(n_rows * n_tiles,)](
        rows, maxima, n_features, n_groups, n_tiles,
        SIZE=size, GROUPS=groups, FLOAT=float_type(rows), INTEGER=integer, num_warps=4,
    )  # fmt: skip
    return maxima


def _largest_numbers(numbers: Tensor, n: int) -> Tensor:
    """Positions of the n largest above 0, ascending, ties to the lowest. [N] -> [<= n]"""
    device, size = numbers.device, numbers.numel()
    n_programs = blocks(size, TILE)
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    above = torch.zeros((), dtype=torch.int64, device=device)
    high = numbers.element_size() * 8 - DIGIT
    for shift in range(high, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int32, device=device)
        _count_digits[(n_programs,)](
            numbers, counts, prefix, size, SHIFT=shift, DIGIT=DIGIT, FIRST=shift == high, TILE=TILE, num_warps=4
        )  # fmt: skip
        # no_smaller[d]: how many have digit d or a larger one. It falls with d, so that the n-th largest has the last
        # digit where it reaches n; where it nowhere does, digit 0, and in the end everything above 0 is chosen.
        no_smaller = torch.cat([counts.flip(0).cumsum(0).flip(0), counts.new_zeros(1)])
        digit = ((no_smaller + above >= n).sum() - 1).clamp(min=0)
        above = above + no_smaller[digit + 1]
        prefix = (prefix << DIGIT) | digit
    left = n - above
    counts = torch.empty(2, n_programs, dtype=torch.int32, device=device)
    _count[(n_programs,)](numbers, prefix, counts, size, n_programs, TILE=TILE, num_warps=4)
    before = counts.cumsum(1) - counts  # of a program: how many above the cut, and at it, lie in earlier ones
    found = torch.zeros(n, dtype=torch.int64, device=device)
    _write[(n_programs,)](
        numbers, prefix, left, before, found, size, n_programs, TILE=TILE, num_warps=4
    )  # fmt: skip
    total = above + torch.minimum(left, counts[1].sum())
    return found[: int(total)]


def _integer(dtype: torch.dtype) -> tuple[tl.dtype, int]:
    """The whole numbers that a float's bits are read as, and how many bits those of a float above 0 have."""
    return (tl.int64, 63) if dtype == torch.float64 else (tl.int32, 31)


@triton.jit
def _numbers(x, FLOAT: tl.constexpr, INTEGER: tl.constexpr):
    """relu(x) as whole numbers in the same order. What is no number comes out as the largest, as torch has it."""
    x = x.to(FLOAT)
    one = tl.full([], 1, INTEGER)
    magnitude = x.to(INTEGER, bitcast=True) & ~(one << (INTEGER.primitive_bitwidth - 1))
    return tl.where(x <= 0, 0, magnitude)


@triton.jit
def _k_largest(numbers, k, BITS: tl.constexpr):
    """Which of `numbers` [N] are the k largest, ties to the first. Those below 0 are never chosen; k others exist."""
    one = tl.full([], 1, numbers.dtype)
    cut = tl.full([], 0, numbers.dtype)
    for step in range(BITS):
        trial = cut | (one << (BITS - 1 - step))
        cut = tl.where(tl.sum((numbers >= trial).to(tl.int32)) >= k, trial, cut)
    above = numbers > cut
    tied = numbers == cut
    left = k - tl.sum(above.to(tl.int32))
    return above | (tied & (tl.cumsum(tied.to(tl.int32)) <= left))


@triton.jit
def _group_maxima(
    x, maxima, n_features, n_groups, n_tiles,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, FLOAT: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // n_tiles
    groups = (program % n_tiles) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    values = tl.load(x + row * n_features + columns, mask=columns < n_features, other=0)
    largest = tl.max(_numbers(values, FLOAT, INTEGER), axis=1)
    tl.store(maxima + row * n_groups + groups, largest, mask=groups < n_groups)


@triton.jit
def _choose_groups(maxima, chosen, n_groups, k, WIDTH: tl.constexpr, BITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, WIDTH)
    best = _k_largest(tl.load(maxima + row * n_groups + groups, mask=groups < n_groups, other=-1), k, BITS)
    tl.store(chosen + row * k + tl.cumsum(best.to(tl.int32)) - 1, groups, mask=best)


@triton.jit
def _choose_features(
    x, chosen, values, indices, n_features, n_chosen, k,
    WHOLE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    FLOAT: tl.constexpr, INTEGER: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, WIDTH)
    if WHOLE:
        columns = slots
        inside = columns < n_features
    else:
        named = slots < n_chosen * SIZE
        group = tl.load(chosen + row * n_chosen + slots // SIZE, mask=named, other=0)
        columns = group * SIZE + slots % SIZE
        inside = named & (columns < n_features)
    h = tl.load(x + row * n_features + columns, mask=inside, other=0)
    numbers = tl.where(inside, _numbers(h, FLOAT, INTEGER), -1)
    best = _k_largest(numbers, k, BITS) & (numbers > 0)
    place = row * k + tl.cumsum(best.to(tl.int32)) - 1
    tl.store(values + place, h, mask=best)
    tl.store(indices + place, columns.to(tl.int64), mask=best)


@triton.jit
def _count_digits(
    numbers, counts, prefix, size,
    SHIFT: tl.constexpr, DIGIT: tl.constexpr, FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    number = tl.load(numbers + places, mask=places < size, other=0)
    counted = number > 0
    if not FIRST:
        counted = counted & ((number >> (SHIFT + DIGIT)).to(tl.int64) == tl.load(prefix))
    digit = (number >> SHIFT) & ((1 << DIGIT) - 1)
    tl.atomic_add(counts + digit, 1, mask=counted, sem="relaxed")


@triton.jit
def _count(numbers, cut, counts, size, n_programs, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    places = program * TILE + tl.arange(0, TILE)
    number = tl.load(numbers + places, mask=places < size, other=0).to(tl.int64)
    limit = tl.load(cut)
    tl.store(counts + program, tl.sum((number > limit).to(tl.int32)))
    tl.store(counts + n_programs + program, tl.sum(((number == limit) & (number > 0)).to(tl.int32)))


@triton.jit
def _write(numbers, cut, left, before, found, size, n_programs, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    places = program * TILE + tl.arange(0, TILE)
    number = tl.load(numbers + places, mask=places < size, other=0).to(tl.int64)
    limit, allowed = tl.load(cut), tl.load(left)
    ties_before = tl.load(before + n_programs + program)
    tied = (number == limit) & (number > 0)
    kept = tied & (ties_before + tl.cumsum(tied.to(tl.int32)) <= allowed)
    best = (number > limit) | kept
    start = tl.load(before + program) + tl.minimum(ties_before, allowed)
    tl.store(found + start + tl.cumsum(best.to(tl.int32)) - 1, places, mask=best)
