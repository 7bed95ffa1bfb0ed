"""Gradients that are kept as terms, so that no dense one is written.

A table W [F, D] that is read through a few rows a token has the gradient

    dW[i] = sum over terms, over tokens b with i active of weights[b, i] * rows[b]

whose terms are far smaller than W. A leaf that asks for it (`want`) keeps them in a list: the backward passes of
`core/sparse.py` append to it and leave `.grad` alone, micro-batches too. Other gradients of the same leaf (a penalty
on decoder norms, say) go to `.grad` as always; the gradient is the sum of both. An optimiser that understands terms
takes them (`take`); for every other one `materialise` adds them to `.grad`.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.core import products
from pipeline.core.pattern import Pattern


class RowTerm(NamedTuple):
    """grad += bag_of_tokens(pattern, weights, rows)"""

    pattern: Pattern
    weights: Tensor
    """[nnz]"""
    rows: Tensor
    """[B, D]; neighbours in a row lie together, rows may lie apart."""


_TERMS = WeakTensorKeyDictionary()
"""The terms of each leaf that asked for them."""


def want(parameter: Tensor, wanted: bool = True) -> None:
    """From now on the leaf `parameter` [F, D] keeps terms, or no longer does; those that it has are materialised."""
    assert parameter.is_leaf
    if wanted:
        _TERMS.setdefault(parameter, [])
    elif parameter in _TERMS:
        materialise(parameter)
        del _TERMS[parameter]


def wanted(parameter: Tensor) -> bool:
    """Whether the backward pass keeps terms for this tensor."""
    return parameter.is_leaf and parameter.requires_grad and parameter in _TERMS


def append(parameter: Tensor, term: RowTerm) -> None:
    rows = term.rows if term.rows.stride(-1) == 1 else term.rows.contiguous()
    _TERMS[parameter].append(term._replace(rows=rows))


def terms(parameter: Tensor) -> list[RowTerm]:
    """A copy of the list; empty for a tensor that keeps none."""
    return list(_TERMS.get(parameter, ()))


def take(parameter: Tensor) -> list[RowTerm]:
    """The terms, which the parameter forgets."""
    kept = terms(parameter)
    discard([parameter])
    return kept


def put(parameter: Tensor, found: list[RowTerm]) -> None:
    """Replace the terms."""
    _TERMS[parameter] = found


def discard(parameters: Iterable[Tensor]) -> None:
    """Forget the terms of each: what zero_grad is for `.grad`."""
    for parameter in parameters:
        if parameter in _TERMS:
            _TERMS[parameter].clear()


@torch.no_grad()
def materialise(parameter: Tensor) -> None:
    """Add the terms to `.grad` and forget them."""
    for term in take(parameter):
        grad = products.bag_of_tokens(term.pattern, term.weights, term.rows)
        parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
