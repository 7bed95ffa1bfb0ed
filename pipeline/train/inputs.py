"""From what a cache stores to what a transcoder is trained on."""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.options import Site, Target
from pipeline.core.normalize import MlpNorm, Scaling
from pipeline.train.options import Norm


class Statistics(NamedTuple):
    """Of one site over all training rows, float64: mean [L, D], std [L, D], rms [L] (root of the mean square)."""

    mean: Tensor
    std: Tensor
    rms: Tensor


class Inputs(NamedTuple):
    """The site that the transcoder reads, the one that it writes, then the transcoder's units."""

    norm: MlpNorm
    scaling: Scaling
    device: torch.device
    site: Site
    target: Target

    def __call__(self, resid_mid: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
        """Stored rows [B, L, D] -> x, y [B, L, D] float32 in the transcoder's units, on the device."""
        x, y = self.raw(resid_mid, mlp_out)
        return self.scaling.x(x), self.scaling.y(y)

    def raw(self, resid_mid: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the model's units."""
        return pair(self.site, self.target, self.norm, self.place(resid_mid), self.place(mlp_out))

    def place(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, non_blocking=True).float()


def pair(site: Site, target: Target, norm: MlpNorm, resid_mid: Tensor, mlp_out: Tensor) -> tuple[Tensor, Tensor]:
    """x, y [B, L, D] in the model's units from what a cache stores, as floats."""
    resid = norm(resid_mid) if site == Site.mlp_in else resid_mid
    x = mlp_out if site == Site.mlp_out else resid
    return x, (x if target == Target.site else mlp_out)


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


def build(norm: MlpNorm, site: Site, maps: Scaling, device: torch.device, target: Target = Target.mlp_out) -> Inputs:
    """`norm` is that of the cache; it is used at site=mlp_in alone."""
    on_device = Scaling(*(t.to(device) for t in maps))
    return Inputs(norm.to(str(device)), on_device, device, site, target)


def variance(y: Statistics, maps: Scaling) -> float:
    """V = sum_m mean_n |y^m - mean y^m|^2 in the transcoder's units."""
    return float((y.std / maps.y_scale.double()).square().sum())
