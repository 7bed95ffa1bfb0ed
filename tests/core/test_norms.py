"""Norms of rows over several tables, and their gradient in both forms."""

import pytest
import torch
from torch import Tensor

from pipeline.core import deferred
from pipeline.core.norms import row_norms
from tests import oracle

F = 7
WIDTHS = [5, 3]


def tables() -> list[Tensor]:
    """Row 2 is zero everywhere, row 4 in the first table alone."""
    made = [oracle.normal(F, width, seed=width) for width in WIDTHS]
    for table in made:
        table[2] = 0
    made[0][4] = 0
    return [table.requires_grad_() for table in made]


@pytest.mark.parametrize("kept", [False, True])
def test_the_gradient_is_the_direction_of_the_row_and_zero_at_zero(kept: bool) -> None:
    given, weight = tables(), oracle.normal(F, seed=9)
    for table in given:
        deferred.want(table, kept)
    norms = row_norms(given)
    whole = torch.cat([table.detach() for table in given], dim=1)
    assert oracle.normwise(norms, whole.norm(dim=1)) < 1e-14
    (norms * weight).sum().backward()
    direction = torch.nn.functional.normalize(whole, dim=1) * weight[:, None]
    for table, expected in zip(given, direction.split(WIDTHS, dim=1), strict=True):
        if kept:
            assert table.grad is None
            deferred.materialise(table)
        assert table.grad is not None
        assert oracle.normwise(table.grad, expected) < 1e-14
        assert not table.grad[2].any()
