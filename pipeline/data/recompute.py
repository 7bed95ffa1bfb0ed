"""Targets that are recomputed (`cache.targets=recompute`): whether they are the true ones, and where they come from.

mlp_out is a function of resid_mid, which is stored with the 8 bits of bfloat16. In a model that computes in bfloat16
those are the bits that its norm read, so what differs is the order of sums. In a float32 model they are rounded, which
changes the MLP's output about as much as rounding the output itself. Both are measured against that rounding:

    r = spacing of bfloat16 at the true value, squared, / 12      the expected squared error of rounding it
    over_rounding = sum of squared errors / sum of r              of a layer

Every value off by one whole spacing is 12. Measured: below 3 (docs/cache.md). More than MOST is not rounding.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from pipeline.data import models
from pipeline.data.cache import Cache
from pipeline.data.layout import Json
from pipeline.data.mlps import Mlps
from pipeline.data.models import LanguageModel
from pipeline.data.options import Attention, ModelOptions
from pipeline.errors import UserError
from pipeline.plain import from_plain

MOST = 16.0
"""Of over_rounding, in any layer."""
ROUNDING = 2.0**-8
"""The largest relative error of rounding to bfloat16."""
PROBE = (8, 64)
"""Contexts and tokens of the trial before anything is extracted."""
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Exactness:
    """Recomputed outputs against true ones, by layer and in the model's dtype."""

    fvu: list[float]
    """sum of squared errors / sum of squared deviations from the mean"""
    over_rounding: list[float]
    """sum of squared errors / what rounding the true outputs to bfloat16 is expected to give"""
    largest: float
    """Largest error of a row, in norm, in units of 2^-8 of the row's norm."""
    n_rows: int

    def __str__(self) -> str:
        return (
            f"recomputed mlp_out has FVU {max(self.fvu):.1g} ({max(self.over_rounding):.2g} times what rounding to "
            f"bfloat16 costs), its worst row is off by {self.largest:.2g} * 2^-8 of its norm"
        )

    @property
    def attributes(self) -> Json:
        """As they stand in a cache."""
        return asdict(self)

    def check(self, model: LanguageModel) -> None:
        """Raises UserError when that is more than rounding."""
        worst = torch.tensor(self.over_rounding)
        if not worst.max() <= MOST:  # not <=: NaN is a difference too
            layer = int(worst.nan_to_num(torch.inf).argmax())
            off = f"{worst[layer]:.3g} times what rounding to bfloat16 costs (FVU {self.fvu[layer]:.2g})"
            where = f"model={model.name}: mlp_out of layer {model.layers[layer]}, recomputed from resid_mid"
            raise UserError(f"{where}, is off by {off}, and {MOST:g} is the most; use cache.targets=stored")


class Comparison:
    """Adds up rows of [L, D]."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self._n_rows, self._largest = 0, 0.0
        self._error, self._rounding = torch.zeros(2, n_layers, dtype=torch.float64)
        self._sum, self._square = torch.zeros(2, n_layers, d_model, dtype=torch.float64)

    def add(self, again: Tensor, true: Tensor) -> None:
        """Recomputed and true outputs [n, L, D]."""
        self._n_rows += len(true)
        for layer in range(true.shape[1]):  # one at a time: these are float64
            y = true[:, layer].cpu().double()
            error = (again[:, layer].cpu().double() - y).norm(dim=1)
            self._error[layer] += error.square().sum()
            self._rounding[layer] += (_spacing(y).square() / 12).sum()
            self._sum[layer] += y.sum(dim=0)
            self._square[layer] += y.square().sum(dim=0)
            relative = error / y.norm(dim=1).clamp(min=TINY) / ROUNDING
            self._largest = torch.maximum(torch.tensor(self._largest), relative.max()).item()  # keeps a NaN

    def result(self) -> Exactness:
        spread = (self._square - self._sum.square() / self._n_rows).sum(dim=1).clamp(min=TINY)
        over = self._error / self._rounding.clamp(min=TINY)
        return Exactness((self._error / spread).tolist(), over.tolist(), self._largest, self._n_rows)


def try_out(model: LanguageModel) -> None:
    """A trial on random tokens, before anything is extracted. Raises UserError for a model whose outputs cannot be
    recomputed."""
    n, length = PROBE
    shape = (n, min(length, model.n_context))
    tokens = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    resid_mid, mlp_out = (site.flatten(0, 1) for site in model.collect(tokens, first=1))
    comparison = Comparison(model.n_layers, model.d_model)
    comparison.add(model.mlps()(resid_mid.bfloat16()), mlp_out)
    comparison.result().check(model)


def mlps_of(cache: Cache, device: torch.device) -> Mlps:
    """The MLPs of the model that made a cache, in the arithmetic that made it, on `device`; the rest of the model is
    dropped. Raises UserError when the model is not that one any more."""
    made = cache.model
    asked = {**cache.request["model"], "device": str(device), "dtype": made["dtype"]}
    asked["attention"] = Attention.auto.value  # it plays no part, and its kernel may want another device
    asked["revision"] = made["revision"] or asked["revision"]  # the commit, where a branch was asked for
    model = models.load(from_plain(ModelOptions, asked))
    if (now := model.weights_hash()) != made["weights_sha256"]:
        change = f"{made['weights_sha256'][:12]}, now {now[:12]}"
        raise UserError(
            f"{cache.path} has no mlp_out, and was made with other weights of {model.name} ({change}); restore those "
            "weights, or extract again"
        )
    return model.mlps()


def _spacing(values: Tensor) -> Tensor:
    """Between neighbouring bfloat16 numbers, at each value."""
    _, exponent = torch.frexp(values)  # value = mantissa * 2^exponent, 1/2 <= |mantissa| < 1
    return torch.ldexp(torch.ones_like(values), exponent - 8).where(values != 0, 0.0)
