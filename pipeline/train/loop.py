"""The training loop: a batch, a step, the counters, a line in the log."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.data.loader import Batch
from pipeline.data.shuffle import derive
from pipeline.dist.gradients import Gradients
from pipeline.dist.sharded import Over, Tally
from pipeline.dist.share import Share
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.train import checkpoint, controller, health, log_fields, micro
from pipeline.train import run as runs
from pipeline.train.checkpoint import State
from pipeline.train.checkpoint_writer import Writer
from pipeline.train.clock import Clock
from pipeline.train.health import Divergence
from pipeline.train.held_out import PREFIX, HeldOut
from pipeline.train.inputs import Inputs
from pipeline.train.interrupt import Asked, heard, leave, stop_requests, told
from pipeline.train.memory import Peak
from pipeline.train.micro import Taken
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions
from pipeline.train.resample import resample
from pipeline.train.run_log import RunLog
from pipeline.train.run_plan import Plan
from pipeline.train.schedule import learning_rate

logger = logging.getLogger(__name__)


class Trainer:
    """One run: `fit` goes from the state's step to the last and returns the last line of the log."""

    def __init__(
        self,
        directory: Path,
        model: Transcoder,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        inputs: Inputs,
        plan: Plan,
        optim: OptimOptions,
    ) -> None:
        self.directory, self.model, self.optimizer = directory, model, optimizer
        self.objective, self.inputs, self.plan, self.optim = objective, inputs, plan, optim
        self.ranks = objective.ranks
        data = self.ranks.mesh.data
        self.share = Share(data.rank, data.size, plan.accumulate)
        """Which rows of a batch come to this rank: `fit` is handed batches of these."""
        self.gradients = Gradients((p for group in optimizer.param_groups for p in group["params"]), data)
        never = torch.zeros(model.n_sources, model.d_features, dtype=torch.int64, device=inputs.device)
        self.state = State(0, never, controller.first(objective.options) if objective.controlled else None)
        self.divergence = Divergence(plan.diverged, objective.trivial)
        self.log = RunLog(directory, self.ranks.mesh.speaks)
        self.writer = Writer(directory)
        """What writes checkpoints; who has other ranks, or lets it write beside the training, puts another here."""
        self.clock = Clock()
        self.memory: Peak | None = None
        self.last_record: dict[str, object] = {}
        self.saved_step: int | None = None
        self.about: dict[str, object] = {}
        self.held_out: HeldOut | None = None
        """What the best checkpoints are chosen by, and what metrics.jsonl says of held-out text."""
        self.asked: Callable[[], Asked] = lambda: Asked.nothing
        """What this rank has been asked for."""
        self.agreed = Asked.nothing
        """What some rank had been, when the last step was taken."""
        self._n_dead: list[int] | None = None
        """Dead features of each source on all ranks, where there are several; None: not asked yet."""
        self._forms: dict[str, float] = {}
        """Shares of layers in sparse form and with a dense window, means over the ranks."""

    def begin(self, path: Path | None) -> None:
        """Continue from a checkpoint, as if the run had never stopped; None: what was logged before one counts not."""
        if path is not None:
            self.state = self.writer.load(path, self.model, self.optimizer)
            self.ranks.bare(self.model)
            self.divergence.restore(self.state.more)
            self.saved_step = self.state.step
            if self.writer.speaks:
                self._pruning()()  # a process may have been killed between saving a checkpoint and this
        self.log.begin(path, self.state.step)

    def fit(self, batches: Iterator[Batch]) -> dict[str, object]:
        """`batches` begins at the batch that follows the state. Ctrl-C and other signals save a checkpoint first."""
        size = self.plan.batch_tokens
        self.start()
        with stop_requests() as self.asked, Progress(self.plan.n_steps * size, "tok", "train", self.done_tokens) as bar:
            while not self.at_end:
                asked = time.perf_counter()
                batch = next(batches)
                bar.update(size, **self.advance(batch, time.perf_counter() - asked))
                if word := self.agreed if self.ranks.many else self.asked():
                    self.stop()
                    leave(word)
        return self.end()

    # What `fit` consists of, for whoever takes several trainers through the same batches (`train/shared.py`).

    @property
    def at_end(self) -> bool:
        return self.state.step >= self.plan.n_steps

    @property
    def done_tokens(self) -> int:
        return self.state.step * self.plan.batch_tokens

    def start(self) -> None:
        """Before the first batch."""
        self.model.train()
        self.clock, self.memory = Clock(), Peak(self.inputs.device)

    def advance(self, batch: Batch, waited: float) -> dict[str, str | float]:
        """Take the next step with its batch, which came after so many seconds: its log line and its checkpoint are
        written when due. -> what a progress bar shows of it; nothing where it is not logged"""
        plan, state = self.plan, self.state
        self.writer.check()
        self.clock.step_begins(waited)
        rate = learning_rate(self.optim, state.step, plan.n_steps)
        taken = self.step(batch, rate)
        state.step += 1
        fields: dict[str, str | float] = {}
        if plan.logs(state.step):
            self.last_record = self.record(taken, rate) | self._measured()
            times = self.clock.record(state.step, plan.batch_tokens)
            if self.inputs.recompute is not None:
                times["targets_ms"] = self.inputs.recompute.take_ms()
            if self.held_out is not None and (ms := self.held_out.take_ms()):
                times["held_out_ms"] = ms
            if self.memory is not None:
                times["memory_mb"] = round(self.memory.mb(), 1)
            self.log.add(self.last_record, times)
            fields = log_fields.on_bar(self.last_record)
        self._steer(taken)
        self._refuse_divergence(taken)
        if plan.saves(state.step):
            self.save()
        self.clock.step_ends()
        return fields

    def stop(self) -> None:
        """Save where the run stands, between two steps, and say how it goes on."""
        if self.saved_step != self.state.step:
            self.save()
        self.writer.wait()
        name = runs.name_of(self.directory)
        step, last = self.state.step, self.plan.n_steps
        logger.info("stopped at step %d of %d; clt train name=%s continues", step, last, name)

    def end(self) -> dict[str, object]:
        """After the last batch. -> the last line of the log, {} where no step was taken"""
        self.writer.wait()
        self.model.activation.at(1.0)
        return self.last_record

    def step(self, batch: Batch, rate: float) -> Taken:
        """One optimiser step, and the counters that follow from it."""
        state, plan, many = self.state, self.plan, self.ranks.many
        self.model.activation.at(state.step / plan.n_steps)
        dead, n_dead = self.dead(), self._dead_of_all()
        self.optimizer.zero_grad(set_to_none=True)
        counts, scale = self.objective.controlled, self.inputs.scaling.y_scale
        logs, keeps = plan.logs(state.step + 1), plan.resamples(state.step + 1)
        taken = Taken(self.model, scale, counts, logs, keeps, self.ranks)
        whole = micro.whole(self.objective, self.model, self.inputs, batch, plan.accumulate, n_dead, state.step)
        weight = self.share.weight(plan.part_tokens)
        for part in micro.parts(batch, plan.accumulate):
            x, y = self.inputs(part.resid_mid, part.mlp_out)
            out = self.objective.forward(self.model, x, state.step)
            if many and plan.accumulate == 1:
                whole = micro.whole_of(self.objective, out, y, n_dead)
            terms = self.objective(self.model, out, x, y, dead, state.step, state.log_lambda, whole, n_dead)
            stacked = torch.stack(list(terms.values()))
            if many:
                taken.keep(terms)
            elif not math.isfinite(sum(taken.note(terms, stacked))):
                raise self._not_finite("loss", health.bad_terms(terms))
            loss = stacked.sum() / plan.accumulate
            (loss * weight if weight < 1 else loss).backward()
            taken.add(out, x, y)
            del out, terms, stacked, loss  # what they keep of this part is not to lie beside the next
        if not many and (bad := health.bad_gradients(self.model)):
            raise self._not_finite("gradient", bad)
        taken.meet()
        state.tokens_since_fired += plan.batch_tokens if many else taken.n_tokens
        state.tokens_since_fired.masked_fill_(taken.fired, 0)
        if many:
            self._agree(taken, weight, logs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.gradients.reduce()
        self.optimizer.step()
        self._resample(taken)
        return taken

    def _agree(self, taken: Taken, weight: float, logs: bool) -> None:
        """Bring together what the ranks need to take the same decisions: one small all-reduce a step."""
        tally = Tally(self.ranks.mesh, self.inputs.device)
        taken.put(tally, weight)
        for name, total in health.gradient_sums(self.model).items():
            tally.put(f"gradient/{name}", total)
        tally.put("dead", self.dead().sum(dim=1), Over.features)
        tally.put("stop", told(self.asked(), self.ranks.mesh.world.size))
        forms = log_fields.forms(self.objective, self.model.activation) if logs else {}
        for name, share in forms.items():
            tally.put(name, share / self.ranks.mesh.world.size)
        sums = tally.sums()
        taken.take(sums, self.plan.batch_tokens)
        self.agreed = heard(float(sums["stop"]), self.ranks.mesh.world.size)
        self._n_dead = [int(n) for n in sums["dead"]]
        self._forms = {name: float(sums[name]) for name in forms}
        if bad := health.bad_terms(taken.terms):
            raise self._not_finite("loss", bad)
        totals = {name.removeprefix("gradient/"): n for name, n in sums.items() if name.startswith("gradient/")}
        if bad := health.bad_sums(totals):
            raise self._not_finite("gradient", bad)

    def _steer(self, taken: Taken) -> None:
        """The controller's move after a step."""
        state, target = self.state, self.objective.options.target_l0
        if state.steering is not None:
            assert target is not None
            state.steering = controller.steered(state.steering, taken.l0, target, state.step - 1, self.plan.n_steps)

    def _measured(self) -> dict[str, object]:
        """What this step's line says of held-out text, of the weights that the step made."""
        if self.held_out is None or not self.plan.measures(self.state.step):
            return {}
        found = self.held_out.measure(self.model, self.optimizer, self.state.step)
        return {PREFIX + name: value for name, value in found.items()}

    def _resample(self, taken: Taken) -> None:
        """Restart dead features, when it is time to."""
        done = self.state.step + 1
        if not self.plan.resamples(done):
            return
        generator = torch.Generator().manual_seed(derive(self.plan.seed, "resample", done))
        sizes = self.share.sizes(self.plan.part_tokens)
        x, error = (
            torch.cat([one for part in parts for one in self.ranks.mesh.data.gather_ragged(part, "resample", sizes)])
            for parts in zip(*taken.kept, strict=True)
        )
        restarted = resample(self.model, self.optimizer, x, error, self.dead(), generator, self.ranks)
        self.state.tokens_since_fired[restarted] = 0
        self._n_dead = None
        logger.info("step %d: %d dead features begin again", done, int(self.ranks.total(float(restarted.sum()))))

    def dead(self) -> Tensor:
        """Features that have not fired for `dead_window` tokens. [L, F] bool; none before that many were seen."""
        return self.state.tokens_since_fired >= self.plan.dead_window

    def _dead_of_all(self) -> list[int]:
        """Dead features of each source, those that other ranks hold too."""
        if not self.ranks.many:
            return self.objective.counted(self.dead())
        if self._n_dead is None:
            counts = self.dead().sum(dim=1)
            self._n_dead = self.ranks.mesh.features.sum(counts, "dead").tolist()
        return self._n_dead

    def _dead_fraction(self) -> float:
        if not self.ranks.many:
            return float(self.dead().float().mean())
        whole = self.ranks.whole
        n = torch.tensor(sum(self._dead_of_all()), dtype=torch.float32)  # rounded as the mean of one process is
        return float(n / (whole.n_sources * whole.d_features))

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite, and remove those that are not to be kept."""
        plan, step = self.plan, self.state.step
        if bad := health.bad_weights(self.model, self.optimizer):
            raise self._not_finite("weights or moments", bad)
        about = dict(self.about)
        # A stop by Ctrl-C adds no candidate: which one is best depends on the run alone.
        if plan.keep_best and self.held_out and plan.saves(step):
            about[checkpoint.SCORE] = fvu = self.held_out.measure(self.model, self.optimizer, step)["fvu"]
            assert fvu is not None, "targets that do not vary"
            logger.info("step %d: held-out FVU %.4f", step, fvu)
        self.state.more |= self.divergence.tensors()
        self.writer.save(self.model, self.optimizer, self.state, about, then=self._pruning())
        self.saved_step = step

    def _pruning(self) -> Callable[[], None]:
        """What removes the checkpoints that are not to be kept, as things stand now."""
        # While the loss is suspiciously high, the last good checkpoint stays.
        if self.divergence.above:
            return lambda: None
        return partial(checkpoint.prune, self.directory, self.plan.keep_checkpoints, self.plan.keep_best)

    def record(self, taken: Taken, rate: float) -> dict[str, object]:
        """A line of metrics.jsonl, of this step's batch. fvu: pooled, in the model's units, cache's variance."""
        tokens, terms = self.state.step * self.plan.batch_tokens, taken.terms
        return {
            "step": self.state.step,
            "tokens": tokens,
            "loss": float(torch.stack(list(terms.values())).sum()),
            **{f"loss/{name}": float(term) for name, term in terms.items()},
            **taken.fvu(float(self.plan.y_variance.sum())),
            "l0": taken.l0,
            "dead_fraction": self._dead_fraction() if tokens >= self.plan.dead_window else None,
            "lr": rate,
            **log_fields.in_force(self.objective, self.model.activation, self.state),
            **(self._forms if self.ranks.many else log_fields.forms(self.objective, self.model.activation)),
        }

    def _not_finite(self, what: str, bad: list[str]) -> UserError:
        self.writer.settle()
        return health.not_finite(what, bad, self.state.step, self.optim.lr, checkpoint.newest(self.directory))

    def _refuse_divergence(self, taken: Taken) -> None:
        if self.divergence.has(taken.reconstruction):
            self.writer.settle()
            last = checkpoint.newest(self.directory, self.state.step - self.divergence.above)
            raise self.divergence.refusal(taken.reconstruction, self.state.step, self.optim.lr, last)
