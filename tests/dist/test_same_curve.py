"""The loss curve of one process, whatever the grid: every architecture and activation, sparse and dense."""

from typing import Any

import pytest
import torch

from pipeline.arch import table
from pipeline.arch.base import Dims
from pipeline.core.activations import ACTIVATIONS
from pipeline.dist.shard import shards
from pipeline.errors import UserError
from pipeline.train.options import SparseStep
from tests import oracle
from tests.dist import curves
from tests.dist.curves import GRIDS, Case, both, usual


def can_be_had(case: Case, grid: tuple[int, int]) -> bool:
    if not oracle.allowed(case.arch.name, case.rule.name):
        return False
    try:
        shards(case.arch, case.rule, table.n_sources(case.arch, Dims(curves.L, curves.D)), grid[0])
    except UserError:
        return False
    return True


def agree(got: Any, expected: Any, rel: float, name: str = "") -> None:
    """Numbers within `rel`, of which the forms of layers, that each rank finds for itself, are no part."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), name
        for key in expected:
            if key not in ("sparse_layers", "dense_windows"):
                agree(got[key], expected[key], rel, f"{name} {key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            agree(one, other, rel, f"{name} {i}")
    else:
        assert got == (expected if expected is None else pytest.approx(expected, rel=rel, abs=rel)), name


BY_FEATURES, BY_DATA = [(2, 1), (3, 1), (4, 1)], [(1, 2), (1, 3), (1, 4)]


def grids(number: int) -> list[tuple[int, int]]:
    """Of a pair of an architecture and an activation: one by features, one by data, and both. Three pairs have all."""
    return [BY_FEATURES[number % 3], BY_DATA[(number + 1) % 3], (2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_ranks_give_the_curve_of_one_process(architecture: str, grid: tuple[int, int]) -> None:
    forms = [SparseStep.always, SparseStep.never]
    cases = []
    for number, rule in enumerate(ACTIVATIONS, start=sorted(table.ARCHS).index(architecture)):
        if grid in grids(number):
            # A pair has each form on some grid.
            case = usual(architecture, rule, sparse=forms[(number + grids(number).index(grid)) % 2])
            cases += [case] if can_be_had(case, grid) else []
    assert cases
    for case, one, many in both(cases, grid):
        agree(many, one, 1e-9, str(case))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (1, 3), (2, 2)], ids=str)
def test_in_float32_the_curve_is_the_same_but_for_near_ties(grid: tuple[int, int]) -> None:
    cases = [usual(architecture, rule, dtype=torch.float32) for architecture in ("clt", "tied") for rule in ACTIVATIONS]
    for case, one, many in both([case for case in cases if can_be_had(case, grid)], grid):
        agree(many["lines"], one["lines"], 1e-3, str(case))


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_a_few_steps_are_those_of_one_process(grid: tuple[int, int]) -> None:
    pairs = [("clt", "topk"), ("matryoshka", "jumprelu"), ("molt", "batchtopk"), ("skip", "batchtopk_across")]
    for case, one, many in both([usual(*pair, n_steps=6) for pair in pairs], grid):
        agree(many, one, 1e-9, str(case))
        assert any("loss/aux_k" in line for line in one["lines"]), "dead features are there"
