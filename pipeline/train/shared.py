"""Several runs through the same batches, in one process: each batch is read once.

Each run has its own trainer, and its step is the one that it takes alone. What a process has one of, the runs have in
turns: torch's random generators (`Generators`). What they share is read alone: the batch, with
`cache.targets=recompute` its targets (`Targets`), and what is made of them for runs of the same units (`Prepared`).
Kernels and the device are one for all.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.progress import Progress
from pipeline.train.inputs import Inputs
from pipeline.train.interrupt import leave, stop_requests
from pipeline.train.loop import Trainer

Attempt = Callable[[Sequence[int], Callable[[], None]], bool]
"""attempt(jobs, work): does the work, and is true where it succeeded. Else it says so of these jobs, and no more."""


class Generators:
    """torch's random generators as one of several runs knows them: as if it were alone in the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._state = self._now()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Inside, they are this run's."""
        others = self._now()
        self._put(self._state)
        try:
            yield
        finally:
            self._state = self._now()
            self._put(others)

    def _now(self) -> list[Tensor]:
        cuda = [] if self._device is None else [torch.cuda.get_rng_state(self._device)]
        return [torch.get_rng_state(), *cuda]

    def _put(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._device is not None:
            torch.cuda.set_rng_state(state[1], self._device)


class Targets:
    """A function of a batch's rows (the base model's MLPs), computed once for all runs: of each part of the batch,
    since another number of rows would be rounded otherwise."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._known: dict[tuple[int, int], Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: a part of the batch at hand, which lies where it is until `forget`."""
        place = rows.data_ptr(), rows.shape[0]
        if place not in self._known:
            self._known[place] = self._function(rows)
        return self._known[place].clone()  # a trainer may prepare its targets in place

    def forget(self) -> None:
        """The next batch comes, perhaps to the same place."""
        self._known.clear()


