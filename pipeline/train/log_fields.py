"""What metrics.jsonl and the progress bar say of a run beside its losses."""

import math

from pipeline.core.activations import Choosing
from pipeline.core.density import Form
from pipeline.core.gates import Gate
from pipeline.core.rule import Activation
from pipeline.train.checkpoint import State
from pipeline.train.held_out import PREFIX
from pipeline.train.objective import Objective
from pipeline.train.options import SparseStep


def in_force(objective: Objective, rule: Activation, state: State) -> dict[str, object]:
    """Settings that change over the run, as they were in its last step: lambda of the sparsity penalty, the L0 that it
    is steered to, an annealed k."""
    changing: dict[str, object] = {}
    if objective.penalises:
        changing["lambda"] = objective.lambda_at(state.step - 1, state.log_lambda)
    steering = state.steering
    if steering is not None and not math.isnan(steering.log_aim):
        changing["l0_aim"] = math.exp(steering.log_aim)
    if isinstance(rule, Choosing) and rule.k_start is not None:
        changing["k"] = sum(rule.k) / len(rule.k)
    return changing


def forms(objective: Objective, rule: Activation) -> dict[str, float]:
    """Shares of layers in sparse form and with a dense window, where there may be some."""
    if not isinstance(rule, Gate) or objective.sparse == SparseStep.never:
        return {}
    shares = {"sparse_layers": float((rule.form != Form.dense).double().mean())}
    if rule.windowed:
        shares["dense_windows"] = float((rule.form == Form.dense_window).double().mean())
    return shares


def on_bar(record: dict[str, object]) -> dict[str, str | float]:
    """What the progress bar shows of a line of metrics.jsonl."""
    dead, held_out = record["dead_fraction"], record.get(PREFIX + "fvu")
    return {
        "loss": f"{record['loss']:.3g}",
        "fvu": f"{record['fvu']:.4f}",
        **({} if held_out is None else {"held-out": f"{held_out:.4f}"}),
        "l0": f"{record['l0']:.1f}",
        "dead": "-" if dead is None else f"{dead:.3f}",
    }
