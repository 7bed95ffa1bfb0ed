"""The training loop: a batch, a step, the counters, a line in the log."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.activations import Choosing
from pipeline.core.density import Form
from pipeline.core.gates import Gate
from pipeline.data.loader import Batch
from pipeline.data.shuffle import derive
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.train import checkpoint, controller, health, micro
from pipeline.train import run as runs
from pipeline.train.checkpoint import State
from pipeline.train.clock import Clock
from pipeline.train.health import Divergence
from pipeline.train.held_out import PREFIX, HeldOut
from pipeline.train.inputs import Inputs
from pipeline.train.interrupt import stop_requests
from pipeline.train.memory import Peak
from pipeline.train.micro import Taken
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions, SparseStep
from pipeline.train.resample import resample
from pipeline.train.run_log import RunLog
from pipeline.train.schedule import learning_rate

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """The numbers of a run, resolved."""

    n_steps: int
    batch_tokens: int
    dead_window: int
    """Tokens without firing after which a feature is dead."""
    checkpoint_steps: int
    keep_checkpoints: int
    log_steps: int
    resample_steps: int
    """Steps between resamplings of dead features; 0 for none."""
    last_resample: int
    """No resampling after so many steps."""
    seed: int
    y_variance: Tensor
    """[L, D] variance of the targets over the cache, in the model's units."""
    accumulate: int = 1
    """Parts of a batch that go through the model one after the other."""
    keep_best: int = 0
    diverged: float | None = None
    """See `train/health.py`."""
    held_out_steps: int = 0
    """Steps between measures on held-out text; 0 for none."""

    @property
    def part_tokens(self) -> int:
        """Tokens that go through the model at once, and compete where tokens do."""
        return self.batch_tokens // self.accumulate


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
        never = torch.zeros(model.n_sources, model.d_features, dtype=torch.int64, device=inputs.device)
        self.state = State(0, never, controller.first(objective.options) if objective.controlled else None)
        self.divergence = Divergence(plan.diverged, objective.trivial)
        self.log = RunLog(directory)
        self.clock = Clock()
        self.memory: Peak | None = None
        self.last_record: dict[str, object] = {}
        self.saved_step: int | None = None
        self.about: dict[str, object] = {}
        self.held_out: HeldOut | None = None
        """What the best checkpoints are chosen by, and what metrics.jsonl says of held-out text."""

    def begin(self, path: Path | None) -> None:
        """Continue from a checkpoint, as if the run had never stopped; None: what was logged before one counts not."""
        if path is not None:
            self.state = checkpoint.load(path, self.model, self.optimizer)
            self.divergence.restore(self.state.more)
            self.saved_step = self.state.step
            self._prune()  # a process may have been killed between saving a checkpoint and this
        self.log.begin(path, self.state.step)

    def fit(self, batches: Iterator[Batch]) -> dict[str, object]:
        """`batches` begins at the batch that follows the state. Ctrl-C and SIGTERM save a checkpoint first."""
        size = self.plan.batch_tokens
        self.start()
        with stop_requests() as requested, Progress(self.plan.n_steps * size, "tok", "train", self.done_tokens) as bar:
            while not self.at_end:
                asked = time.perf_counter()
                batch = next(batches)
                bar.update(size, **self.advance(batch, time.perf_counter() - asked))
                if requested():
                    self.stop()
                    raise KeyboardInterrupt
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
        self.clock.step_begins(waited)
        rate = learning_rate(self.optim, state.step, plan.n_steps)
        taken = self.step(batch, rate)
        state.step += 1
        fields: dict[str, str | float] = {}
        if self._logs(state.step):
            self.last_record = self.record(taken, rate) | self._measured()
            times = self.clock.record(state.step, plan.batch_tokens)
            if self.inputs.recompute is not None:
                times["targets_ms"] = self.inputs.recompute.take_ms()
            if self.held_out is not None and (ms := self.held_out.take_ms()):
                times["held_out_ms"] = ms
            if self.memory is not None:
                times["memory_mb"] = round(self.memory.mb(), 1)
            self.log.add(self.last_record, times)
            fields = _bar_fields(self.last_record)
        self._steer(taken)
        self._refuse_divergence(taken)
        if self._saves(state.step):
            self.save()
        self.clock.step_ends()
        return fields

    def stop(self) -> None:
        """Save where the run stands, between two steps, and say how it goes on."""
        if self.saved_step != self.state.step:
            self.save()
        name = runs.name_of(self.directory)
        step, last = self.state.step, self.plan.n_steps
        logger.info("stopped at step %d of %d; clt train name=%s continues", step, last, name)

    def end(self) -> dict[str, object]:
        """After the last batch. -> the last line of the log, {} where no step was taken"""
        self.model.activation.at(1.0)
        return self.last_record

    def step(self, batch: Batch, rate: float) -> Taken:
        """One optimiser step, and the counters that follow from it."""
        state, plan = self.state, self.plan
        self.model.activation.at(state.step / plan.n_steps)
        dead = self.dead()
        self.optimizer.zero_grad(set_to_none=True)
        counts, scale = self.objective.controlled, self.inputs.scaling.y_scale
        taken = Taken(self.model, scale, counts, self._logs(state.step + 1), self._resamples(state.step + 1))
        whole = micro.whole(self.objective, self.model, self.inputs, batch, plan.accumulate, dead, state.step)
        for part in micro.parts(batch, plan.accumulate):
            x, y = self.inputs(part.resid_mid, part.mlp_out)
            out = self.objective.forward(self.model, x, state.step)
            terms = self.objective(self.model, out, x, y, dead, state.step, state.log_lambda, whole)
            stacked = torch.stack(list(terms.values()))
            if not math.isfinite(sum(taken.note(terms, stacked))):
                raise UserError(self._not_finite("loss", health.bad_terms(terms)))
            (stacked.sum() / plan.accumulate).backward()
            taken.add(out, x, y)
            del out, terms, stacked  # what they keep of this part is not to lie beside the next
        if bad := health.bad_gradients(self.model):
            raise UserError(self._not_finite("gradient", bad))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        state.tokens_since_fired += taken.n_tokens
        state.tokens_since_fired.masked_fill_(taken.fired, 0)
        self._resample(taken)
        return taken

    def _steer(self, taken: Taken) -> None:
        """The controller's move after a step."""
        state, target = self.state, self.objective.options.target_l0
        if state.steering is not None:
            assert target is not None
            state.steering = controller.steered(state.steering, taken.l0, target, state.step - 1, self.plan.n_steps)

    def _logs(self, done: int) -> bool:
        """Whether the step that makes it so many is logged."""
        return done % self.plan.log_steps == 0 or done == self.plan.n_steps or self._measures(done)

    def _measures(self, done: int) -> bool:
        every = self.plan.held_out_steps
        return every > 0 and (done % every == 0 or done == self.plan.n_steps)

    def _measured(self) -> dict[str, object]:
        """What this step's line says of held-out text, of the weights that the step made."""
        if self.held_out is None or not self._measures(self.state.step):
            return {}
        found = self.held_out.measure(self.model, self.optimizer, self.state.step)
        return {PREFIX + name: value for name, value in found.items()}

    def _saves(self, done: int) -> bool:
        """Whether the checkpoint after so many steps is one of the run's own."""
        return done % self.plan.checkpoint_steps == 0 or done == self.plan.n_steps

    def _resamples(self, done: int) -> bool:
        every = self.plan.resample_steps
        return every > 0 and done % every == 0 and done <= self.plan.last_resample

    def _resample(self, taken: Taken) -> None:
        """Restart dead features, when it is time to."""
        done = self.state.step + 1
        if not self._resamples(done):
            return
        generator = torch.Generator().manual_seed(derive(self.plan.seed, "resample", done))
        x, error = (torch.cat(tensors) for tensors in zip(*taken.kept, strict=True))
        restarted = resample(self.model, self.optimizer, x, error, self.dead(), generator)
        self.state.tokens_since_fired[restarted] = 0
        logger.info("step %d: %d dead features begin again", done, int(restarted.sum()))

    def dead(self) -> Tensor:
        """Features that have not fired for `dead_window` tokens. [L, F] bool; none before that many were seen."""
        return self.state.tokens_since_fired >= self.plan.dead_window

    def save(self) -> None:
        """Write a checkpoint, unless something in it is not finite, and remove those that are not to be kept."""
        plan, step = self.plan, self.state.step
        if bad := health.bad_weights(self.model, self.optimizer):
            raise UserError(self._not_finite("weights or moments", bad))
        about = dict(self.about)
        # A stop by Ctrl-C adds no candidate: which one is best depends on the run alone.
        if plan.keep_best and self.held_out and self._saves(step):
            about[checkpoint.SCORE] = fvu = self.held_out.measure(self.model, self.optimizer, step)["fvu"]
            assert fvu is not None, "targets that do not vary"
            logger.info("step %d: held-out FVU %.4f", step, fvu)
        self.state.more |= self.divergence.tensors()
        checkpoint.save(self.directory, self.model, self.optimizer, self.state, about)
        self.saved_step = step
        self._prune()

    def _prune(self) -> None:
        # While the loss is suspiciously high, the last good checkpoint stays.
        if not self.divergence.above:
            checkpoint.prune(self.directory, self.plan.keep_checkpoints, self.plan.keep_best)

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
            "dead_fraction": float(self.dead().float().mean()) if tokens >= self.plan.dead_window else None,
            "lr": rate,
            **self._in_force(),
        }

    def _in_force(self) -> dict[str, object]:
        """What changes over the run in the settings of this one: lambda of the sparsity penalty, an annealed k, the
        share of layers in sparse form."""
        changing: dict[str, object] = {}
        if self.objective.penalises:
            changing["lambda"] = self.objective.lambda_at(self.state.step - 1, self.state.log_lambda)
        steering = self.state.steering
        if steering is not None and not math.isnan(steering.log_aim):
            changing["l0_aim"] = math.exp(steering.log_aim)
        rule = self.model.activation
        if isinstance(rule, Choosing) and rule.k_start is not None:
            changing["k"] = sum(rule.k) / len(rule.k)
        if isinstance(rule, Gate) and self.objective.sparse != SparseStep.never:
            changing["sparse_layers"] = float((rule.form != Form.dense).double().mean())
            if rule.windowed:
                changing["dense_windows"] = float((rule.form == Form.dense_window).double().mean())
        return changing

    def _not_finite(self, what: str, bad: list[str]) -> str:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        last = checkpoint.newest(self.directory)
        return (
            f"the {what} ({', '.join(bad[:3])}{more}) is no longer finite at step {self.state.step}; lower "
            f"optim.lr={self.optim.lr} and train under another name (last good checkpoint: {last or 'none'})"
        )

    def _refuse_divergence(self, taken: Taken) -> None:
        loss, seen = taken.reconstruction, self.divergence
        if not seen.has(loss):
            return
        last = checkpoint.newest(self.directory, self.state.step - seen.above)
        raise UserError(
            f"the loss (reconstruction) has diverged at step {self.state.step}: {loss:.3g}, above that of predicting "
            f"means and for {seen.above} steps above {seen.limit:g} times its lowest, {seen.lowest:.3g}; lower "
            f"optim.lr={self.optim.lr} and train under another name (last good checkpoint: {last or 'none'}), or go on "
            "with train.diverged=null"
        )


def _bar_fields(record: dict[str, object]) -> dict[str, str | float]:
    dead, held_out = record["dead_fraction"], record.get(PREFIX + "fvu")
    return {
        "loss": f"{record['loss']:.3g}",
        "fvu": f"{record['fvu']:.4f}",
        **({} if held_out is None else {"held-out": f"{held_out:.4f}"}),
        "l0": f"{record['l0']:.1f}",
        "dead": "-" if dead is None else f"{dead:.3f}",
    }
