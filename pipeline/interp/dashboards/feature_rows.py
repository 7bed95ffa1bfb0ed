"""The rows of chosen features in a product, whose last digits are not to depend on which others are chosen with them.

A CPU computes narrow products in another way than wide ones, so that a feature described alone, or by a rank that has
few, would differ from the same one described among many.
"""

import torch
from torch import Tensor

LEAST_ROWS = 64
"""From which on a product is computed in one way."""


def widened(ids: Tensor) -> Tensor:
    """ids [n], of one or more -> [max(n, LEAST_ROWS)], the last one repeated."""
    return torch.cat([ids, ids[-1:].expand(max(0, LEAST_ROWS - len(ids)))])
