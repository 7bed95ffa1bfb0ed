"""Models of ranks, each an ordinary one with fewer features, write together what the whole model writes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.arch import init, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.held import Held
from pipeline.arch.options import ArchOptions, Init
from pipeline.core import activations
from pipeline.core.activations import Activation
from pipeline.core.options import ActivationOptions, Rank
from pipeline.dist import select
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import Shard, shards
from pipeline.train.objective import explain_error
from tests import oracle
from tests.dist import threads

B, L, D, F = 5, 3, 6, 44
FIRST = [0, 3]
"""Where the tokens of two data ranks begin."""


def options_of(architecture: str, activation: str) -> tuple[ArchOptions, ActivationOptions]:
    rule = replace(oracle.activation_options(activation), k=4)
    arch = oracle.arch_options(architecture, d_features=F, init=Init.uniform)
    return arch, rule


def model_of(arch: ArchOptions, rule: Activation, held: Held | None = None) -> Transcoder:
    """Drawn weights: those of a part are the rows of the whole, as test_init_shards shows."""
    model = table.build(replace(arch, d_features=rule.d_features), Dims(L, D), rule).double()
    nothing = torch.empty(0, L, D)
    init.initialise(model, nothing, nothing, torch.Generator().manual_seed(5), held=held)
    return model


def whole_of(arch: ArchOptions, rule: ActivationOptions) -> Transcoder:
    return model_of(arch, activations.build(rule, table.n_sources(arch, Dims(L, D)), F))


def summed(
    arch: ArchOptions,
    rule: ActivationOptions,
    grid: tuple[int, int],
    written: Callable[[Transcoder, slice, Shard], Tensor],
) -> Tensor:
    """What the ranks write: over features the sum, tokens of data ranks one after another."""
    n_sources = table.n_sources(arch, Dims(L, D))
    parts = shards(arch, rule, n_sources, grid[0])

    def work(mesh: Mesh) -> Tensor:
        model = model_of(arch, select.rule(rule, n_sources, parts, mesh), select.held(parts, mesh))
        last = B if mesh.data.rank == mesh.data.size - 1 else FIRST[mesh.data.rank + 1]
        return written(model, slice(FIRST[mesh.data.rank], last), parts[mesh.features.rank]).detach()

    found = threads.run(*grid, work)
    rows = [found[d * grid[0] : (d + 1) * grid[0]] for d in range(grid[1])]
    return torch.cat([torch.stack(row).sum(dim=0) for row in rows])


@pytest.mark.parametrize("grid", [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("activation", ["topk", "groupmax", "batchtopk", "batchtopk_across"])
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_what_the_ranks_write_adds_up_to_what_the_whole_writes(
    architecture: str, activation: str, grid: tuple[int, int]
) -> None:
    refused = activation == "groupmax" and (architecture in {"molt", "matryoshka"} or grid[0] == 3)
    if refused or not oracle.allowed(architecture, activation):
        pytest.skip("cannot be had")
    arch, rule = options_of(architecture, activation)
    x = oracle.normal(B, L, D)
    for rank in (None, Rank.norm):
        rule = replace(rule, rank=rank)
        for dense in (False, True):  # train.sparse=never asks for the pre-activations
            expected = whole_of(arch, rule)(x, dense).y_hat
            found = summed(arch, rule, grid, lambda model, tokens, _, dense=dense: model(x[tokens], dense).y_hat)
            assert oracle.normwise(found, expected) < 1e-13


@pytest.mark.parametrize("grid", [(2, 1), (3, 2)])
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_dead_features_of_all_ranks_explain_the_error_together(architecture: str, grid: tuple[int, int]) -> None:
    arch, rule = options_of(architecture, "topk")
    x = oracle.normal(B, L, D)
    dead = torch.zeros(table.n_sources(arch, Dims(L, D)), F, dtype=torch.bool)
    dead[0, [0, 1, 2, 15, 16, 30, 43]] = True  # more than d/2, of every rank
    dead[-1, 40] = True
    expected = explain_error(whole_of(arch, rule), x, dead)

    def written(model: Transcoder, tokens: slice, shard: Shard) -> Tensor:
        return explain_error(model, x[tokens], dead[:, shard.ids()])

    assert oracle.normwise(summed(arch, rule, grid, written), expected) < 1e-13
