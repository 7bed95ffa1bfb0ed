"""Gradients of the ranks that share the tokens, added up: after the backward passes, before the optimiser's step.

Losses are weighted so that the gradients of the ranks add up to those of the whole batch. What a parameter has as terms
(`core/deferred.py`) is gathered where that is fewer bytes than to sum dense gradients (`dist/gradient_plan.py`), and
put together in the order of the tokens: the i-th term of a table becomes one term over the tokens of all ranks, rank
after rank, which is the term that one process has. So the optimiser's sums run in one process's order. All other
gradients are summed, the small ones in one call; where a dense gradient lies beside terms (AuxK, a penalty on decoder
norms), those rows of it that are not 0 on every rank.

Bytes that each of P ranks sends in a step, by the words on the wire (`wire.sent_bytes`; `gradient_plan.sent` adds them
up). U patterns, V tensors of weights and W of rows are different ones among the terms; a rank has n tokens in each part
of the batch, e active entries in a pattern, and rows of D numbers of s bytes:

    gradient sizes   8 (3 + 2 U + V + W) (P - 1)
    gradient terms   (sum over patterns of 4 (e + n)  +  over weights of s e  +  over rows of s n D) (P - 1)
    gradient rows    2 F T (P - 1) / P,  T the tables with a dense gradient beside terms
    gradients        2 s N (P - 1) / P,  N the numbers of all other gradients

the second with the sums of the rank where they are largest (tensors of ALONE bytes or more: each with its own largest).
A cross-layer transcoder of L layers has, for each part of the batch, U = L, V = 2 L and W = 2 L with TopK or BatchTopK
and no loss but the reconstruction: encoder and decoder have weights of their own, inputs and outputs are the rows.
Where ranks differ in what they have as terms, a list of it goes round too.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.core import deferred
from pipeline.core.deferred import RowTerm
from pipeline.core.pattern import Pattern
from pipeline.dist import gradient_plan
from pipeline.dist.gradient_plan import Held, Key, Plan, Whole, keys_of
from pipeline.dist.wire import Group

SIZES, ROWS, TERMS, SUMS = "gradient sizes", "gradient rows", "gradient terms", "gradients"


class Gradients:
    """Of these parameters, over the data ranks. Tables among them are told to keep terms (`deferred.want`), whatever
    the optimiser is: those of `train/optim.py` take terms or write them out. A group of one changes nothing."""

    def __init__(self, parameters: Iterable[Parameter], data: Group) -> None:
        self._parameters, self._data = list(parameters), data
        if data.size > 1:
            for parameter in self._parameters:
                if parameter.dim() == 2 and parameter.requires_grad:
                    deferred.want(parameter)

    @torch.no_grad()
    def reduce(self) -> None:
        """Make the gradients those of all ranks, the same to the last bit on each. Every rank has to call it."""
        if self._data.size == 1:
            return
        held, tensors = inspect(self._parameters)
        all_held = self._all_held(held)
        rows = self._rows(gradient_plan.beside(all_held))
        plan = gradient_plan.decided(all_held, whole(self._parameters, {p: ids.numel() for p, ids in rows.items()}))
        self._sum(plan, rows)
        self._gather(plan, held, tensors)

    def _all_held(self, own: Held) -> list[Held]:
        """What every rank has."""
        headers = self._data.gather(self._numbers(own.header()), SIZES).tolist()
        sizes = self._said(list(own.sizes.values()), [header[2] for header in headers])
        if all(header == headers[0] for header in headers):
            return [own._replace(sizes=dict(zip(own.sizes, each, strict=True))) for each in sizes]
        structures = self._said(own.structure(), [header[1] for header in headers])
        return [Held.decoded(structure, each) for structure, each in zip(structures, sizes, strict=True)]

    def _said(self, numbers: list[int], lengths: list[int]) -> list[list[int]]:
        if not max(lengths):
            return [[] for _ in lengths]
        return [one.tolist() for one in self._data.gather_ragged(self._numbers(numbers), SIZES, lengths)]

    def _numbers(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._data.device)

    def _rows(self, parameters: list[int]) -> dict[int, Tensor]:
        """Of each gradient the rows that are not 0 on every rank, ascending."""
        if not parameters:
            return {}
        masks = [_is_used(self._parameters[p]) for p in parameters]
        flat = self._data.largest(torch.cat(masks), ROWS)
        used = flat.split([mask.numel() for mask in masks])
        return {p: mask.nonzero().squeeze(1) for p, mask in zip(parameters, used, strict=True)}

    def _sum(self, plan: Plan, rows: dict[int, Tensor]) -> None:
        as_terms = set(plan.as_terms)
        for call in plan.sums:
            ids = [rows[p] if p in as_terms else None for p in call]
            grads = [_dense(self._parameters[p], i is None) for p, i in zip(call, ids, strict=True)]
            if len(grads) == 1 and ids[0] is None and grads[0].is_contiguous():
                self._data.sum(grads[0], SUMS)
                continue
            parts = [grad if i is None else grad[i] for grad, i in zip(grads, ids, strict=True)]
            flat = self._data.sum(torch.cat([part.flatten() for part in parts]), SUMS)
            totals = flat.split([part.numel() for part in parts])
            for grad, i, part, total in zip(grads, ids, parts, totals, strict=True):
                if i is None:
                    grad.copy_(total.view_as(part))
                else:
                    grad[i] = total.view_as(part)

    def _gather(self, plan: Plan, held: Held, tensors: dict[Key, Tensor]) -> None:
        """Replace the terms that travel by those of all ranks."""
        keys = plan.keys[self._data.rank]
        found: dict[Key, Tensor] = {}
        for call in plan.gathers:
            parts = self._gathered([tensors[keys[i]] for i in call], [plan.sizes[i] for i in call])
            found |= {keys[i]: part for i, part in zip(call, parts, strict=True)}
        patterns: dict[int, Pattern] = {}
        for p in plan.as_terms:
            parameter = self._parameters[p]
            terms = []
            for term, numbers in zip(deferred.take(parameter), held.terms[p], strict=True):
                indices, counts, weights, rows = (found[key] for key in keys_of(numbers))
                if numbers[0] not in patterns:
                    patterns[numbers[0]] = _pattern(indices, counts, term.pattern.n_features)
                terms.append(RowTerm(patterns[numbers[0]], weights, rows.view(-1, term.rows.shape[1])))
            deferred.put(parameter, terms)

    def _gathered(self, tensors: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Each tensor laid flat, followed by those of the next ranks. sizes: bytes of each on every rank."""
        by_rank = [list(each) for each in zip(*sizes, strict=True)]
        own = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        data = own[0] if len(own) == 1 else torch.cat(own)
        found = self._data.gather_ragged(data, TERMS, [sum(each) for each in by_rank])
        cut = [one.split(each) for one, each in zip(found, by_rank, strict=True)]
        return [torch.cat(parts).view(tensors[i].dtype) for i, parts in enumerate(zip(*cut, strict=True))]


