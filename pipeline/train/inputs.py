"""From what a cache stores to what a transcoder is trained on."""

import time
from collections.abc import Callable
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


class Recompute:
    """The base model's MLPs as a function, resid_mid [B, L, D] -> mlp_out [B, L, D], and the time that it takes."""

    def __init__(self, mlps: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._mlps, self._is_cuda = mlps, device.type == "cuda"
        self._calls: list[float | tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, resid_mid: Tensor) -> Tensor:
        """Nothing waits for a GPU here: it notes the time itself."""
        if self._is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            mlp_out = self._mlps(resid_mid)
            end.record()
            self._calls.append((begin, end))
        else:
            start = time.perf_counter()
            mlp_out = self._mlps(resid_mid)
            self._calls.append(time.perf_counter() - start)
        return mlp_out

    def take_ms(self) -> float:
        """Milliseconds of a call, the mean since this was asked last. Waits for a GPU."""
        total = 0.0
        for call in self._calls:
            if isinstance(call, float):
                total += 1e3 * call
            else:
                call[1].synchronize()
                total += call[0].elapsed_time(call[1])
        n, self._calls = len(self._calls), []
        return total / max(1, n)


Prepare = Callable[["Inputs", Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(inputs, resid_mid, mlp_out) -> x, y, as `Inputs` makes them or has made them before."""


class Inputs(NamedTuple):
    """The site that the transcoder reads, the one that it writes, then the transcoder's units."""

    norm: MlpNorm
    scaling: Scaling
    device: torch.device
    site: Site
    target: Target
    recompute: Recompute | None = None
    """Of a cache whose training rows hold no mlp_out."""
    shared: Prepare | None = None
    """Of several runs with one preparation (`train/shared.py`): what it gives is not to be written over."""

    def __call__(self, resid_mid: Tensor, mlp_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stored rows [B, L, D] -> x, y [B, L, D] float32 in the transcoder's units, on the device. mlp_out None: it is
        recomputed."""
        if self.shared is not None:
            return self.shared(self, resid_mid, mlp_out)
        x, y = self.raw(resid_mid, mlp_out)
        y = self.scaling.y(y) if y is x else self.scaling.y_in_place(y)
        return self.scaling.x_in_place(x), y

    def raw(self, resid_mid: Tensor, mlp_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same in the model's units: `pair`, in memory of its own that may be written over. They are one tensor
        where the site is what is written."""
        stored = resid_mid.to(self.device, non_blocking=True)
        if mlp_out is None:
            assert self.recompute is not None
            y = self.recompute(stored).to(self.scaling.y_scale.dtype)
        else:
            y = self._floats(mlp_out.to(self.device, non_blocking=True))
        if self.site == Site.mlp_out:
            return y, y
        x = self._floats(stored)
        x = self.norm.in_place(x) if self.site == Site.mlp_in else x
        return x, (x if self.target == Target.site else y)

    def _floats(self, rows: Tensor) -> Tensor:
        """A copy, whatever they are."""
        return rows.to(self.scaling.x_scale.dtype, copy=True)


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


def build(
    norm: MlpNorm,
    site: Site,
    maps: Scaling,
    device: torch.device,
    target: Target = Target.mlp_out,
    recompute: Recompute | None = None,
) -> Inputs:
    """`norm` is that of the cache; it is used at site=mlp_in alone."""
    on_device = Scaling(*(t.to(device) for t in maps))
    return Inputs(norm.to(str(device)), on_device, device, site, target, recompute)


def layer_variance(y: Statistics, maps: Scaling) -> Tensor:
    """mean_n |y^m - mean y^m|^2 of each layer in the transcoder's units. -> float64 [L]"""
    return (y.std / maps.y_scale.double()).square().sum(dim=1)


def variance(y: Statistics, maps: Scaling) -> float:
    """V, their sum."""
    return float(layer_variance(y, maps).sum())
