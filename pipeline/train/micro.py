"""Gradient accumulation: the batch of a step in equal parts, and what they add up to (`train.accumulate`), on one rank
and over all of them.

The loss of a step is the mean over its parts of their losses, so that gradients add up to those of the whole batch for
every term that is a mean over tokens. Two terms are not: AuxK divides by the spread of the errors about their mean, and
the L0 target squares a mean. They are given that one number of the whole batch, from a pass over the parts without
gradients, and are then means as well. What tokens compete for (the BatchTopK rules), they compete for within a part.

Where ranks share the tokens, each has a slice of every part, and its losses count by its share of the tokens. What the
ranks have to agree on comes together once a step (`Taken.join`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.arch.base import Output, Transcoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.core.sparse import Chosen, Pattern, of_layer
from pipeline.data.loader import Batch
from pipeline.dist import sharded
from pipeline.dist.sharded import Over, Ranks, Tally
from pipeline.train.inputs import Inputs
from pipeline.train.objective import BY_FEATURE, Objective, Whole


def parts(batch: Batch, n: int) -> Iterator[Batch]:
    """The batch in n parts of equal size, as views."""
    size = batch.rows.shape[0] // n
    for start in range(0, n * size, size):
        rows = slice(start, start + size)
        yield Batch(batch.resid_mid[rows], None if batch.mlp_out is None else batch.mlp_out[rows], batch.rows[rows])


class Sums:
    """What `Whole` is made of, over the parts of a batch and the ranks that have its tokens."""

    def __init__(self, objective: Objective, n_dead: Sequence[int]) -> None:
        self._ranks, self._counts = objective.ranks, objective.options.l0 > 0
        self._explains = objective.explains(n_dead)
        self._error, self._squares = torch.zeros((), dtype=torch.float64), 0.0
        self._n_active = self._n_tokens = 0

    @torch.no_grad()
    def add(self, out: Output, y: Tensor) -> None:
        """A part, y [B / n, L, D]."""
        error = (y - out.y_hat).double()
        self._error = self._error.to(error.device) + error.sum(dim=0)
        self._squares += float(error.square().sum())
        self._n_active, self._n_tokens = self._n_active + active(out), self._n_tokens + y.shape[0]

    def whole(self) -> Whole:
        """Of the tokens of all ranks."""
        total, squares, n_active, n_tokens = self._error, self._squares, self._n_active, self._n_tokens
        mesh = self._ranks.mesh
        if mesh.data.size > 1:
            packed = mesh.data.sum(torch.cat([total.flatten(), total.new_tensor([squares, n_tokens])]), "spread")
            total, squares, n_tokens = packed[:-2].view_as(total), float(packed[-2]), int(packed[-1])
        if self._counts:
            n_active = int(mesh.world.sum(total.new_tensor([n_active]), "l0"))
        return Whole(squares / n_tokens - float((total / n_tokens).square().sum()), n_active / n_tokens)


@torch.no_grad()
def whole(
    objective: Objective, model: Transcoder, inputs: Inputs, batch: Batch, n: int, n_dead: Sequence[int], step: int
) -> Whole | None:
    """What terms of this step need to know of the whole batch; None where none does, or it is one part. The batch is
    this rank's share of it."""
    if n == 1 or not objective.reads_whole(n_dead):
        return None
    sums = Sums(objective, n_dead)
    rule, was_training = model.activation, model.activation.training
    rule.eval()  # what it remembers from step to step is of the pass that teaches
    for part in parts(batch, n):
        x, y = inputs(part.resid_mid, part.mlp_out)
        sums.add(objective.forward(model, x, step), y)
    rule.train(was_training)
    return sums.whole()


def whole_of(objective: Objective, out: Output, y: Tensor, n_dead: Sequence[int]) -> Whole | None:
    """The same of a batch in one part, which other ranks have features or tokens of. y [B, L, D]"""
    if not objective.reads_whole(n_dead):
        return None
    sums = Sums(objective, n_dead)
    sums.add(out, y)
    return sums.whole()


