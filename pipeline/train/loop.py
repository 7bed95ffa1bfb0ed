"""The training loop: a batch, a step, the counters, a line in the log."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.arch.base import Output, Transcoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.core.activations import Choosing
from pipeline.core.density import Form
from pipeline.core.gates import Gate
from pipeline.core.sparse import Chosen, Pattern, of_layer
from pipeline.data.loader import Batch
from pipeline.data.shuffle import derive
from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.progress import Progress
from pipeline.train import checkpoint, controller
from pipeline.train.checkpoint import State
from pipeline.train.inputs import Inputs
from pipeline.train.interrupt import stop_requests
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions, SparseStep
from pipeline.train.resample import resample
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
        self.about: dict[str, object] = {}

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint: as if the run had never stopped."""
        self.state = checkpoint.load(path, self.model, self.optimizer)
        _keep_lines(self.directory / "metrics.jsonl", self.state.step)

    def fit(self, batches: Iterator[Batch]) -> dict[str, object]:
        """`batches` begins at the batch that follows the state. Ctrl-C saves a checkpoint first."""
        plan, state = self.plan, self.state
        record: dict[str, object] = {}
        total = plan.n_steps * plan.batch_tokens
        clock = _Clock()
        self.model.train()
        with stop_requests() as requested, Progress(total, "tok", "train", state.step * plan.batch_tokens) as bar:
            while state.step < plan.n_steps:
                clock.data_asked()
                batch = next(batches)
                clock.data_arrived()
                rate = learning_rate(self.optim, state.step, plan.n_steps)
                out, y, terms = self.step(batch, rate)
                state.step += 1
                fields: dict[str, str | float] = {}
                if state.step % plan.log_steps == 0 or state.step == plan.n_steps:
                    record = self.record(out, y, terms, rate)
                    _append(self.directory / "metrics.jsonl", record)
                    times = clock.record(state.step, plan.batch_tokens)
                    if self.inputs.recompute is not None:
                        times["targets_ms"] = self.inputs.recompute.take_ms()
                    _append(self.directory / "timings.jsonl", times)
                    fields = _bar_fields(record)
                self._steer(out)
                bar.update(plan.batch_tokens, **fields)
                if state.step % plan.checkpoint_steps == 0 or state.step == plan.n_steps or requested():
                    self.save()
                if requested():
                    logger.info("stopped at step %d of %d; the same command continues", state.step, plan.n_steps)
                    raise KeyboardInterrupt
        self.model.activation.at(1.0)
        return record

    def step(self, batch: Batch, rate: float) -> tuple[Output, Tensor, dict[str, Tensor]]:
        """One optimiser step, and the counters that follow from it."""
        x, y = self.inputs(batch.resid_mid, batch.mlp_out)
        state = self.state
        self.model.activation.at(state.step / self.plan.n_steps)
        out = self.objective.forward(self.model, x, state.step)
        terms = self.objective(self.model, out, x, y, self.dead(), state.step, state.log_lambda)
        loss = torch.stack(list(terms.values())).sum()
        terms = {name: term.detach() for name, term in terms.items()}
        if not math.isfinite(loss.item()):
            raise UserError(self._diverged(terms))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        state.tokens_since_fired += y.shape[0]
        state.tokens_since_fired[fired(out)] = 0
        self._resample(out, x, y)
        return out, y, terms

    def _steer(self, out: Output) -> None:
        """The controller's move after a step."""
        state, target = self.state, self.objective.options.target_l0
        if state.log_lambda is not None:
            assert target is not None
            l0 = active(out) / out.y_hat.shape[0]
            state.log_lambda = controller.steered(state.log_lambda, l0, target, state.step - 1, self.plan.n_steps)

    def _resample(self, out: Output, x: Tensor, y: Tensor) -> None:
        """Restart dead features, when it is time to."""
        plan, done = self.plan, self.state.step + 1
        if not plan.resample_steps or done % plan.resample_steps or done > plan.last_resample:
            return
        generator = torch.Generator().manual_seed(derive(plan.seed, "resample", done))
        error = (y - out.y_hat).detach()
        restarted = resample(self.model, self.optimizer, x, error, self.dead(), generator)
        self.state.tokens_since_fired[restarted] = 0
        logger.info("step %d: %d dead features begin again", done, int(restarted.sum()))

    def dead(self) -> Tensor:
        """Features that have not fired for `dead_window` tokens. [L, F] bool; none before that many were seen."""
        return self.state.tokens_since_fired >= self.plan.dead_window

    def save(self) -> None:
        checkpoint.save(self.directory, self.model, self.optimizer, self.state, self.about)
        checkpoint.prune(self.directory, self.plan.keep_checkpoints)

    @torch.no_grad()
    def record(self, out: Output, y: Tensor, terms: dict[str, Tensor], rate: float) -> dict[str, object]:
        """A line of metrics.jsonl, of this step's batch. fvu: pooled, in the model's units, cache's variance."""
        tokens = self.state.step * self.plan.batch_tokens
        return {
            "step": self.state.step,
            "tokens": tokens,
            "loss": float(torch.stack(list(terms.values())).sum()),
            **{f"loss/{name}": float(term) for name, term in terms.items()},
            "fvu": self._fvu(out.y_hat, y),
            **self._prefix_fvu(out, y),
            "l0": active(out) / y.shape[0],
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
        rule = self.model.activation
        if isinstance(rule, Choosing) and rule.k_start is not None:
            changing["k"] = sum(rule.k) / len(rule.k)
        if isinstance(rule, Gate) and self.objective.sparse != SparseStep.never:
            changing["sparse_layers"] = float((rule.form != Form.dense).double().mean())
            if rule.windowed:
                changing["dense_windows"] = float((rule.form == Form.dense_window).double().mean())
        return changing

    def _fvu(self, y_hat: Tensor, y: Tensor) -> float:
        error = ((y_hat - y) * self.inputs.scaling.y_scale).square().sum() / y.shape[0]
        return float(error) / float(self.plan.y_variance.sum())

    def _prefix_fvu(self, out: Output, y: Tensor) -> dict[str, float]:
        """The FVU of each shorter prefix, of the same sizes in every line of the log."""
        if not isinstance(self.model, Matryoshka):
            return {}
        *sizes, _ = self.model.usual_sizes()
        parts = self.model.nested(out.features, sizes)
        return {f"fvu/prefix_{size}": self._fvu(part, y) for size, part in zip(sizes, parts, strict=True)}

    def _diverged(self, terms: dict[str, Tensor]) -> str:
        bad = ", ".join(name for name, term in terms.items() if not math.isfinite(float(term)))
        last = checkpoint.newest(self.directory)
        return (
            f"the loss ({bad}) is no longer finite at step {self.state.step}; lower optim.lr={self.optim.lr}"
            f" and train under another name (last good checkpoint: {last or 'none'})"
        )


def fired(out: Output) -> Tensor:
    """Which features fired at all in the batch. [L, F] bool"""
    if isinstance(out.features, Tensor):
        return (out.features > 0).any(dim=0)
    layers = [of_layer(out.features, layer) for layer in range(len(out.features.values))]
    return torch.stack([_fired(*one) if isinstance(one, Chosen) else (one > 0).any(dim=0) for one in layers])


def _fired(pattern: Pattern, values: Tensor) -> Tensor:
    none = torch.zeros(pattern.n_features, dtype=torch.bool, device=values.device)
    return none.index_fill(0, pattern.indices[values > 0], True)


def active(out: Output) -> int:
    """Number of active (token, feature) pairs over all layers."""
    layers = [out.features] if isinstance(out.features, Tensor) else out.features.values
    return sum(int((values > 0).sum()) for values in layers)


class _Clock:
    """Where the time between two log lines went."""

    def __init__(self) -> None:
        self.start = self.asked = time.perf_counter()
        self.waited, self.steps = 0.0, 0

    def data_asked(self) -> None:
        self.asked = time.perf_counter()

    def data_arrived(self) -> None:
        self.waited += time.perf_counter() - self.asked
        self.steps += 1

    def record(self, step: int, batch_tokens: int) -> dict[str, object]:
        now = time.perf_counter()
        elapsed = now - self.start
        line: dict[str, object] = {
            "step": step,
            "tokens_per_s": self.steps * batch_tokens / elapsed,
            "step_ms": 1e3 * elapsed / self.steps,
            "data_ms": 1e3 * self.waited / self.steps,
        }
        self.start, self.waited, self.steps = now, 0.0, 0
        return line


def _append(path: Path, line: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _keep_lines(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps are taken again. A line cut short by a crash goes too."""
    if path.exists():
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_aside(path, "".join(line for line in whole if json.loads(line)["step"] <= step).encode())


def _bar_fields(record: dict[str, object]) -> dict[str, str | float]:
    dead = record["dead_fraction"]
    return {
        "loss": f"{record['loss']:.3g}",
        "fvu": f"{record['fvu']:.4f}",
        "l0": f"{record['l0']:.1f}",
        "dead": "-" if dead is None else f"{dead:.3f}",
    }
