"""The controller on plants that answer like features do, and on planted data."""

import math
from collections.abc import Callable

import pytest
import torch

from pipeline.arch import table
from pipeline.arch.base import Dims, Output
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.options import ActivationOptions, LossOptions, SparsityForm, ThetaGrad
from pipeline.train import controller
from pipeline.train.loop import active
from pipeline.train.objective import Objective

Plant = Callable[[float], float]
"""log lambda -> L0 of the next step."""


def plant(slope: float, lag: float, seed: int = 0) -> Plant:
    """log L0 follows 4 - slope (log lambda - 1), `lag` steps behind, measured with noise of a few percent."""
    state, generator = math.log(400.0), torch.Generator().manual_seed(seed)

    def answer(log_lambda: float) -> float:
        nonlocal state
        state += (4 - slope * (log_lambda - 1) - state) / lag
        return math.exp(state + 0.03 * float(torch.randn((), generator=generator)))

    return answer


def steer(answer: Plant, target: float, n_steps: int, start: float) -> tuple[list[float], list[float]]:
    """(log lambda, L0) of each step."""
    log_lambda = start
    lambdas, l0s = [], []
    for step in range(n_steps):
        lambdas.append(log_lambda)
        l0s.append(answer(log_lambda))
        log_lambda = controller.steered(log_lambda, l0s[-1], target, step, n_steps)
    return lambdas, l0s


@pytest.mark.parametrize("n_steps", [300, 3000])
@pytest.mark.parametrize("start", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("target", [5.0, 60.0, 150.0])
def test_l0_lands_at_the_target_from_wherever_lambda_starts(target: float, start: float, n_steps: int) -> None:
    _, l0s = steer(plant(slope=0.5, lag=5.0), target, n_steps, math.log(start))
    tail = l0s[-n_steps // 10 :]
    assert sum(tail) / len(tail) == pytest.approx(target, rel=0.05)


def test_lambda_is_frozen_for_the_last_tenth_of_the_run() -> None:
    lambdas, _ = steer(plant(slope=0.5, lag=5.0), 60.0, 100, 0.0)
    assert len(set(lambdas[90:])) == 1
    assert lambdas[89] != lambdas[90]


def test_lambda_stays_in_its_bounds_and_leaves_them_at_the_first_error_of_the_other_sign() -> None:
    log_lambda = 0.0
    for _ in range(1000):
        log_lambda = controller.steered(log_lambda, 1e4, 10.0, 0, 100)
    assert log_lambda == controller.HIGHEST
    assert controller.steered(log_lambda, 9.0, 10.0, 0, 100) < controller.HIGHEST
    for _ in range(1000):
        log_lambda = controller.steered(log_lambda, 0.0, 10.0, 0, 100)
    assert log_lambda == controller.LOWEST
    assert controller.steered(log_lambda, 11.0, 10.0, 0, 100) > controller.LOWEST


def test_a_step_is_the_gain_times_the_clipped_log_error_by_hand() -> None:
    gain = controller.TRAVEL / 1000
    assert controller.steered(0.5, 20.0, 10.0, 7, 1000) == pytest.approx(0.5 + gain * math.log(2))
    assert controller.steered(0.5, 5.0, 10.0, 7, 1000) == pytest.approx(0.5 - gain * math.log(2))
    assert controller.steered(0.5, 1e6, 10.0, 7, 1000) == pytest.approx(0.5 + gain)
    assert controller.steered(0.5, 0.0, 10.0, 7, 1000) == pytest.approx(0.5 - gain)
    assert controller.steered(0.5, 20.0, 10.0, 0, 10) == pytest.approx(0.5 + controller.FASTEST * math.log(2))


def test_the_controller_begins_at_the_coefficient_or_at_a_small_one() -> None:
    assert controller.first(LossOptions("tanh", sparsity=0.3, target_l0=8.0)) == pytest.approx(math.log(0.3))
    assert controller.first(LossOptions("tanh", target_l0=8.0)) == pytest.approx(math.log(controller.START))


@pytest.mark.slow
@pytest.mark.parametrize("form", list(SparsityForm))
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
@pytest.mark.parametrize("target", [4.0, 8.0, 16.0])
def test_training_on_planted_features_lands_at_the_target_on_fresh_data(
    activation: str, target: float, form: SparsityForm
) -> None:
    """Inputs are sparse sums of 40 directions a layer, outputs the same sums of others; judged on data unseen."""
    torch.manual_seed(0)
    n_layers, d_model, n_planted, n_steps, batch = 2, 20, 40, 1500, 256
    reads, writes = torch.randn(2, n_layers, n_planted, d_model) / d_model**0.5

    def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        on = (torch.rand(n, n_layers, n_planted) < 0.1) * (1 + torch.rand(n, n_layers, n_planted))
        return torch.einsum("blf,lfd->bld", on, reads), torch.einsum("blf,lfd->bld", on, writes)

    jump = {"threshold": 0.03, "bandwidth": 1.0, "theta_grad": ThetaGrad.anthropic} if activation == "jumprelu" else {}
    rule = activations.build(ActivationOptions(activation, **jump), n_layers, 64)
    model = table.build(ArchOptions("clt", d_features=64), Dims(n_layers, d_model), rule)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    options = LossOptions("x", target_l0=target, sparsity_form=form)
    objective = Objective(options, model, 1.0, n_steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    log_lambda, none = controller.first(options), torch.zeros(n_layers, 64, dtype=torch.bool)
    for step in range(n_steps):
        x, y = data(batch)
        out: Output = model(x)
        loss = torch.stack(list(objective(model, out, x, y, none, step, log_lambda).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (n_steps - step) / (0.3 * n_steps))
        optimizer.step()
        log_lambda = controller.steered(log_lambda, active(out) / batch, target, step, n_steps)
    x, y = data(8192)
    with torch.no_grad():
        out = model(x)
    assert active(out) / x.shape[0] == pytest.approx(target, rel=0.05)
    assert float((out.y_hat - y).square().sum() / (y - y.mean(dim=0)).square().sum()) < 0.9
