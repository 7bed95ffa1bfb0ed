"""What a training step of several ranks says, on paper: every collective of a step, its bytes and its calls.

The bytes are those that `wire.Wire` counts, so that a plan can be held against a run; `tests/dist/test_plan.py` does,
to the byte. Per part of a step (`train.accumulate` of them), b tokens of this rank in each, L layers of D, S feature
spaces, P feature ranks, e bytes of a float, 8 of a float64 and of an int64:

    choosing          over all ranks that compete; what and how much: `dist/select.py`
    reconstruction    over features, a sum of R b L D e: y_hat and R - 1 shorter Matryoshka prefixes
    multi_topk        over features, choosing again and a sum of b L D e
    aux_k             over features, where features are dead: how many (S int64), the best dead ones where there are
                      more than D/2 of a space, a sum of b L D e

and once a step:

    spread, l0        where AuxK or the L0 target is at work: over data a sum of (L D + 2) float64, over all one
                      float64; with several parts from a pass of their own, which chooses and sums again
    fired             over data, the largest of S F/P bytes
    scalars           over all, a sum of float64: terms of the loss, active pairs, sums of small gradients, dead
                      features, whether to stop; in steps that are logged squared errors as well
    gradients         over data: `dist/gradients.py`
    gradient norm     over features, with optim.clip one float64

Where the data decide (dead features, ties, how many pairs are active) the plan is handed what they decided (`Seen`).
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from pipeline.dist.gradients import SUMS
from pipeline.dist.select import DIGIT
from pipeline.dist.wire import Count, Op, sent_bytes

WIDE = 8
"""Bytes of a float64 or an int64."""


class Axis(StrEnum):
    features = "features"
    data = "data"
    world = "world"


class Grid(NamedTuple):
    """How many ranks share what."""

    features: int
    data: int

    @property
    def world(self) -> int:
        return self.features * self.data

    def size(self, axis: Axis) -> int:
        return int(getattr(self, axis))


class Talk(NamedTuple):
    """Equal collectives of a step."""

    what: str
    axis: Axis
    op: Op
    n: int
    """Bytes that this rank hands in at each."""
    calls: int = 1

    def counted(self, grid: Grid) -> Count:
        """Nothing where the axis has one rank."""
        size = grid.size(self.axis)
        return Count() if size == 1 else Count(self.calls, self.calls * sent_bytes(self.op, self.n, size))


def counts(talks: Iterable[Talk], grid: Grid) -> dict[str, Count]:
    """What `Wire.counts` is after a step: the collectives by what they say."""
    found: dict[str, Count] = {}
    for talk in talks:
        one = talk.counted(grid)
        if one.calls:
            total = found.setdefault(talk.what, Count())
            total.calls, total.sent = total.calls + one.calls, total.sent + one.sent
    return found


def buffers(talks: Iterable[Talk], grid: Grid) -> int:
    """Bytes of memory for what is handed in and heard, at the most. Large gradients are summed where they lie."""
    said = (talk for talk in talks if grid.size(talk.axis) > 1 and talk.what != SUMS)
    return sum(talk.n * (grid.size(talk.axis) if talk.op is Op.gather else 1) for talk in said)


class Step(NamedTuple):
    """A step, as far as what is said in it depends on settings and shapes."""

    grid: Grid
    n_layers: int
    d_model: int
    n_sources: int
    held: tuple[int, ...]
    """Features of a layer that each feature rank holds."""
    feature_rank: int
    tokens: int
    """Of a part, those of this rank."""
    parts: int
    part_tokens: int
    """Those of all ranks."""
    rule: str
    k: tuple[int, ...]
    """Of a rule that chooses, for each source; empty for others."""
    shorter: int = 0
    """Matryoshka prefixes below F in the loss."""
    wider: tuple[int, ...] = ()
    """k of multi-TopK's second reconstruction."""
    aims_at_l0: bool = False
    """Whether the loss has the L0 target."""
    n_scalars: int = 0
    clips: bool = False
    """Whether gradients are clipped by their norm."""
    item: int = 4
    """Bytes of a float."""


