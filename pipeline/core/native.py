"""The primitives of `core/products.py` in C++, for float32 on a CPU; and Adam that reads a gradient's terms.

The formulas are torch's, the order of sums is their own: results agree to rounding, and bit for bit from run to run
whatever the number of threads. `topk` and `largest` choose exactly what torch's forms choose. `adam` computes, for each
feature row i, the gradient

    g = grad[i] + sum over terms, over tokens b with i active of weights[b, i] * rows[b]

in a buffer of one row and goes on to the moments and the weights at once, so that no dense gradient exists.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core import native_build
from pipeline.core.deferred import RowTerm
from pipeline.core.pattern import Gated, Pattern


class _Term(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("order", "tokens", "edges", "weights", "rows")),
        *((name, ctypes.c_int64) for name in ("stride", "n_tokens")),
    ]


def handles(*tensors: Tensor) -> bool:
    """Whether the kernels are for such tensors: float32 on a CPU, rows of neighbours."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def by_feature(pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """`pattern.by_feature`, from a counting sort; kept in the pattern as that is."""
    if "by_feature" not in pattern.__dict__:
        assert pattern.indices.is_contiguous()
        order, tokens = torch.empty_like(pattern.indices), torch.empty_like(pattern.indices)
        edges = pattern.indices.new_empty(pattern.n_features + 1)
        _call(
            "clt_by_feature",
            pattern.indices,
            pattern.offsets,
            pattern.n_tokens,
            pattern.n_features,
            order,
            tokens,
            edges,
        )
        pattern.__dict__["by_feature"] = order, tokens, edges
    return pattern.by_feature


def bag(pattern: Pattern, values: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """values [nnz], table [F, D] -> [B, D], in `out` or added to it."""
    if out is None:
        out = table.new_empty(pattern.n_tokens, table.shape[1])
    assert pattern.indices.is_contiguous()
    table, values = table.contiguous(), values.contiguous()
    _call(
        "clt_bag", pattern.indices, pattern.offsets, pattern.n_tokens, values, table, table.shape[1],
        out, out.stride(0), add, torch.get_num_threads(),
    )  # fmt: skip
    return out


def row_products(pattern: Pattern, x: Tensor, table: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """x [B, D], table [F, D] -> [nnz], in `out` or added to it."""
    if out is None:
        out = table.new_empty(pattern.indices.numel())
    table = table.contiguous()
    _call(
        "clt_row_products", *by_feature(pattern), pattern.n_features, x, x.stride(0), table, table.shape[1],
        out, add, torch.get_num_threads(),
    )  # fmt: skip
    return out


def bag_of_tokens(pattern: Pattern, weights: Tensor, rows: Tensor) -> Tensor:
    """weights [nnz], rows [B, D] -> [F, D]"""
    out = rows.new_empty(pattern.n_features, rows.shape[1])
    _call(
        "clt_bag_of_tokens", *by_feature(pattern), pattern.n_features, weights.contiguous(), rows, *_laid(rows),
        rows.shape[1], out, torch.get_num_threads(),
    )  # fmt: skip
    return out


def sum_products(pattern: Pattern, x: Tensor, table: Tensor, out: Tensor) -> None:
    """x [B, D], table [F, D], added to out [F]"""
    _, tokens, edges = by_feature(pattern)
    table = table.contiguous()
    _call(
        "clt_sum_products", tokens, edges, pattern.n_features, x, x.stride(0), pattern.n_tokens, table, table.shape[1],
        out, torch.get_num_threads(),
    )  # fmt: skip


def gate(pre_acts: Tensor, theta: Tensor, low: Tensor, half: float, most: int) -> Gated:
    """`core/products.gate`, with `low` below every theta - half."""
    n_rows, width = pre_acts.shape
    indices, beyond = (pre_acts.new_empty(most, dtype=torch.int64) for _ in range(2))
    offsets, beyond_offsets = (pre_acts.new_empty(n_rows + 1, dtype=torch.int64) for _ in range(2))
    values, found = pre_acts.new_empty(most), pre_acts.new_empty(2, dtype=torch.int64)
    theta, low = theta.contiguous(), low.contiguous()
    _call(
        "clt_gate", pre_acts, n_rows, width, pre_acts.stride(0), theta, low, ctypes.c_float(half), most,
        indices, values, offsets, beyond, beyond_offsets, found, torch.get_num_threads(),
    )  # fmt: skip
    n_active, n_beyond = found.tolist()
    return Gated(
        n_active,
        n_beyond,
        Pattern(indices[:n_active], offsets, width) if n_active <= most else None,
        values[:n_active],
        Pattern(beyond[:n_beyond], beyond_offsets, width) if half and n_active + n_beyond <= most else None,
    )


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[..., F] -> values [..., k], indices [..., k]: by index; where fewer are above 0 the rest are 0 at index 0."""
    flat = pre_acts.reshape(-1, pre_acts.shape[-1])
    values, indices = flat.new_empty(flat.shape[0], k), flat.new_empty(flat.shape[0], k, dtype=torch.int64)
    _call("clt_topk", flat, *flat.shape, flat.stride(0), k, values, indices, torch.get_num_threads())
    shape = (*pre_acts.shape[:-1], k)
    return values.view(shape), indices.view(shape)


def largest(flat: Tensor, n: int, guess: float) -> tuple[Tensor, Tensor]:
    """Positions of the n largest above 0, ascending, and the smallest of their values, as `core/topk.largest`."""
    chosen, smallest = flat.new_empty(min(n, flat.numel()), dtype=torch.int64), flat.new_zeros(())
    count = _call("clt_largest", flat.contiguous(), flat.numel(), n, ctypes.c_float(guess), chosen, smallest)
    return chosen[:count], smallest


def adam(
    weight: Tensor,
    moments: tuple[Tensor, Tensor],
    grad: Tensor | None,
    terms: Sequence[RowTerm],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One step of torch.optim.Adam (of AdamW where `decoupled`) in place; `step` counts from 1.

    weight, moments and grad of one shape [F, ...], contiguous.
    """
    assert all(handles(term.weights, term.rows) for term in terms)
    weights = [term.weights.contiguous() for term in terms]
    held = (_Term * len(terms))(
        *(
            _Term(*(t.data_ptr() for t in (*by_feature(term.pattern), values, term.rows)), *_laid(term.rows))
            for term, values in zip(terms, weights, strict=True)
        )
    )
    n_rows = weight.shape[0] if weight.dim() else 1
    doubles = [ctypes.c_double(number) for number in (lr, *betas, eps, weight_decay)]
    _call(
        "clt_adam", weight, *moments, n_rows, weight.numel() // max(n_rows, 1), grad, held, len(terms), *doubles,
        decoupled, ctypes.c_double(step), torch.get_num_threads(),
    )  # fmt: skip


def _laid(rows: Tensor) -> tuple[int, int]:
    """How far apart rows lie, and how many there are."""
    return rows.stride(0), rows.shape[0]


def _call(name: str, *arguments: object) -> int:
    function = getattr(native_build.library(), name)
    function.restype = ctypes.c_int64
    return function(*(_as_c(argument) for argument in arguments))


def _as_c(argument: object) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument
