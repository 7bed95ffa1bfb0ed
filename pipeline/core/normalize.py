"""Two normalisations, and how the second one is folded away.

1. The MLP's own norm, frozen: `MlpNorm` maps the stored residual stream to what the MLP reads.

       layer: (r - mean r) / sqrt(var r + eps) * gain + bias        rms: r / sqrt(mean r^2 + eps) * gain + bias

2. The transcoder's units: `Scaling`, from the statistics of the whole cache, per layer l.

       x' = (x - m_l) / s_l          y = S_l y' + M_l

   rms (default): m = M = 0, and s, S are one number per layer such that the mean square of x' and of y' is 1.
   standard: m, s, M, S are the mean and the standard deviation of each dimension.

A finished transcoder has the second folded into its weights (`arch/base.py`): every artifact is in the model's units.
"""

from typing import NamedTuple

from torch import Tensor


class MlpNorm(NamedTuple):
    """The norm in front of each MLP of the base model."""

    kind: str
    """layer or rms."""
    gain: Tensor
    """[L, D], any constant offset of the gain (Gemma's 1 + w) included."""
    bias: Tensor
    """[L, D], zeros where the norm has none."""
    eps: float

    def __call__(self, resid_mid: Tensor) -> Tensor:
        """What the MLPs read: [B, L, D] -> [B, L, D] in float32 (float64 stays float64)."""
        return _normalise(resid_mid, self.kind, self.eps) * self.gain + self.bias

    def in_place(self, resid_mid: Tensor) -> Tensor:
        """The same to the bit, written over [B, L, D] float32: without temporaries of that size but one."""
        if self.kind == "layer":
            resid_mid -= resid_mid.mean(dim=-1, keepdim=True)
        resid_mid *= resid_mid.square().mean(dim=-1, keepdim=True).add_(self.eps).rsqrt_()
        return resid_mid.mul_(self.gain).add_(self.bias)

    def layer(self, resid_mid: Tensor, layer: int) -> Tensor:
        """What the MLP of one layer reads: [..., D] -> [..., D]."""
        return _normalise(resid_mid, self.kind, self.eps) * self.gain[layer] + self.bias[layer]

    def to(self, device: str) -> "MlpNorm":
        return self._replace(gain=self.gain.to(device), bias=self.bias.to(device))


def _normalise(resid: Tensor, kind: str, eps: float) -> Tensor:
    resid = resid if resid.dtype.itemsize == 8 else resid.float()
    if kind == "layer":
        resid = resid - resid.mean(dim=-1, keepdim=True)
    return resid * (resid.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


class Scaling(NamedTuple):
    """The affine maps between the model's units and the transcoder's. Each tensor broadcasts against [B, L, D]."""

    x_mean: Tensor
    """[L, D]"""
    x_scale: Tensor
    """[L, D]"""
    y_mean: Tensor
    """[L, D]"""
    y_scale: Tensor
    """[L, D]"""

    def x(self, x: Tensor) -> Tensor:
        """Inputs in the transcoder's units. [B, L, D] -> [B, L, D]"""
        return (x - self.x_mean) / self.x_scale

    def y(self, y: Tensor) -> Tensor:
        """Targets in the transcoder's units. [B, L, D] -> [B, L, D]"""
        return (y - self.y_mean) / self.y_scale

    def x_in_place(self, x: Tensor) -> Tensor:
        """`x` to the bit, written over its argument."""
        return x.sub_(self.x_mean).div_(self.x_scale)

    def y_in_place(self, y: Tensor) -> Tensor:
        return y.sub_(self.y_mean).div_(self.y_scale)

    def inverse(self) -> "Scaling":
        """The maps back, float64: folding a transcoder with it undoes folding it with this one.

        x = (x' + m/s) / (1/s) and y' = y/S - M/S.
        """
        x_mean, x_scale, y_mean, y_scale = (t.double() for t in self)
        return Scaling(-x_mean / x_scale, 1 / x_scale, -y_mean / y_scale, 1 / y_scale)

    def y_inverse(self, y: Tensor) -> Tensor:
        """Reconstructions in the model's units. [B, L, D] -> [B, L, D]"""
        return y * self.y_scale + self.y_mean
