"""Which gradients travel as terms, decided alike on every rank from what each of them has.

A table's gradient is either summed whole, F D numbers, or sent as the terms that it consists of (`core/deferred.py`):
the pattern, the weights and the rows of its tokens. One pattern, one tensor of weights and one of rows serve many
tables (every decoder of a layer has its weights, every writer of a layer its rows), and travel once. So the choice is
one for all tables that share tensors, and then for each table: terms, unless fewer bytes are sent without them.

Ranks may have different terms: a layer whose gates are dense for the tokens of one rank gives that rank no terms. Terms
travel only where every rank has the same ones, by their number and by what they share.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from pipeline.dist.wire import Op, sent_bytes

ALONE = 1 << 20
"""Bytes from which on a tensor travels on its own, from where it lies; smaller ones are put together."""

HEADER = 3
"""Numbers of 8 bytes that each rank says first."""

KINDS = ("indices", "counts", "weights", "rows")
"""What a term consists of: the entries of its pattern (int32) and how many each token has (int32), weights, rows."""

Key = tuple[str, int]
"""A tensor: its kind, and its number among those of that kind."""


class Held(NamedTuple):
    """The gradients of a rank after its backward passes, parameter by parameter."""

    dense: list[bool]
    """Whether there is a `.grad`."""
    terms: list[list[tuple[int, int, int]]]
    """The numbers of pattern, weights and rows of each term."""
    sizes: dict[Key, int]
    """Bytes of each tensor on the wire, by kind and number in ascending order."""

    def structure(self) -> list[int]:
        """All but the sizes, as numbers."""
        numbers = []
        for dense, terms in zip(self.dense, self.terms, strict=True):
            numbers += [int(dense), len(terms), *(number for term in terms for number in term)]
        return numbers

    def header(self) -> list[int]:
        """A hash of the structure, the length of it, the number of sizes."""
        structure = self.structure()
        digest = hashlib.blake2b(repr(structure).encode(), digest_size=8).digest()
        return [int.from_bytes(digest, "little") >> 1, len(structure), len(self.sizes)]

    @classmethod
    def decoded(cls, structure: list[int], sizes: list[int]) -> "Held":
        """The inverse of `structure` and of the values of `sizes`."""
        left = iter(structure)
        dense, terms = [], []
        for first in left:
            dense.append(bool(first))
            terms.append([(next(left), next(left), next(left)) for _ in range(next(left))])
        keys = sorted({key for each in terms for term in each for key in keys_of(term)}, key=order)
        return cls(dense, terms, dict(zip(keys, sizes, strict=True)))


class Whole(NamedTuple):
    """A parameter, the same on every rank."""

    nbytes: int
    dtype: torch.dtype
    n_rows: int
    """Along its first axis."""
    n_beside: int | None = None
    """Where there is a `.grad` beside terms (`beside`): rows of it that are not 0 on every rank."""

    @property
    def beside_bytes(self) -> int:
        assert self.n_beside is not None
        return self.nbytes // self.n_rows * self.n_beside


class Plan(NamedTuple):
    """What travels how."""

    as_terms: list[int]
    """Parameters whose terms are gathered."""
    gathers: list[list[int]]
    """Which of the tensors of terms are gathered together."""
    keys: list[list[Key]]
    """For each rank its tensors of terms, the same ones in the same order on all."""
    sizes: list[list[int]]
    """For each of them its bytes on every rank."""
    sums: list[list[int]]
    """Parameters with a gradient that is summed, by which are summed together: of those in `as_terms` the rows beside
    the terms that are not 0, of the others all."""


def keys_of(term: tuple[int, int, int]) -> Iterator[Key]:
    pattern, weights, rows = term
    return zip(KINDS, (pattern, pattern, weights, rows), strict=True)


def beside(held: Sequence[Held]) -> list[int]:
    """The parameters with terms on every rank and a `.grad` too. It is likely to be 0 in most rows: AuxK, say, teaches
    dead features alone."""
    held = _distinct(held)
    with_terms = (p for p in range(len(held[0].dense)) if all(one.terms[p] for one in held))
    return [p for p in with_terms if any(one.dense[p] for one in held)]


def decided(held: Sequence[Held], whole: Sequence[Whole]) -> Plan:
    """The plan for what the ranks have."""
    n_ranks, parameters = len(held), range(len(whole))
    distinct = _distinct(held)
    is_dense = [any(one.dense[p] for one in distinct) for p in parameters]
    both = set(beside(distinct))

    def nbytes(parameter: int, as_term: bool) -> int:
        """Of what is summed."""
        one = whole[parameter]
        if as_term:
            return one.beside_bytes if parameter in both else 0
        return one.nbytes

    extra = [sent_bytes(Op.reduce, nbytes(p, False), n_ranks) for p in parameters]
    extra = [n - sent_bytes(Op.reduce, nbytes(p, True), n_ranks) for p, n in enumerate(extra)]
    shapes, own = _alike(held, [p for p in parameters if held[0].terms[p] and extra[p]])
    sizes = {name: [one.sizes[keys[name]] for one, keys in zip(held, own, strict=True)] for name in own[0]}
    cost = {name: sent_bytes(Op.gather, max(each), n_ranks) for name, each in sizes.items()}
    as_terms = set(_cheapest(shapes, cost, extra))
    needed = {name for p in as_terms for name in shapes[p]}
    travels = [name for name in sizes if name in needed]
    summed = {
        p: nbytes(p, p in as_terms)
        for p in parameters
        if is_dense[p] or (p not in as_terms and any(one.terms[p] for one in distinct))
    }
    return Plan(
        sorted(as_terms),
        _together({i: max(sizes[name]) for i, name in enumerate(travels)}, ["terms" for _ in travels]),
        [[keys[name] for name in travels] for keys in own],
        [sizes[name] for name in travels],
        _together({p: n for p, n in summed.items() if n}, [str(one.dtype) for one in whole]),
    )


def sent(plan: Plan, whole: Sequence[Whole], held: Held, n_ranks: int) -> dict[str, int]:
    """Bytes that a rank sends by this plan, where all ranks have the same structure, by the words on the wire."""
    gathers = (max(sum(plan.sizes[i][rank] for i in call) for rank in range(n_ranks)) for call in plan.gathers)
    both = beside([held])
    by_rows = set(both) & set(plan.as_terms)
    sums = (sum(whole[p].beside_bytes if p in by_rows else whole[p].nbytes for p in call) for call in plan.sums)
    return {
        "gradient sizes": sent_bytes(Op.gather, 8 * HEADER, n_ranks)
        + sent_bytes(Op.gather, 8 * len(held.sizes), n_ranks),
        "gradient rows": sent_bytes(Op.reduce, sum(whole[p].n_rows for p in both), n_ranks),
        "gradient terms": sum(sent_bytes(Op.gather, n, n_ranks) for n in gathers),
        "gradients": sum(sent_bytes(Op.reduce, n, n_ranks) for n in sums),
    }


def order(key: Key) -> tuple[int, int]:
    return KINDS.index(key[0]), key[1]


def _distinct(held: Sequence[Held]) -> list[Held]:
    """One of those that say the same but for sizes, as far as that is seen at once: they are the same lists."""
    return list({(id(one.dense), id(one.terms)): one for one in held}.values())


def _together(sizes: dict[int, int], kinds: Sequence[str]) -> list[list[int]]:
    """Which travel together, given their bytes: the large ones alone, the others by kind."""
    alone, small = [], dict[str, list[int]]()
    for i, size in sizes.items():
        if size >= ALONE:
            alone.append([i])
        else:
            small.setdefault(kinds[i], []).append(i)
    return [*alone, *small.values()]


def _alike(held: Sequence[Held], parameters: list[int]) -> tuple[dict[int, list[Key]], list[dict[Key, Key]]]:
    """Those parameters of which every rank has the same terms. -> what their terms consist of, by names that all ranks
    understand, and for each rank its own key of each name"""
    if len(_distinct(held)) == 1:
        shapes, own = _named(held[0], parameters)
        return shapes, [own for _ in held]
    same = [p for p in parameters if all(len(one.terms[p]) == len(held[0].terms[p]) for one in held)]
    while True:
        found = [_named(one, same) for one in held]
        first = found[0][0]
        odd = next((p for p in same if any(shapes[p] != first[p] for shapes, _ in found)), None)
        if odd is None:
            return first, [own for _, own in found]
        same.remove(odd)  # what follows may have been numbered otherwise because of it


def _named(one: Held, parameters: Sequence[int]) -> tuple[dict[int, list[Key]], dict[Key, Key]]:
    """What each parameter's terms consist of, numbered in order of appearance; and the rank's own key of each."""
    names: dict[Key, Key] = {}
    counts = Counter[str]()
    shapes: dict[int, list[Key]] = {}
    for parameter in parameters:
        shapes[parameter] = []
        for key in (key for term in one.terms[parameter] for key in keys_of(term)):
            if key not in names:
                names[key] = (key[0], counts[key[0]])
                counts[key[0]] += 1
            shapes[parameter].append(names[key])
    return shapes, {name: key for key, name in names.items()}


def _cheapest(shapes: dict[int, list[Key]], cost: dict[Key, int], extra: Sequence[int]) -> list[int]:
    """The parameters that travel as terms."""
    uses = {parameter: set(names) for parameter, names in shapes.items()}
    chosen: list[int] = []
    for group in _sharing(uses):
        kept = group
        while True:
            users = Counter(name for p in kept for name in uses[p])
            only_here = {p: sum(cost[name] for name in uses[p] if users[name] == 1) for p in kept}
            cheap = [p for p in kept if only_here[p] <= extra[p]]
            if len(cheap) == len(kept):
                break
            kept = cheap
        if sum(cost[name] for name in users) <= sum(extra[p] for p in kept):
            chosen += kept
    return sorted(chosen)


def _sharing(uses: dict[int, set[Key]]) -> list[list[int]]:
    """The parameters in groups that have no tensor in common."""
    groups: list[tuple[list[int], set[Key]]] = []
    for parameter, names in uses.items():
        touched = [group for group in groups if not group[1].isdisjoint(names)]
        groups = [group for group in groups if group[1].isdisjoint(names)]
        members = [p for group in touched for p in group[0]]
        groups.append(([*members, parameter], names.union(*(group[1] for group in touched))))
    return [members for members, _ in groups]