class Taken:
    """What a step saw, added up over its parts. counts: active pairs too. logs: what metrics.jsonl says too. keeps:
    inputs and errors themselves."""

    def __init__(
        self,
        model: Transcoder,
        y_scale: Tensor,
        counts: bool,
        logs: bool,
        keeps: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._y_scale, self._counts, self._logs, self._keeps = model, y_scale, counts, logs, keeps
        self._ranks = sharded.alone(model) if ranks is None else ranks
        self.n_parts = self.n_tokens = self.n_active = 0
        self.fired = torch.zeros(model.n_sources, model.d_features, dtype=torch.bool, device=y_scale.device)
        """[S, F]: which features fired at all."""
        self._terms: dict[str, Tensor] = {}
        self._reconstruction = 0.0
        self._squares: dict[str, Tensor] = {}
        self.kept: list[tuple[Tensor, Tensor]] = []
        """x, y - y_hat [B / n, L, D] of each part."""

    def note(self, terms: dict[str, Tensor], stacked: Tensor) -> list[float]:
        """The terms of a part, once on their own and once as one tensor. -> their values"""
        self.keep(terms)
        values: list[float] = stacked.tolist()
        self._reconstruction += values[list(terms).index("reconstruction")]
        return values

    def keep(self, terms: dict[str, Tensor]) -> None:
        """The terms of a part, where the ranks will look at them together. Nothing waits for a GPU here."""
        _add(self._terms, {name: term.detach() for name, term in terms.items()})

    @torch.no_grad()
    def add(self, out: Output, x: Tensor, y: Tensor) -> None:
        """A part that has been through the model, with weights as they were."""
        self.n_parts, self.n_tokens = self.n_parts + 1, self.n_tokens + y.shape[0]
        self.fired |= fired(out)
        if self._counts or self._logs:
            self.n_active += active(out)
        if self._logs:
            y_hats = {"fvu": out.y_hat, **_prefixes(self._model, self._ranks, out)}
            _add(self._squares, {name: ((y_hat - y) * self._y_scale).square().sum() for name, y_hat in y_hats.items()})
        if self._keeps:
            self.kept.append((x, (y - out.y_hat).detach()))

    def meet(self) -> None:
        """What fired with the other ranks' tokens fired."""
        data = self._ranks.mesh.data
        if data.size > 1:
            self.fired = data.largest(self.fired.to(torch.uint8), "fired").bool()

    def put(self, tally: Tally, weight: float) -> None:
        """This rank's part of what `take` makes the step's. weight: its share of the tokens."""
        for name, term in self._terms.items():
            over = Over.all if name in BY_FEATURE else Over.data
            tally.put(f"loss/{name}", term.double() * (weight / self.n_parts), over)
        tally.put("n_active", self.n_active)
        for name, square in self._squares.items():
            tally.put(name, square, Over.data)

    def take(self, sums: dict[str, Tensor], n_tokens: int) -> None:
        """From now on it is what the step saw on all ranks, of so many tokens."""
        self._terms = {name: sums[f"loss/{name}"] for name in self._terms}
        self._squares = {name: sums[name] for name in self._squares}
        self._reconstruction = float(self._terms["reconstruction"])
        self.n_parts, self.n_tokens, self.n_active = 1, n_tokens, int(sums["n_active"])

    @property
    def terms(self) -> dict[str, Tensor]:
        """{term: []}, means over the parts."""
        return {name: term / self.n_parts for name, term in self._terms.items()}

    @property
    def reconstruction(self) -> float:
        """The term of that name. Nothing waits for a GPU here."""
        return self._reconstruction / self.n_parts

    @property
    def l0(self) -> float:
        """Active features of a token, all layers together."""
        assert self._counts or self._logs
        return self.n_active / self.n_tokens

    def fvu(self, variance: float) -> dict[str, float]:
        """Pooled, in the model's units, over the given variance; that of shorter prefixes too."""
        return {name: float(square / self.n_tokens) / variance for name, square in self._squares.items()}


def fired(out: Output) -> Tensor:
    """Which features fired at all in the batch. [L, F] bool"""
    if isinstance(out.features, Tensor):
        return (out.features > 0).any(dim=0)
    layers = [of_layer(out.features, layer) for layer in range(len(out.features.values))]
    return torch.stack([_fired(*one) if isinstance(one, Chosen) else (one > 0).any(dim=0) for one in layers])


def _fired(pattern: Pattern, values: Tensor) -> Tensor:
    # The largest value of each feature: four times as fast as taking out the positive entries first.
    return values.new_zeros(pattern.n_features).scatter_reduce_(0, pattern.indices, values, "amax") > 0


def active(out: Output) -> int:
    """Number of active (token, feature) pairs over all layers."""
    layers = [out.features] if isinstance(out.features, Tensor) else out.features.values
    return sum(int((values > 0).sum()) for values in layers)


def _prefixes(model: Transcoder, ranks: Ranks, out: Output) -> dict[str, Tensor]:
    """The reconstruction from each shorter prefix, of the same sizes in every line of the log."""
    if not isinstance(model, Matryoshka) or not isinstance(ranks.whole, Matryoshka):
        return {}
    *sizes, _ = ranks.whole.usual_sizes()
    found = ranks.summed(model.nested(out.features, ranks.here(sizes)), "prefixes")
    return {f"fvu/prefix_{m}": part for m, part in zip(sizes, found, strict=True)}


def _add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value
