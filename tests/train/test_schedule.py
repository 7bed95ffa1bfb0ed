"""Learning rate and sparsity at the corners of a run, and the optimiser by name."""

import math
from dataclasses import replace

import pytest
import torch

from pipeline.core.options import LossOptions, Schedule
from pipeline.errors import UserError
from pipeline.train import optim
from pipeline.train.options import LrSchedule, OptimOptions
from pipeline.train.schedule import learning_rate, sparsity

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


def test_sparsity_rises_linearly_over_the_run_by_default() -> None:
    options = LossOptions("tanh", sparsity=8.0)
    assert [sparsity(options, step, 4) for step in range(5)] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_sparsity_holds_after_its_ramp() -> None:
    options = LossOptions("tanh", sparsity=8.0, sparsity_ramp=0.5)
    assert [sparsity(options, step, 8) for step in (0, 1, 4, 5, 8)] == [0.0, 2.0, 8.0, 8.0, 8.0]
    cosine = replace(options, sparsity_schedule=Schedule.cosine)
    expected = [0.0, 4 - 4 * math.cos(math.pi / 4), 4.0, 8.0, 8.0]
    assert [sparsity(cosine, step, 8) for step in (0, 1, 2, 4, 8)] == pytest.approx(expected)


def test_sparsity_without_a_ramp_is_there_at_once() -> None:
    for options in (
        LossOptions("tanh", sparsity=8.0, sparsity_schedule=Schedule.constant),
        LossOptions("tanh", sparsity=8.0, sparsity_ramp=0.0),
        LossOptions("tanh", sparsity=8.0, sparsity_ramp=0.0, sparsity_schedule=Schedule.cosine),
    ):
        assert [sparsity(options, step, 4) for step in (0, 3)] == [8.0, 8.0]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_sparsity_never_exceeds_its_value_nor_falls_below_zero(schedule: Schedule) -> None:
    options = LossOptions("tanh", sparsity=8.0, sparsity_schedule=schedule)
    for n_steps in (1, 2, 5):
        assert all(0 <= sparsity(options, step, n_steps) <= 8.0 for step in range(n_steps + 1))


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
