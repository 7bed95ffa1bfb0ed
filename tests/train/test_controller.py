"""The controller on plants that answer like features do, and on planted data."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pipeline.arch import table
from pipeline.arch.base import Dims, Output
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.options import ActivationOptions, LossOptions, SparsityForm, ThetaGrad
from pipeline.train import controller
from pipeline.train.controller import Steering
from pipeline.train.micro import active
from pipeline.train.objective import Objective

Plant = Callable[[float, int, int], float]
"""log lambda, step, steps of the run -> L0 of the step's batch."""

Control = Callable[[float, int, int], float]
"""L0 of a step, the step, steps of the run -> log lambda of the next step."""


def quick(slope: float, lag: float, seed: int = 0) -> Plant:
    """log L0 follows 4 - slope (log lambda - 1), `lag` steps behind, measured with noise of a few percent."""
    state, generator = math.log(400.0), torch.Generator().manual_seed(seed)

    def answer(log_lambda: float, step: int, n_steps: int) -> float:
        nonlocal state
        state += (4 - slope * (log_lambda - 1) - state) / lag
        return math.exp(state + 0.03 * float(torch.randn((), generator=generator)))

    return answer


def features(rate: float, seed: int = 0) -> Plant:
    """As seen on the built-in world: log L0 moves by `rate` a step for each unit that log lambda is off the one that
    would hold it. That one falls by e^1.5 over the run, as the reconstruction error does. Features come back three
    times as slowly as they go, L0 falls by itself at first, and all of it goes with the learning rate."""
    state, generator = math.log(500.0), torch.Generator().manual_seed(seed)

    def answer(log_lambda: float, step: int, n_steps: int) -> float:
        nonlocal state
        lr = min(1.0, (step + 1) / (0.02 * n_steps), (n_steps - step) / (0.3 * n_steps))
        holding = (math.log(300.0) - state) / 0.6 + math.log(0.12) - 1.5 * step / n_steps
        move = -rate * min(max(log_lambda - holding, -1.5), 6.0)
        state += lr * ((move / 3 if move > 0 else move) - 0.04 * math.exp(-step / 12))
        return math.exp(state + 0.015 * float(torch.randn((), generator=generator)))

    return answer


def controlled(target: float, sparsity: float = 0.0) -> tuple[float, Control]:
    """The controller: log lambda to begin with, and its answers."""
    now = controller.first(LossOptions("x", sparsity=sparsity, target_l0=target))

    def answer(l0: float, step: int, n_steps: int) -> float:
        nonlocal now
        now = controller.steered(now, l0, target, step, n_steps)
        return now.log_lambda

    return now.log_lambda, answer


def integral_alone(target: float, start: float) -> tuple[float, Control]:
    """What a plain integral with the target as its reference does."""
    log_lambda = math.log(start)

    def answer(l0: float, step: int, n_steps: int) -> float:
        nonlocal log_lambda
        if step < 0.9 * n_steps:
            log_lambda += min(0.1, 30 / n_steps) * min(max(math.log(l0 / target), -1.0), 1.0)
        return log_lambda

    return log_lambda, answer


def steer(plant: Plant, control: tuple[float, Control], n_steps: int) -> tuple[list[float], list[float]]:
    """(log lambda, L0) of each step."""
    log_lambda, answer = control
    lambdas, l0s = [], []
    for step in range(n_steps):
        lambdas.append(log_lambda)
        l0s.append(plant(log_lambda, step, n_steps))
        log_lambda = answer(l0s[-1], step, n_steps)
    return lambdas, l0s


