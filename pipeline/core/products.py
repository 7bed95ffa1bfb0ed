"""The operations of the sparse step, without gradients, for each kind of device.

    bag             y[b] = sum over active i of values[b, i] * W[i]
    row_products    p[b, i] = x[b] . W[i] at the active pairs (b, i) alone
    sum_products    s[i] = W[i] . sum over tokens b with i active of x[b]
    bag_of_tokens   dW[i] = sum over tokens b with i active of weights[b, i] * rows[b]
    topk            the k largest of relu(h) of each row, ties to the lowest index
    gate            the pairs above thresholds, and those a little below them

All are exact. Each exists in torch, which runs everywhere and is what runs outside `using`. `compiled` is C++ for
float32 on a CPU (`core/native.py`), `triton` is for CUDA (`core/triton_kernels.py`); tensors of another device or type
take torch's way there too.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.options import Kernels
from pipeline.core.pattern import Gated, Pattern, from_pairs, from_positions, positions
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

_SUM = 0
"""torch's number for mode="sum"."""

_active: tuple[Kernels, ModuleType | None] = (Kernels.torch, None)
"""Not a context variable: autograd computes CUDA gradients in threads of its own."""


@contextmanager
def using(kernels: Kernels, device: torch.device) -> Iterator[Kernels]:
    """Within it the operations run as `kernels` says; gives what `auto` came to on this device, and logs it.

    UserError for kernels that cannot be had: no compiler, no Triton, or the wrong device.
    """
    global _active
    before, _active = _active, _chosen(kernels, device)
    try:
        yield _active[0]
    finally:
        _active = before


def active() -> Kernels:
    """What runs now, for the tensors that it is made for; never auto."""
    return _active[0]


def module() -> ModuleType | None:
    """What has the operations that run now, and `handles` and `adam`; None for torch."""
    return _active[1]


def bag(pattern: Pattern, values: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Sum of the active features' rows, weighted. values [nnz], table [F, D] -> [B, D], in `out` or added to it."""
    fast = _fast(values, table)
    if fast is not None and _rows(out):
        return fast.bag(pattern, values, table, out, add)
    rows = F.embedding_bag(
        pattern.indices,
        table.detach(),
        pattern.offsets,
        mode="sum",
        per_sample_weights=values.detach(),
        include_last_offset=True,
    )
    return _into(rows, out, add)


def row_products(pattern: Pattern, x: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x[b] . table[i] at the pattern's pairs (b, i). x [B, D], table [F, D] -> [nnz], in `out` or added to it."""
    fast = _fast(x, table)
    if fast is not None and _rows(out):
        return fast.row_products(pattern, x, table, out, add)
    # The gradient of a bag's weights is this product, and torch has a kernel for it that gathers no rows.
    inner = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), table, pattern.indices, pattern.offsets, pattern.tokens, _SUM
    )
    return _into(inner, out, add)


def bag_of_tokens(pattern: Pattern, weights: Tensor, rows: Tensor) -> Tensor:
    """For each feature the weighted sum of its tokens' rows, in their order. weights [nnz], rows [B, D] -> [F, D]"""
    fast = _fast(weights, rows)
    if fast is not None:
        return fast.bag_of_tokens(pattern, weights, rows)
    # torch's own gradient of a bag's table scatters into a dense table row by row, several times slower on a CPU.
    order, tokens, offsets = pattern.by_feature
    return F.embedding_bag(
        tokens,
        rows.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=weights.index_select(0, order),
        include_last_offset=True,
    )


