"""Whole training steps on the kernels, against the same steps on torch's operations and optimiser."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core import deferred, products, triton_kernels
from pipeline.core.options import Kernels, LossOptions
from pipeline.train.fused_adam import FusedAdam, supports
from pipeline.train.objective import Objective
from tests import oracle

B, L, F, D = 3, 2, 7, 5
N_STEPS = 2


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `products.using(Kernels.triton, ...)`, which asks for a CUDA device."""
    monkeypatch.setattr(products, "_active", (Kernels.triton, triton_kernels))


def trained(model: Transcoder, optimiser: torch.optim.Optimizer, device: str) -> list[float]:
    """The losses. A batch is taken in two parts, whose gradients add up."""
    objective = Objective(LossOptions("reconstruction"), model, 1.0, N_STEPS, torch.ones(L))
    dead = torch.zeros(L, F, dtype=torch.bool, device=device)
    losses = []
    for step in range(N_STEPS):
        for part in range(2):
            seed = 10 * step + 2 * part
            x, y = (oracle.normal(B, L, D, seed=seed + i, dtype=torch.float32).to(device) for i in (5, 6))
            terms = objective(model, objective.forward(model, x, step), x, y, dead, step)
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()
            losses.append(loss.item())
        optimiser.step()
        optimiser.zero_grad()
    return losses


def start(activation: str) -> Transcoder:
    return oracle.transcoder("clt", activation, L, F, D, torch.float32)


def by_torch(activation: str) -> tuple[list[float], dict[str, Tensor]]:
    model = start(activation)
    with mock.patch.object(products, "_active", (Kernels.torch, None)):
        losses = trained(model, torch.optim.Adam(model.parameters(), lr=0.01, foreach=False), "cpu")
    return losses, dict(model.named_parameters())


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize(
    ("activation", "terms"),
    [
        ("topk", True),
        pytest.param("topk", False, marks=pytest.mark.slow),
        pytest.param("batchtopk", True, marks=pytest.mark.slow),
    ],
)
def test_training_steps_equal_those_of_torch(activation: str, terms: bool, device: str) -> None:
    model = start(activation).to(device)
    parameters = list(model.parameters())
    assert supports(parameters)
    optimiser = FusedAdam(parameters, lr=0.01) if terms else torch.optim.Adam(parameters, lr=0.01, foreach=False)
    assert any(deferred.wanted(parameter) for parameter in parameters) == terms
    losses = trained(model, optimiser, device)
    expected, weights = by_torch(activation)
    assert losses == pytest.approx(expected, rel=1e-5)
    before = dict(start(activation).named_parameters())
    assert max(oracle.normwise(weights[name], before[name]) for name in weights) > 0.01
    for name, parameter in model.named_parameters():
        assert oracle.normwise(parameter.cpu(), weights[name]) < 1e-5, name