class Seen(NamedTuple):
    """What the data decided in a step."""

    dead: tuple[tuple[int, ...], ...] = ()
    """Features that AuxK revives: of each feature rank, in each source. Empty: none, or no AuxK."""
    ties: int = 0
    """How often a cut of BatchTopK fell between equal values."""


def talks(step: Step, seen: Seen) -> Iterator[Talk]:
    """The collectives of a step but for those of the gradients."""
    y_hat = step.tokens * step.n_layers * step.d_model * step.item
    explains = any(map(any, seen.dead))
    reads_whole = step.aims_at_l0 or explains
    passes = step.parts * (2 if reads_whole and step.parts > 1 else 1)
    yield from chosen(step, step.k, passes)
    yield Talk("reconstruction", Axis.features, Op.reduce, (1 + step.shorter) * y_hat, passes)
    if step.wider:
        yield from chosen(step, step.wider, step.parts)
        yield Talk("multi_topk", Axis.features, Op.reduce, y_hat, step.parts)
    if explains:
        yield from _best_dead(step, seen.dead)
        yield Talk("aux_k", Axis.features, Op.reduce, y_hat, step.parts)
    if reads_whole:
        yield Talk("spread", Axis.data, Op.reduce, WIDE * (step.n_layers * step.d_model + 2))
        if step.aims_at_l0:
            yield Talk("l0", Axis.world, Op.reduce, WIDE)
    if seen.ties:
        yield Talk("batchtopk", Axis.world, Op.reduce, _histogram(step), seen.ties * _digits(_positions(step)))
    yield Talk("fired", Axis.data, Op.reduce, step.n_sources * step.held[step.feature_rank])
    yield Talk("scalars", Axis.world, Op.reduce, WIDE * step.n_scalars)
    if step.clips:
        yield Talk("gradient norm", Axis.features, Op.reduce, WIDE)


def chosen(step: Step, k: Sequence[int], calls: int) -> Iterator[Talk]:
    """What choosing so many features of each source says, ties apart."""
    if step.rule == "topk":
        most = max(step.held)
        n = step.tokens * sum(min(one, most) for one in k) * (step.item + 4)
        yield Talk("topk", Axis.features, Op.gather, n, calls)
    if step.rule in ("batchtopk", "batchtopk_across"):
        yield Talk("batchtopk tokens", Axis.data, Op.gather, WIDE, calls)
        yield Talk("batchtopk", Axis.world, Op.reduce, _histogram(step), calls * _digits(8 * step.item))


def _histogram(step: Step) -> int:
    """Bytes: a row for each source, or one for all, of 2,048 int64."""
    rows = 1 if step.rule == "batchtopk_across" else step.n_sources
    return rows * (1 << DIGIT) * WIDE


def _digits(bits: int) -> int:
    """Passes over numbers of so many bits."""
    return -(-bits // DIGIT)


def _positions(step: Step) -> int:
    """Bits of a place among all pairs that compete."""
    layers = step.n_sources if step.rule == "batchtopk_across" else 1
    return (step.part_tokens * layers * sum(step.held)).bit_length()


def _best_dead(step: Step, dead: Sequence[Sequence[int]]) -> Iterator[Talk]:
    """AuxK: how many are dead, and the candidates where there are more than half the width."""
    most, width = step.d_model // 2, 0
    for source in range(step.n_sources):
        here = [rank[source] for rank in dead]
        if sum(here) > most:
            width += min(most, max(here))
    yield Talk("aux_k", Axis.features, Op.gather, WIDE * step.n_sources, step.parts)
    if width:
        yield Talk("aux_k", Axis.features, Op.gather, step.tokens * width * (step.item + 4), step.parts)
