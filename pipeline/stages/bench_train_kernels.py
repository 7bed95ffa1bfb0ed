"""Settings of `train.kernels` on this machine, for the bench."""

from contextlib import AbstractContextManager

import torch

from pipeline.core import products
from pipeline.core.options import Kernels
from pipeline.errors import UserError

PORTABLE = Kernels.torch.value


def available(device: torch.device) -> list[str]:
    """From the portable one to the one that `auto` takes."""
    with products.using(Kernels.auto, device) as best:
        return list(dict.fromkeys([PORTABLE, best.value]))


def chosen(asked: list[str] | None, device: torch.device) -> list[str]:
    """Those to time. UserError for one that cannot be had."""
    if asked is None:
        return available(device)
    known = [name.value for name in Kernels if name is not Kernels.auto]
    for name in asked or ["none"]:
        if name not in known:
            raise UserError(f"bench.kernels: there is no {name}; choose from {', '.join(known)}")
        with use(name, device):  # says what is missing
            pass
    return asked


def use(name: str, device: torch.device) -> AbstractContextManager[Kernels]:
    """While the context lasts, the products of `core/` are computed this way, and optimisers are made for it."""
    return products.using(Kernels(name), device)
