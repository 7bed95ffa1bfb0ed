"""Whether a run is worth going on with: what is not finite, and what has diverged.

A loss that is not finite stops the run before its gradients are computed, a gradient before it reaches the weights, and
weights or moments before they reach a checkpoint. A run has diverged when its reconstruction loss has been worse than
predicting the means, and above `train.diverged` times its lowest so far, for STEPS steps in a row. The other terms rise
by their schedules, and a falling k raises the error too: neither passes the loss of the means.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.errors import UserError
from pipeline.train.optimisers import optimizer_tensors

STEPS = 100


class Divergence:
    """Follows the reconstruction loss. `limit` None: nothing diverges. `trivial`: the loss of predicting the means."""

    def __init__(self, limit: float | None, trivial: float) -> None:
        self.limit, self.trivial = limit, trivial
        self.lowest, self.above = math.inf, 0

    def has(self, loss: float) -> bool:
        """Whether the run has diverged with the step of this loss."""
        if self.limit is None:
            return False
        self.lowest = min(self.lowest, loss)
        self.above = self.above + 1 if loss > max(self.limit * self.lowest, self.trivial) else 0
        return self.above >= STEPS

    def refusal(self, loss: float, step: int, rate: float, last: Path | None) -> UserError:
        """Of a run that has. rate: its `optim.lr`; last: the checkpoint before the loss rose."""
        return UserError(
            f"the loss (reconstruction) has diverged at step {step}: {loss:.3g}, above that of predicting means and "
            f"for {self.above} steps above {self.limit:g} times its lowest, {self.lowest:.3g}; lower optim.lr={rate} "
            f"and train under another name (last good checkpoint: {last or 'none'}), or go on with train.diverged=null"
        )

    def tensors(self) -> dict[str, Tensor]:
        """For `State.more`."""
        return {"divergence": torch.tensor([self.lowest, self.above], dtype=torch.float64)}

    def restore(self, more: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; a checkpoint of an older version has none, and the counting begins with it."""
        if "divergence" in more:
            lowest, above = more["divergence"].tolist()
            self.lowest, self.above = lowest, int(above)


def not_finite(what: str, bad: list[str], step: int, rate: float, last: Path | None) -> UserError:
    """For what is not. bad: its names; rate: `optim.lr`; last: the newest checkpoint."""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return UserError(
        f"the {what} ({', '.join(bad[:3])}{more}) is no longer finite at step {step}; lower optim.lr={rate} and train "
        f"under another name (last good checkpoint: {last or 'none'})"
    )


def bad_terms(terms: dict[str, Tensor]) -> list[str]:
    """The terms of a loss that are not finite."""
    return [name for name, term in terms.items() if not math.isfinite(float(term.detach()))]


def bad_gradients(model: Transcoder) -> list[str]:
    """Where a gradient is not finite, seen from the small parameters (biases, thresholds): what is wrong with a feature
    or an output is wrong with its bias, and to read the gradients of all weights would cost as much as using them."""
    sums = gradient_sums(model)
    if not sums or math.isfinite(float(torch.stack(list(sums.values())).sum())):
        return []
    return bad_sums(sums)


@torch.no_grad()
def gradient_sums(model: Transcoder) -> dict[str, Tensor]:
    """{small parameter: []}: the sum of its gradient, 0 where it has none."""
    small = {"b_enc": model.b_enc, "b_dec": model.b_dec, **dict(model.activation.named_parameters())}
    none = model.b_enc.new_zeros(())
    return {name: none if parameter.grad is None else parameter.grad.sum() for name, parameter in small.items()}


def bad_sums(sums: dict[str, Tensor]) -> list[str]:
    """What to call those of `gradient_sums` that are not finite."""
    return [f"gradient of {name}" for name, total in sums.items() if not math.isfinite(float(total))]


@torch.no_grad()
def bad_weights(model: Transcoder, optimizer: torch.optim.Optimizer) -> list[str]:
    """Weights and moments that are not finite. Reads all of them, so it is for checkpoints."""
    tensors = {**dict(model.named_parameters()), **optimizer_tensors(model, optimizer)}
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return [name for name, tensor in floats.items() if not math.isfinite(float(tensor.sum()))]
