"""Settings of `train.kernels` on this machine, for the bench."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import UserError

PORTABLE = "torch"


def available(device: torch.device) -> list[str]:
    """From the portable one to the one that `auto` takes."""
    return [PORTABLE]


def chosen(asked: list[str] | None, device: torch.device) -> list[str]:
    """Those to time. UserError for one that is not there."""
    there = available(device)
    for name in asked or []:
        if name not in there:
            raise UserError(f"bench.kernels: {name} is not to be had on {device}; choose from {', '.join(there)}")
    if asked is not None and not asked:
        raise UserError(f"bench.kernels=[] times nothing; choose from {', '.join(there)}")
    return asked or there


@contextmanager
def use(name: str, device: torch.device) -> Iterator[None]:
    """While the context lasts, the products of `core/` are computed this way."""
    yield
