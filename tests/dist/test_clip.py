"""Gradients are clipped by the norm of all of them, wherever they lie."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.dist import mesh
from pipeline.dist.gradients import Gradients
from pipeline.dist.options import DistOptions
from pipeline.errors import UserError
from pipeline.train import optim
from pipeline.train.optim import Place
from pipeline.train.optimisers import clip_gradients
from pipeline.train.options import OptimOptions
from tests import oracle
from tests.dist import processes

CPU = torch.device("cpu")
F, D, L = 11, 6, 3
FEATURES = DistOptions("feature_shard", features=None, data=1)
OPTIMISERS = ["adam", "adamw", "adam8bit", "signsgd"]


def held(ranks: mesh.Mesh) -> tuple[Parameter, Parameter]:
    """A rank's rows of a table, and the bias of which there is one, on the first rank."""
    n, i = ranks.features.size, ranks.features.rank
    rows = oracle.normal(F, D, seed=1)[F * i // n : F * (i + 1) // n].clone()
    bias = Parameter(oracle.normal(L, D, seed=2), requires_grad=ranks.features.rank == 0)
    return Parameter(rows), bias


def set_gradients(ranks: mesh.Mesh, table: Parameter, bias: Parameter, seed: int) -> None:
    n, i = ranks.features.size, ranks.features.rank
    table.grad = 3 * oracle.normal(F, D, seed=seed)[F * i // n : F * (i + 1) // n].clone()
    if bias.requires_grad:
        bias.grad = 3 * oracle.normal(L, D, seed=seed + 1)


def clipped(largest: float) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    with mesh.started(FEATURES, CPU) as ranks:
        table, bias = held(ranks)
        set_gradients(ranks, table, bias, 5)
        clip_gradients([table, bias], largest, ranks.features)
        assert table.grad is not None
        return table.grad, bias.grad, {what: count.sent for what, count in ranks.wire.counts.items()}


@pytest.mark.parametrize("largest", [0.5, 1e3])
@pytest.mark.parametrize("n", [2, 3])
def test_the_norm_is_that_of_all_feature_ranks_and_counts_the_bias_once(n: int, largest: float) -> None:
    table, bias, _ = clipped(largest)
    found = processes.run(n, clipped, largest)
    assert oracle.normwise(torch.cat([rows for rows, _, _ in found]), table) < 1e-14
    assert found[0][1] is not None
    assert bias is not None
    assert oracle.normwise(found[0][1], bias) < 1e-14
    assert all(other is None for _, other, _ in found[1:])
    norm = torch.cat([table.flatten(), bias.flatten()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-6) or largest == 1e3
    assert [sent for _, _, sent in found] == [{"gradient norm": 2 * 8 * (n - 1) // n}] * n


def trained(name: str) -> tuple[Tensor, Tensor]:
    with mesh.started(FEATURES, CPU) as ranks:
        table, bias = held(ranks)
        options = OptimOptions(name, lr=0.05, clip=0.7, decay=0.0)
        optimizer = optim.build([("decoders.0", table), ("b_dec", bias)], options, Place(ranks.features))
        for step in range(3):
            set_gradients(ranks, table, bias, 10 * step)
            optimizer.step()
        return table.detach(), bias.detach()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_moves_the_rows_of_three_ranks_as_it_moves_them_on_one(name: str) -> None:
    table, bias = trained(name)  # here, so that the forks find its libraries loaded
    found = processes.run(3, trained, name)
    assert oracle.normwise(torch.cat([rows for rows, _ in found]), table) < 1e-7
    assert oracle.normwise(found[0][1], bias) < 1e-7
    assert torch.equal(found[1][1], oracle.normal(L, D, seed=2))  # no gradient, no step


def norm_over_data(largest: float) -> Tensor:
    """Each rank has half of the gradient."""
    with mesh.started(DistOptions("ddp", features=1, data=None), CPU) as ranks:
        table = Parameter(oracle.normal(F, D, seed=1))
        gradients = Gradients([table], ranks.data)
        table.grad = oracle.normal(F, D, seed=3) / ranks.data.size
        gradients.reduce()
        clip_gradients([table], largest, ranks.features)
        assert table.grad is not None
        return table.grad


def test_over_data_ranks_the_norm_is_that_of_the_sum() -> None:
    expected = norm_over_data(0.5)
    for got in processes.run(2, norm_over_data, 0.5):
        assert oracle.normwise(got, expected) < 1e-14


def test_muon_is_refused_where_ranks_share_the_features() -> None:
    options = OptimOptions("muon")
    optim.check(options)
    with pytest.raises(UserError, match=r"optim=muon makes a step of a whole matrix.*3 ranks.*; use optim=adam or"):
        optim.check(options, 3)
