"""What a run measures on held-out text while it goes on: the cheap part of an evaluation."""

import time
from collections.abc import Callable

from torch import Tensor
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.dist.sharded import Ranks
from pipeline.errors import UserError
from pipeline.train import calibrate
from pipeline.train.inputs import Inputs
from pipeline.train.optimisers import averaged

PREFIX = "held_out/"
"""What the names of these numbers in metrics.jsonl begin with."""

TIMES = 10
"""Measures over a run, where nothing else is said."""

SHARE = 30
"""Rows that are trained on for each row that is measured, at least, where nothing else is said."""


def every(asked: str | None, n_steps: int, batch_tokens: int, rows: int, log_steps: int) -> int:
    """Steps between measures of `log.held_out_every`; 0 for none. auto: whole log lines. Raises UserError."""
    if asked is None:
        return 0
    if asked == "auto":
        steps = max(n_steps // TIMES, SHARE * rows // batch_tokens, 1)
        return -(-steps // log_steps) * log_steps
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"log.held_out_every={asked} must be a number of steps, at least 1, auto, or null for never")
    return int(asked)


class HeldOut:
    """The first `rows` rows of a held-out split, at least a batch of them, so that tokens compete as in training; read
    when they are first asked for, and kept as they are stored.

    read: from a number of rows to resid_mid, mlp_out [n, L, D]. batch: tokens that compete. seed: orders the rows.
    ranks: those that hold the features; all measure at the same steps.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Tensor, Tensor]],
        inputs: Inputs,
        rows: int,
        batch: int,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._read, self._inputs, self._n, self._batch, self._seed = read, inputs, max(rows, batch), batch, seed
        self._rows: tuple[Tensor, Tensor] | None = None
        self._last: tuple[int, dict[str, float | None]] = (-1, {})
        self._seconds = 0.0

    def measure(self, model: Transcoder, optimizer: Optimizer, step: int) -> dict[str, float | None]:
        """Of the weights after so many steps, the averaged ones where the optimiser has such, under the rule of
        training as it stands. {"fvu", "explained_variance", "l0", "dead_fraction", "n_tokens"}: the first two pooled,
        in the model's units, None where the rows do not vary; dead_fraction of features that never fired in n_tokens.

        Asked twice about a step it measures once. Weights and random generators stay as they are.
        """
        if self._last[0] == step:
            return self._last[1]
        start, was_training = time.monotonic(), model.training
        if self._rows is None:
            resid_mid, mlp_out = self._read(self._n)
            self._rows = resid_mid.clone(), mlp_out.clone()  # not the chunks that they are the beginning of
        resid_mid, mlp_out = self._rows
        order = calibrate.shuffled_batches(resid_mid.shape[0], self._batch, self._seed)
        with averaged(optimizer):
            batches = (self._inputs(resid_mid[rows], mlp_out[rows]) for rows in order)
            firing, error = calibrate.sums(model.eval(), batches, self._inputs.scaling.y_scale, self._ranks)
        model.train(was_training)
        found: dict[str, float | None] = {
            "fvu": error.fvu()["pooled"],
            "explained_variance": error.explained_variance()["pooled"],
            "l0": calibrate.l0(firing, self._ranks),
            "dead_fraction": calibrate.dead_fraction(firing, self._ranks),
            "n_tokens": firing.n,
        }
        self._last = step, found
        self._seconds += time.monotonic() - start
        return found

    def take_ms(self) -> float:
        """Milliseconds that measuring took since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return 1e3 * seconds
