"""What a run measures on held-out text while it goes on."""

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site, Target
from pipeline.core.normalize import MlpNorm, Scaling
from pipeline.errors import UserError
from pipeline.train import calibrate, held_out
from pipeline.train.held_out import HeldOut
from pipeline.train.inputs import Inputs
from tests import oracle

N, L, F, D = 53, 3, 11, 6
BATCH, SEED = 16, 3


def stored() -> tuple[Tensor, Tensor]:
    return oracle.normal(N, L, D).bfloat16(), (7 + oracle.normal(N, L, D, seed=2)).bfloat16()


def inputs() -> Inputs:
    scaling = Scaling(*(oracle.normal(L, D, seed=seed).float().abs() + 0.5 for seed in range(3, 7)))
    norm = MlpNorm("rms", torch.ones(L, D), torch.zeros(L, D), 1e-5)
    return Inputs(norm, scaling, torch.device("cpu"), Site.resid_mid, Target.mlp_out)


def model_of(activation: str = "batchtopk") -> Transcoder:
    """In training; features 5 and 6 of layer 1 never fire."""
    model = oracle.transcoder("clt", activation, dtype=torch.float32).train()
    with torch.no_grad():
        model.b_enc[1, 5:7] = -50.0
    return model


class Reads:
    """Counts how often, and how much, is read."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, n: int) -> tuple[Tensor, Tensor]:
        self.asked.append(n)
        resid_mid, mlp_out = stored()
        return resid_mid[:n], mlp_out[:n]


def test_it_says_what_the_rule_of_training_does_on_the_first_rows_in_whole_batches() -> None:
    model, prepare = model_of(), inputs()
    optimizer = torch.optim.Adam(model.parameters())
    found = HeldOut(Reads(), prepare, 40, BATCH, SEED).measure(model, optimizer, 1)
    x, y = prepare(*(rows[:40] for rows in stored()))
    order = list(calibrate.shuffled_batches(40, BATCH, SEED))
    with torch.no_grad():
        outs = [model.eval()(x[rows]) for rows in order]
    scale = prepare.scaling.y_scale
    features, y_hat = torch.cat([out.features.dense() for out in outs]), torch.cat([out.y_hat for out in outs]) * scale
    fvu = oracle.fvu(y_hat.double(), y[torch.cat(order)].double() * scale)[0]
    assert found["fvu"] == pytest.approx(fvu, rel=1e-6)
    assert found["explained_variance"] == 1 - found["fvu"]
    assert found["l0"] == pytest.approx(sum(oracle.l0(features)) / 40)
    never = (features > 0).sum(dim=0) == 0
    assert never[1, 5:7].all()
    assert found["dead_fraction"] == pytest.approx(int(never.sum()) / (L * F))
    assert found["n_tokens"] == 40


def test_rows_are_read_once_and_are_a_whole_batch_at_least() -> None:
    model, reads = model_of(), Reads()
    optimizer = torch.optim.Adam(model.parameters())
    measured = HeldOut(reads, inputs(), 5, BATCH, SEED)
    assert measured.measure(model, optimizer, 1)["n_tokens"] == BATCH
    measured.measure(model, optimizer, 2)
    assert reads.asked == [BATCH]
    assert HeldOut(reads, inputs(), 10_000, BATCH, SEED).measure(model, optimizer, 1)["n_tokens"] == N


def test_a_step_is_measured_once_and_the_next_one_anew() -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    measured = HeldOut(Reads(), inputs(), 40, BATCH, SEED)
    first = measured.measure(model, optimizer, 1)
    assert measured.take_ms() > 0
    with torch.no_grad():
        model.b_dec += 1.0
    assert measured.measure(model, optimizer, 1) == first
    assert measured.take_ms() == 0
    assert measured.measure(model, optimizer, 2)["fvu"] != first["fvu"]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "topk"])
def test_measuring_leaves_no_trace(activation: str) -> None:
    model = model_of(activation)
    optimizer = torch.optim.Adam(model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    HeldOut(Reads(), inputs(), 40, BATCH, SEED).measure(model, optimizer, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_targets_that_do_not_vary_have_no_fvu() -> None:
    constant = stored()[0], torch.ones(N, L, D).bfloat16()
    model = model_of()
    measured = HeldOut(lambda n: constant, inputs(), 40, BATCH, SEED)
    assert measured.measure(model, torch.optim.Adam(model.parameters()), 1)["fvu"] is None


@pytest.mark.parametrize(
    ("asked", "n_steps", "expected"),
    [
        (None, 5000, 0),
        ("7", 5000, 7),
        ("auto", 5003, 500),  # ten times
        ("auto", 5600, 600),  # in whole log lines
        ("auto", 300, 100),  # 60 steps see as many tokens as 30 times the slice
        ("auto", 1, 100),
    ],
)
def test_auto_is_a_tenth_of_the_run_or_rarer_where_that_would_cost_much(
    asked: str | None, n_steps: int, expected: int
) -> None:
    assert held_out.every(asked, n_steps, batch_tokens=1024, rows=2048, log_steps=50) == expected


@pytest.mark.parametrize("asked", ["0", "-3", "often", "1.5"])
def test_another_rhythm_is_refused(asked: str) -> None:
    with pytest.raises(UserError, match=r"log\.held_out_every=.* must be a number of steps"):
        held_out.every(asked, 5000, 1024, 2048, 50)