def inspect(parameters: Sequence[Parameter]) -> tuple[Held, dict[Key, Tensor]]:
    """What this rank has; and the tensors of its terms as they travel."""
    tensors: dict[Key, Tensor] = {}
    seen: dict[object, int] = {}
    n_found = dict.fromkeys(("pattern", "weights", "rows"), 0)

    def number(kind: str, identity: object) -> tuple[int, bool]:
        is_new = (kind, identity) not in seen
        if is_new:
            seen[kind, identity] = n_found[kind]
            n_found[kind] += 1
        return seen[kind, identity], is_new

    numbered: list[list[tuple[int, int, int]]] = []
    for parameter in parameters:
        numbered.append([])
        for pattern, weights, rows in deferred.terms(parameter):
            i, is_new = number("pattern", id(pattern))
            if is_new:
                tensors["indices", i] = pattern.indices.int()
                tensors["counts", i] = pattern.offsets.diff().int()
            j, is_new = number("weights", _identity(weights))
            if is_new:
                tensors["weights", j] = weights
            k, is_new = number("rows", _identity(rows))
            if is_new:
                tensors["rows", k] = rows
            numbered[-1].append((i, j, k))
    tensors = {key: tensors[key] for key in sorted(tensors, key=gradient_plan.order)}
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    return Held([parameter.grad is not None for parameter in parameters], numbered, sizes), tensors


def whole(parameters: Sequence[Parameter], n_beside: dict[int, int]) -> list[Whole]:
    """n_beside: rows of a gradient beside terms that travel, by parameter."""
    return [Whole(one.nbytes, one.dtype, one.shape[0], n_beside.get(p)) for p, one in enumerate(parameters)]


def _identity(tensor: Tensor) -> object:
    """Equal for tensors that are views of the same numbers, as long as both exist."""
    # Whether empty ones are the same must not depend on their being empty, which they may be on one rank alone.
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)


def _is_used(parameter: Parameter) -> Tensor:
    """Which rows of the gradient are not 0, as a mask of bytes."""
    if parameter.grad is None:
        return torch.zeros(parameter.shape[0], dtype=torch.uint8, device=parameter.device)
    # The norm makes no second tensor of the gradient's size, and that of a NaN is one.
    return (torch.linalg.vector_norm(parameter.grad, torch.inf, dim=1) != 0).to(torch.uint8)


def _dense(parameter: Parameter, with_terms: bool) -> Tensor:
    if with_terms:
        deferred.materialise(parameter)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _pattern(indices: Tensor, counts: Tensor, n_features: int) -> Pattern:
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return Pattern(indices.long(), offsets, n_features)