class Prepared:
    """Batches in the transcoder's units: bfloat16 to float32, the norm in front of the MLP, scaling. Computed once for
    all runs whose units are the same, and kept while they take their steps; they read it alone. Parts of a batch
    (`train.accumulate`) are prepared for each run, so that no more than a part is in memory."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._kinds: list[Inputs] = []
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._versions: list[int] = []

    def join(self, inputs: Inputs) -> Inputs:
        """The same inputs, which share what they make of a batch with those before that are equal to them."""
        kind = next((i for i, one in enumerate(self._kinds) if _same(one, inputs)), len(self._kinds))
        if kind == len(self._kinds):
            self._kinds.append(inputs)

        def prepare(own: Inputs, resid_mid: Tensor, mlp_out: Tensor | None) -> tuple[Tensor, Tensor]:
            batch, alone = self._batch, own._replace(shared=None)
            if batch is None or resid_mid.data_ptr() != batch.resid_mid.data_ptr() or len(resid_mid) != len(batch.rows):
                return alone(resid_mid, mlp_out)
            if kind not in self._known:
                self._known[kind] = alone(resid_mid, mlp_out)
                self._versions += _versions(self._known[kind])
            return self._known[kind]

        return inputs._replace(shared=prepare)

    def next(self, batch: Batch | None) -> None:
        """This is the batch from now on."""
        self._batch = batch
        self._known.clear()
        self._versions.clear()

    def unchanged(self) -> bool:
        """Whether what was made of the batch is as it was made."""
        return self._versions == _versions(tensor for pair in self._known.values() for tensor in pair)


def _same(one: Inputs, other: Inputs) -> bool:
    """Whether they make the same of every batch."""
    if (one.site, one.target, one.norm.kind, one.norm.eps) != (
        other.site,
        other.target,
        other.norm.kind,
        other.norm.eps,
    ):
        return False
    mine, theirs = ((*i.scaling, i.norm.gain, i.norm.bias) for i in (one, other))
    return (one.recompute is None) == (other.recompute is None) and all(map(torch.equal, mine, theirs))


@dataclass
class Member:
    """One of the runs."""

    job: int
    trainer: Trainer
    generators: Generators
    conclude: Callable[[dict[str, object]], None]
    """What follows its last step, with the last line of its log."""

    close: Callable[[], None]
    """Lets go of what it holds, however it ended."""

    shown: dict[str, str | float] = field(default_factory=dict)
    """What a progress bar shows of it."""


def first_step(members: Sequence[Member]) -> int:
    """Where the batches have to begin: at the run that has come least far."""
    return min(member.trainer.state.step for member in members)


def train(members: list[Member], batches: Iterator[Batch], attempt: Attempt, targets: Targets | None = None) -> None:
    """Take the runs to their ends and conclude them. batches: from `first_step` on.

    A run that ends leaves `members`, and so does one that fails. One that is further than the others joins when the
    batches have come to its step; where all others have failed meanwhile, it is left, for batches that begin there.
    Ctrl-C and SIGTERM save a checkpoint of each that has taken steps, and raise KeyboardInterrupt.
    """
    size = members[0].trainer.plan.batch_tokens
    position = first_step(members)
    last = max(member.trainer.plan.n_steps for member in members)
    prepared = Prepared()
    for member in members:
        member.trainer.inputs = prepared.join(member.trainer.inputs._replace(shared=None))
        member.trainer.start()
    with stop_requests() as requested, Progress(last * size, "tok", f"train {len(members)}", position * size) as bar:
        _conclude(members, attempt)
        while any(member.trainer.state.step == position for member in members):
            batch, waited = _next(members, batches, attempt)
            if batch is None:
                return
            prepared.next(batch)
            if targets is not None:
                targets.forget()
            for member in [one for one in members if one.trainer.state.step == position]:
                _advance(member, members, batch, waited, attempt, prepared)
            prepared.next(None)
            position += 1
            bar.update(size, **_shown(members))
            if asked := requested():
                for member in list(members):
                    attempt([member.job], _in_turn(member, member.trainer.stop))
                leave(asked)
            _conclude(members, attempt)


def _next(members: list[Member], batches: Iterator[Batch], attempt: Attempt) -> tuple[Batch | None, float]:
    """The next batch, where they train, and the seconds that it took to come; None where it cannot be read: then all
    have failed."""
    found: list[Batch] = []
    device = members[0].trainer.inputs.device

    def fetch() -> None:
        batch = next(batches)
        # On a GPU one copy serves all; on a CPU this is the batch itself.
        mlp_out = None if batch.mlp_out is None else batch.mlp_out.to(device)
        found.append(Batch(batch.resid_mid.to(device), mlp_out, batch.rows))

    asked = time.perf_counter()
    if attempt([member.job for member in members], fetch):
        return found[0], time.perf_counter() - asked
    for member in members:
        member.close()
    members.clear()
    return None, 0.0


def _advance(
    member: Member, members: list[Member], batch: Batch, waited: float, attempt: Attempt, prepared: Prepared
) -> None:
    def step() -> None:
        before = _versions(batch)
        member.shown |= member.trainer.advance(batch, waited)
        same = _versions(batch) == before and prepared.unchanged()
        assert same, "a trainer has changed the batch, which others are to read"

    if not attempt([member.job], _in_turn(member, step)):
        _leave(member, members)


def _conclude(members: list[Member], attempt: Attempt) -> None:
    """Those that have taken their last step."""
    for member in [one for one in members if one.trainer.at_end]:
        attempt([member.job], _in_turn(member, partial(_end, member)))
        _leave(member, members)


def _end(member: Member) -> None:
    member.conclude(member.trainer.end())


def _leave(member: Member, members: list[Member]) -> None:
    members.remove(member)
    member.close()


def _in_turn(member: Member, work: Callable[[], None]) -> Callable[[], None]:
    def turn() -> None:
        with member.generators.own():
            work()

    return turn


def _versions(tensors: Iterable[Tensor | None]) -> list[int]:
    """torch counts what is changed in place."""
    return [tensor._version for tensor in tensors if tensor is not None]


def _shown(members: Sequence[Member]) -> dict[str, str | float]:
    """How many are at work, and the range of what each would show."""
    shown: dict[str, str | float] = {"runs": str(len(members))}
    for name in ("fvu", "l0"):
        values = [float(member.shown[name]) for member in members if name in member.shown]
        if values:
            shown[name] = f"{min(values):.4g} to {max(values):.4g}"
    return shown