def landed(l0s: list[float]) -> float:
    """Mean L0 of the last tenth."""
    tail = l0s[-len(l0s) // 10 :]
    return sum(tail) / len(tail)


def after(steps: int, l0: float, target: float, n_steps: int) -> Steering:
    """State after so many steps at one L0."""
    now = controller.first(LossOptions("x", target_l0=target))
    for step in range(steps):
        now = controller.steered(now, l0, target, step, n_steps)
    return now


@pytest.mark.parametrize(("n_steps", "rate"), [(300, 0.006), (300, 0.06), (3000, 0.001), (3000, 0.006), (3000, 0.06)])
@pytest.mark.parametrize("target", [20.0, 60.0, 150.0])
def test_l0_lands_at_the_target_where_features_move_slowly(target: float, n_steps: int, rate: float) -> None:
    _, l0s = steer(features(rate), controlled(target), n_steps)
    assert landed(l0s) == pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("start", [1e-3, 0.05])
def test_an_integral_alone_misses_all_three_targets_there(start: float) -> None:
    """So that the plant is one on which the controller's other parts are needed."""
    for target in (20.0, 60.0, 150.0):
        _, l0s = steer(features(0.006), integral_alone(target, start), 300)
        assert landed(l0s) != pytest.approx(target, rel=0.05)


@pytest.mark.parametrize("target", [20.0, 60.0])
def test_l0_is_led_down_and_never_goes_far_below_its_target(target: float) -> None:
    _, l0s = steer(features(0.006), controlled(target), 300)
    assert l0s[75] > 1.3 * target
    assert min(l0s) > 0.85 * target
    _, l0s = steer(features(0.006), integral_alone(target, 0.05), 300)
    assert min(l0s) < 0.75 * target


@pytest.mark.parametrize("n_steps", [300, 3000])
@pytest.mark.parametrize("sparsity", [5e-5, 0.05, 50.0])
@pytest.mark.parametrize("target", [5.0, 60.0, 150.0])
def test_l0_lands_at_the_target_from_wherever_lambda_starts(target: float, sparsity: float, n_steps: int) -> None:
    _, l0s = steer(quick(slope=0.5, lag=20.0), controlled(target, sparsity), n_steps)
    assert landed(l0s) == pytest.approx(target, rel=0.05)


def test_lambda_holds_still_but_for_the_noise_once_l0_is_there() -> None:
    lambdas, _ = steer(features(0.006), controlled(60.0), 3000)
    tail = lambdas[2700:]
    assert max(tail) - min(tail) < 1.5


def test_lambda_stays_in_its_bounds_and_leaves_them_at_the_first_error_of_the_other_sign() -> None:
    high = after(1000, 1e4, 10.0, 100)
    assert high.log_lambda == high.integral == controller.HIGHEST
    assert controller.steered(high, 0.1, 10.0, 999, 100).integral == controller.HIGHEST, "still above, on the mean"
    assert controller.steered(replace(high, log_l0=math.log(9.0)), 9.0, 10.0, 999, 100).integral < controller.HIGHEST
    low = after(1000, 0.0, 10.0, 100)
    assert low.log_lambda == low.integral == controller.LOWEST
    assert controller.steered(replace(low, log_l0=math.log(11.0)), 11.0, 10.0, 999, 100).integral > controller.LOWEST


def test_a_step_after_the_ramp_by_hand() -> None:
    now = Steering(0.9, 0.5, math.log(30.0), math.log(10.0))
    log_l0 = math.log(30.0) + math.log(15.0 / 30.0) / 3
    after = controller.steered(now, 15.0, 10.0, 700, 1000)
    assert after.log_l0 == pytest.approx(log_l0)
    assert after.log_aim == math.log(10.0)
    assert after.integral == pytest.approx(0.5 + 0.2 * (log_l0 - math.log(10.0)))
    assert after.log_lambda == pytest.approx(after.integral + 4.0), "the swing's limit"
    slight = controller.steered(replace(now, log_l0=math.log(10.5)), 10.5, 10.0, 700, 1000)
    assert slight.log_lambda == pytest.approx(slight.integral + 20 * math.log(1.05))
    assert controller.steered(replace(now, log_l0=9.0), math.exp(9.0), 10.0, 700, 1000).integral == pytest.approx(0.7)
    assert controller.steered(replace(now, log_l0=9.0), math.exp(9.0), 10.0, 70, 100).integral == pytest.approx(0.8)


def test_the_aim_falls_log_linearly_to_the_target_over_the_first_half() -> None:
    aims = [after(steps, 160.0, 10.0, 8).log_aim for steps in range(1, 9)]
    expected = [80.0, 40.0, 20.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    assert aims == pytest.approx([math.log(aim) for aim in expected])


def test_the_aim_follows_l0_down_but_never_up_and_never_asks_for_less_than_the_target() -> None:
    now = Steering(0.0, 0.0, math.log(80.0), math.log(160.0))
    fallen = controller.steered(now, 80.0, 10.0, 0, 8)
    assert fallen.log_aim == pytest.approx(math.log(10.0) + 0.75 * math.log(8.0))
    risen = controller.steered(replace(now, log_l0=math.log(640.0)), 640.0, 10.0, 0, 8)
    assert risen.log_aim == pytest.approx(math.log(10.0) + 0.75 * math.log(16.0))
    assert controller.steered(replace(now, log_l0=math.log(5.0)), 5.0, 10.0, 0, 8).log_aim == math.log(10.0)


def test_lambda_begins_far_below_the_coefficient() -> None:
    begun = controller.first(LossOptions("tanh", sparsity=0.3, target_l0=8.0))
    assert begun.log_lambda == begun.integral == pytest.approx(math.log(0.3 / 50))
    assert controller.first(LossOptions("tanh", target_l0=8.0)).log_lambda == pytest.approx(math.log(1e-3))


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
    now, none = controller.first(options), torch.zeros(n_layers, 64, dtype=torch.bool)
    for step in range(n_steps):
        x, y = data(batch)
        out: Output = model(x)
        loss = torch.stack(list(objective(model, out, x, y, none, step, now.log_lambda).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (n_steps - step) / (0.3 * n_steps))
        optimizer.step()
        now = controller.steered(now, active(out) / batch, target, step, n_steps)
    x, y = data(8192)
    with torch.no_grad():
        out = model(x)
    assert active(out) / x.shape[0] == pytest.approx(target, rel=0.05)
    assert float((out.y_hat - y).square().sum() / (y - y.mean(dim=0)).square().sum()) < 0.9
