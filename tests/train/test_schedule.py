"""Learning rate and coefficients at the corners of a run, and the optimiser by name."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.core.options import Ramp, Shape
from pipeline.errors import UserError
from pipeline.train import optim
from pipeline.train.options import LrSchedule, OptimOptions
from pipeline.train.schedule import check, coefficient, learning_rate

OPTIONS = OptimOptions("adam", lr=2.0, warmup=0.1, decay=0.25)
N = 40
"""Steps: 4 of warm-up, 10 of decay."""


def rates(options: OptimOptions, n_steps: int = N) -> list[float]:
    return [learning_rate(options, step, n_steps) for step in range(n_steps)]


def test_the_rate_rises_holds_and_falls_linearly_by_hand() -> None:
    got = rates(OPTIONS)
    assert got[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert got[4:31] == pytest.approx([2.0] * 27)
    # Step 30 is the first of the last quarter; the last step still moves, what would come after it does not.
    assert got[30:] == pytest.approx([2 * left / 10 for left in range(10, 0, -1)])
    assert learning_rate(OPTIONS, N, N) == 0


def test_the_cosine_fall_starts_flat_and_ends_flat() -> None:
    got = rates(replace(OPTIONS, schedule=LrSchedule.cosine))
    assert got[:31] == pytest.approx(rates(OPTIONS)[:31])
    assert got[30:] == pytest.approx([1 - math.cos(math.pi * left / 10) for left in range(10, 0, -1)])
    assert got[35] == pytest.approx(1.0)


def test_a_constant_rate_only_rises() -> None:
    assert rates(replace(OPTIONS, schedule=LrSchedule.constant))[3:] == [2.0] * (N - 3)


@pytest.mark.parametrize("schedule", list(LrSchedule))
def test_without_warmup_and_decay_the_rate_is_the_peak_from_the_first_step(schedule: LrSchedule) -> None:
    assert rates(replace(OPTIONS, warmup=0.0, decay=0.0, schedule=schedule)) == [2.0] * N


def test_warmup_and_decay_over_the_whole_run_multiply() -> None:
    got = rates(replace(OPTIONS, warmup=1.0, decay=1.0))
    assert got == pytest.approx([2 * (step + 1) / N * (N - step) / N for step in range(N)])


@pytest.mark.parametrize("schedule", list(LrSchedule))
@pytest.mark.parametrize("n_steps", [1, 2, 3, 7])
def test_the_shortest_runs_have_rates_between_zero_and_the_peak(schedule: LrSchedule, n_steps: int) -> None:
    for warmup in (0.0, 0.02, 0.5, 1.0):
        for decay in (0.0, 0.3, 1.0):
            options = replace(OPTIONS, warmup=warmup, decay=decay, schedule=schedule)
            assert all(0 < rate <= 2.0 for rate in rates(options, n_steps))


def coefficients(ramp: Ramp, n_steps: int) -> list[float]:
    return [coefficient(8.0, ramp, step, n_steps) for step in range(n_steps + 1)]


def test_a_coefficient_rises_linearly_over_the_run() -> None:
    assert coefficients(Ramp(Shape.linear), 4) == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_a_constant_coefficient_is_there_at_once() -> None:
    assert coefficients(Ramp(), 3) == [8.0] * 4
    assert coefficients(Ramp(Shape.linear, length=0.0), 3) == [8.0] * 4
    assert coefficients(Ramp(Shape.cosine, length=0.0), 3) == [8.0] * 4


def test_a_coefficient_holds_after_its_rise() -> None:
    assert coefficients(Ramp(Shape.linear, length=0.5), 8) == [0.0, 2.0, 4.0, 6.0] + [8.0] * 5
    rise = [0.0, 4 - 4 * math.cos(math.pi / 4), 4.0, 4 + 4 * math.cos(math.pi / 4)]
    assert coefficients(Ramp(Shape.cosine, length=0.5), 8) == pytest.approx(rise + [8.0] * 5)


def test_a_delayed_coefficient_waits_and_then_rises_over_what_is_left() -> None:
    assert coefficients(Ramp(Shape.delayed, delay=0.5), 8) == [0.0] * 5 + [2.0, 4.0, 6.0, 8.0]
    assert coefficients(Ramp(Shape.delayed, delay=0.5, length=0.5), 8) == [0.0] * 5 + [4.0, 8.0, 8.0, 8.0]
    assert coefficients(Ramp(Shape.delayed, delay=0.5, length=0.0), 4) == [0.0, 0.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("shape", list(Shape))
def test_a_coefficient_never_exceeds_its_value_nor_falls_below_zero(shape: Shape) -> None:
    delay = 0.3 if shape == Shape.delayed else 0.0
    for n_steps in (1, 2, 5):
        seen = coefficients(Ramp(shape, delay=delay), n_steps)
        assert all(0 <= value <= 8.0 for value in seen)
        assert seen == sorted(seen)
        assert seen[-1] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("ramp", "line"),
    [
        (Ramp(Shape.linear, length=1.5), r"loss.schedule.aux_k.length=1.5 is a share"),
        (Ramp(Shape.linear, length=-0.1), r"loss.schedule.aux_k.length=-0.1 is a share"),
        (Ramp(Shape.delayed, delay=1.0), r"loss.schedule.aux_k.delay=1.0 .*never begin"),
        (Ramp(Shape.delayed, delay=-0.5), r"loss.schedule.aux_k.delay=-0.5"),
        (Ramp(Shape.cosine, delay=0.5), r"loss.schedule.aux_k.delay=0.5 has no meaning .*shape=delayed"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_name(ramp: Ramp, line: str) -> None:
    with pytest.raises(UserError, match=line):
        check(ramp, "loss.schedule.aux_k")


def test_adam_takes_its_first_step_by_the_rate_against_the_sign_of_the_gradient() -> None:
    # Bias correction makes the first update lr * sign(g), whatever the betas.
    for beta1 in (0.0, 0.9):
        weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
        optimizer = optim.build([weight], OptimOptions("adam", lr=0.1, beta1=beta1))
        weight.grad = torch.tensor([5.0, -0.01, 0.0])
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor([0.9, 1.1, 1.0]), rtol=1e-5, atol=1e-6)


def test_adam_uses_the_betas_it_is_given() -> None:
    optimizer = optim.build([torch.nn.Parameter(torch.ones(2))], OptimOptions("adam", beta1=0.3, beta2=0.7))
    assert optimizer.defaults["betas"] == (0.3, 0.7)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "sgd9"),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("warmup", -0.1),
        ("warmup", 1.1),
        ("decay", 1.5),
    ],
)
def test_optimiser_settings_out_of_range_are_refused_by_name(field: str, value: float | str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=rf"optim{'' if field == 'name' else rf'[.]{field}'}={value}"):
        optim.build([weight], replace(OPTIONS, **{field: value}))
