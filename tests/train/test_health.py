"""What is not finite stops a run before it spreads; what diverges is seen, and ordinary runs are left alone."""

import math

import pytest
import torch

from pipeline.core.options import LossOptions
from pipeline.train import health, optim
from pipeline.train.health import STEPS, Divergence
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions
from tests import oracle

B, L, D = 5, 3, 6


def steps_until(losses: list[float], limit: float | None = 10.0, trivial: float = 1.0) -> int | None:
    """The step at which it stops, from 1."""
    seen = Divergence(limit, trivial)
    return next((step for step, loss in enumerate(losses, start=1) if seen.has(loss)), None)


def test_a_loss_far_above_its_lowest_and_above_the_means_for_long_has_diverged() -> None:
    assert steps_until([0.5] + [5.5] * 300) == 1 + STEPS
    assert steps_until([0.5] + [4.5] * 300) is None, "not ten times its lowest"
    assert steps_until([0.01] + [0.9] * 300) is None, "better than predicting the means, as when k falls"
    assert steps_until([5.0] * 300) is None, "how it began"


def test_a_step_below_begins_the_count_again() -> None:
    spike = [5.5] * (STEPS - 1)
    assert steps_until([0.5, *spike, 0.6, *spike]) is None
    assert steps_until([0.5, *spike, 0.6, *spike, 5.5]) == 2 * STEPS + 1


def test_nothing_diverges_without_a_limit() -> None:
    assert steps_until([1e-9] + [1e9] * 300, limit=None) is None


@pytest.mark.parametrize("done", [0, 1, 60, 100])
def test_what_was_seen_survives_a_stop(done: int) -> None:
    losses = [1 / 3] + [5.5] * 300
    first, second = Divergence(10.0, 1.0), Divergence(10.0, 1.0)
    assert not any(map(first.has, losses[:done]))
    second.restore(first.tensors())
    assert next(step for step in range(done, 300) if second.has(losses[step])) == STEPS
    assert second.lowest == 1 / 3


def test_an_older_checkpoint_has_seen_nothing() -> None:
    seen = Divergence(10.0, 1.0)
    seen.restore({})
    assert seen.lowest == math.inf


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named(activation: str, bad: float) -> None:
    model = oracle.transcoder("clt", activation, seed=0).train()
    x = oracle.normal(B, L, D, seed=1, dtype=model.b_enc.dtype)
    objective = Objective(LossOptions("mse"), model, 1.0, 8)
    dead = torch.zeros(L, model.d_features, dtype=torch.bool)

    def gradients(scale: float) -> list[str]:
        model.zero_grad()
        out = objective.forward(model, x, 0)
        terms = objective(model, out, x, x, dead, 0)
        (terms["reconstruction"] * scale).backward()
        return health.bad_gradients(model)

    assert gradients(1.0) == []
    assert "gradient of b_dec" in gradients(bad)


def test_weights_and_moments_that_are_not_finite_are_named() -> None:
    model = oracle.transcoder("clt", "topk", seed=0)
    adam = optim.build(model.parameters(), OptimOptions("adam"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert health.bad_weights(model, adam) == []
    adam.state[model.b_enc]["exp_avg_sq"][1, 2] = math.inf
    assert health.bad_weights(model, adam) == ["exp_avg_sq/b_enc"]
    with torch.no_grad():
        model.encoders[2][1, 0] = math.nan
    assert health.bad_weights(model, adam) == ["encoders.2", "exp_avg_sq/b_enc"]
