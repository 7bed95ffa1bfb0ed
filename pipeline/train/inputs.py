"""From what a cache stores to what a transcoder is trained on."""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.options import Site
from pipeline.core.normalize import MlpNorm, Scaling
from pipeline.train.options import Norm


class Statistics(NamedTuple):
    """Of one site over all training rows, float64: mean [L, D], std [L, D], rms [L] (root of the mean square)."""

    mean: Tensor
    std: Tensor
    rms: Tensor


class Inputs(NamedTuple):
    """The frozen norm of the base model, if the transcoder reads behind it, then the transcoder's units."""

    norm: MlpNorm | None
    scaling: Scaling
    device: torch.device

    def __call__(self, resid_mid: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
        """Stored rows [B, L, D] -> x, y [B, L, D] float32 in the transcoder's units, on the device."""
        x, y = self.raw(resid_mid, mlp_out)
        return self.scaling.x(x), self.scaling.y(y)

    def raw(self, resid_mid: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the model's units."""
        x = resid_mid.to(self.device, non_blocking=True).float()
        y = mlp_out.to(self.device, non_blocking=True).float()
        return (self.norm(x) if self.norm else x), y


def scaling(norm: Norm, x: Statistics, y: Statistics) -> Scaling:
    """The maps between units that `train.norm` asks for, as float32 (`core/normalize.py` has the formulas)."""
    if norm == Norm.rms:
        zero = torch.zeros_like(x.mean)
        maps = Scaling(zero, x.rms[:, None].expand_as(x.mean), zero, y.rms[:, None].expand_as(y.mean))
    else:
        maps = Scaling(x.mean, x.std, y.mean, y.std)
    # A dimension that never varies has nothing to scale.
    positive = [torch.where(t > 0, t, 1.0) for t in (maps.x_scale, maps.y_scale)]
    maps = maps._replace(x_scale=positive[0], y_scale=positive[1])
    return Scaling(*(t.float().contiguous() for t in maps))


def build(norm: MlpNorm, site: Site, maps: Scaling, device: torch.device) -> Inputs:
    on_device = Scaling(*(t.to(device) for t in maps))
    return Inputs(norm.to(str(device)) if site == Site.mlp_in else None, on_device, device)


def layer_variance(y: Statistics, maps: Scaling) -> Tensor:
    """mean_n |y^m - mean y^m|^2 of each layer in the transcoder's units. -> float64 [L]"""
    return (y.std / maps.y_scale.double()).square().sum(dim=1)


def variance(y: Statistics, maps: Scaling) -> float:
    """V, their sum."""
    return float(layer_variance(y, maps).sum())