def bag_gradients(
    pattern: Pattern, values: Tensor, rows: Tensor, table: Tensor, so_far: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of a bag whose output's is rows: by its values [nnz], added to `so_far`, and by its table [F, D].

    values [nnz], rows [B, D], table [F, D]
    """
    fast = _fast(values, rows, table)
    if fast is not None and _active[0] == Kernels.triton:
        return fast.bag_gradients(pattern, values, rows, table, so_far)
    by_values = row_products(pattern, rows, table, so_far, add=so_far is not None)
    return by_values, bag_of_tokens(pattern, values, rows)


def sums_by_feature(pattern: Pattern, weights: Tensor) -> Tensor:
    """For each feature the sum of its entries' weights. [nnz] -> [F]"""
    fast = _fast(weights)
    if fast is not None and _active[0] == Kernels.triton:  # index_add on CUDA adds in an order of its own each time
        return fast.bag_of_tokens(pattern, weights, weights.new_ones(pattern.n_tokens, 1)).squeeze(1)
    return weights.new_zeros(pattern.n_features).index_add(0, pattern.indices, weights)


def sum_products(pattern: Pattern, x: Tensor, table: Tensor, out: Tensor) -> None:
    """Each feature's row times the sum of its tokens' rows: `row_products` summed over tokens, without the products.

    x [B, D], table [F, D]; added to out [F]
    """
    fast = _fast(x, table, out)
    if fast is not None and _active[0] == Kernels.compiled:
        fast.sum_products(pattern, x, table, out)
    else:
        ones = x.new_ones(()).expand(pattern.indices.shape)
        out += (bag_of_tokens(pattern, ones, x) * table).sum(dim=1)


def gate(pre_acts: Tensor, theta: Tensor, half: float, most: int) -> Gated:
    """The active pairs, h > theta, and those beyond them: not active, and h > theta - half.

    pre_acts [B, F], theta [F]. Without the latter where there are more than `most` of both together, and without a
    pattern at all where so many are active.
    """
    fast, low = _fast(pre_acts, theta), below(theta, half)
    if fast is not None and _active[0] == Kernels.compiled:
        return fast.gate(pre_acts, theta, low, half, most)
    n_tokens, n_features = pre_acts.shape
    flat, needed = pre_acts.flatten(), exceeds(pre_acts, low)
    n_needed = int(needed.count_nonzero())
    if n_needed > most:
        active = exceeds(pre_acts, theta)
        n_active = int(active.count_nonzero())
        if n_active > most:
            return Gated(n_active, n_needed - n_active, None, flat[:0], None)
        where = positions(active)
        pattern = from_positions(where, pre_acts.shape)
        return Gated(n_active, n_needed - n_active, pattern, flat.index_select(0, where), None)
    where = positions(needed)
    tokens, values = where // n_features, flat.index_select(0, where)
    indices = where - tokens * n_features
    if not half:
        return Gated(n_needed, 0, from_pairs(tokens, indices, n_tokens, n_features), values, None)
    above = values - theta.index_select(0, indices)
    is_active = ~(above <= 0)
    active, beyond = (part.nonzero().squeeze(1) for part in (is_active, (above > -half) & ~is_active))
    patterns = [
        from_pairs(tokens.index_select(0, part), indices.index_select(0, part), n_tokens, n_features)
        for part in (active, beyond)
    ]
    return Gated(active.numel(), beyond.numel(), patterns[0], values.index_select(0, active), patterns[1])


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(pre_acts) of each row, in some order, ties to the lowest index.

    [..., F] -> values [..., k], indices [..., k]; where fewer than k are above 0 the rest are 0 at some index.
    """
    fast = _fast(pre_acts)
    if fast is not None:
        return fast.topk(pre_acts, k)
    if pre_acts.device.type == "cpu" and pre_acts.dtype in (torch.float32, torch.float64):
        found = _above_a_bound(pre_acts.reshape(-1, pre_acts.shape[-1]), k)
        if found is not None:
            return found[0].view(*pre_acts.shape[:-1], k), found[1].view(*pre_acts.shape[:-1], k)
    extra = min(k + 1, pre_acts.shape[-1])
    values, indices = pre_acts.topk(extra, dim=-1)
    if extra > k:
        # topk orders equal values as it likes; only a tie across the cut can change the choice.
        tied = (values[..., k - 1] == values[..., k]) & (values[..., k] > 0)
        if tied.any():
            again = pre_acts[tied].sort(dim=-1, descending=True, stable=True)
            indices[tied] = again.indices[..., :extra]
    return values[..., :k].relu(), indices[..., :k]


def _above_a_bound(h: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """`topk` of [B, F] on a CPU, where torch's reads and writes every row several times.

    Of the maxima of 4 k groups of a row k reach the k-th largest of them, so that the row's k largest do. None where
    that saves nothing: few features, or a row in which fewer than k are above 0, two compete for the last place, or
    one is not finite.
    """
    n_tokens, n_features = h.shape
    groups = max(64, 4 * k)
    size = n_features // groups
    if size < 4 or n_tokens == 0:
        return None
    maxima = h[:, : size * groups].unflatten(1, (size, groups)).amax(dim=1)
    rest = n_features - size * groups
    maxima[:, :rest] = torch.maximum(maxima[:, :rest], h[:, size * groups :])
    if not bool(maxima.sum().isfinite()):
        return None
    bound = _kth_largest(maxima, k)
    if float(bound.min()) <= 0:
        return None
    where = positions(torch.from_numpy(h.numpy() >= bound.numpy()))
    tokens = where // n_features
    begin = torch.searchsorted(tokens, torch.arange(n_tokens + 1))
    values = h.flatten().index_select(0, where)
    # Each row's candidates side by side, to find the k-th largest.
    slots = torch.arange(where.numel()) - begin.index_select(0, tokens)
    width = int(begin.diff().max())
    aside = h.new_zeros(n_tokens, width)
    aside.view(-1)[tokens * width + slots] = values
    kept = (values >= _kth_largest(aside, k).squeeze(1).index_select(0, tokens)).nonzero().squeeze(1)
    if kept.numel() != n_tokens * k:
        return None
    indices = where.index_select(0, kept) - tokens.index_select(0, kept) * n_features
    return values.index_select(0, kept).view(n_tokens, k), indices.view(n_tokens, k)


def _kth_largest(rows: Tensor, k: int) -> Tensor:
    """Of each row, which it leaves in disorder. [B, n] -> [B, 1]"""
    ranked, place = rows.numpy(), rows.shape[1] - k
    ranked.partition(place, axis=1)  # a sixth of the time of torch's
    return rows[:, place : place + 1].clone()


def largest(flat: Tensor, n: int, guess: float) -> tuple[Tensor, Tensor]:
    """Positions of the n largest values above 0, ascending, ties to the lowest position; and the smallest of them.

    flat [N], n at least 1. Exact whatever `guess` is: where at least n values exceed 0.8 of it, the n largest lie among
    those, and only they are ranked. From one step to the next the threshold hardly moves, so that the ranking sees a
    few percent of the values.
    """
    fast = _fast(flat)
    if fast is not None:
        return fast.largest(flat, n, guess)
    candidates = (flat > 0.8 * guess).nonzero().squeeze(1) if guess > 0 else flat[:0]
    if candidates.numel() < n or guess <= 0:
        candidates = (flat > 0).nonzero().squeeze(1)
    values = flat[candidates]
    if candidates.numel() <= n:
        return candidates, values.min() if candidates.numel() else flat.new_zeros(())
    cut = values.topk(n, sorted=False).values.min()
    above, ties = values > cut, (values == cut).nonzero().squeeze(1)
    above[ties[: n - int(above.sum())]] = True
    return candidates[above.nonzero().squeeze(1)], cut


def below(theta: Tensor, half: float) -> Tensor:
    """theta - half, less what rounding may move that edge by: too much passes, never too little."""
    return theta - half - 4 * torch.finfo(theta.dtype).eps * (theta.abs() + half) if half else theta


def exceeds(x: Tensor, bound: Tensor) -> Tensor:
    """Whether x is larger, as a NaN is. [B, F], [F] -> bool [B, F]"""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(~(x.numpy() <= bound.numpy()))  # torch's comparison takes twice as long
    return ~(x <= bound)


def _into(result: Tensor, out: Tensor | None, add: bool) -> Tensor:
    if out is None:
        return result
    return out.add_(result) if add else out.copy_(result)


def _rows(out: Tensor | None) -> bool:
    return out is None or out.stride(-1) == 1


def _fast(*tensors: Tensor) -> ModuleType | None:
    """The module with what runs now, where it is for such tensors; None for torch's way."""
    module = _active[1]
    return module if module is not None and module.handles(*tensors) else None


def _chosen(kernels: Kernels, device: torch.device) -> tuple[Kernels, ModuleType | None]:
    """The kernels and the module that has them; auto takes the fastest that can be had."""
    if kernels == Kernels.auto:
        return _best(device)
    if kernels == Kernels.torch:
        return kernels, None
    wanted = "cpu" if kernels == Kernels.compiled else "cuda"
    if device.type != wanted:
        raise UserError(
            f"train.kernels={kernels} are for {wanted} and the run is on {device}; use train.kernels=auto, or "
            f"train.device={wanted}"
        )
    return kernels, _native() if kernels == Kernels.compiled else _triton_kernels()


def _best(device: torch.device) -> tuple[Kernels, ModuleType | None]:
    if device.type != "cpu":
        # Triton's have run under its interpreter alone: who asks for them gets them, until `pytest -m gpu` has passed.
        logger.info("kernels    torch (train.kernels=triton was never run on a GPU)")
        return Kernels.torch, None
    try:
        module = _native()
    except UserError as error:
        logger.info("kernels    torch's; the faster ones cannot be had: %s", error)
        return Kernels.torch, None
    logger.info("kernels    compiled")
    return Kernels.compiled, module


def _native() -> ModuleType:
    from pipeline.core import native, native_build

    native_build.library()
    return native


def _triton_kernels() -> ModuleType:
    name = "pipeline.core.triton_kernels"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(name) is None:
        raise UserError("Triton is not installed; pip install triton, or use train.kernels=torch")
    return importlib.import_module(name)
