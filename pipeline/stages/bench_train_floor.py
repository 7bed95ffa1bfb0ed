"""What the machine allows: rates that are timed in the same rounds as the steps, and the time of a step at these rates.

    floor = B 2 L D F / gemm  +  4 B k D (3 S + L) / gather  +  24 P / pass

L layers, S = L (L + 1) / 2 decoder tables [F, D], P parameters, B tokens, k active features of a token and layer.

gemm     x [B, D] W^T of the encoder's own shape in float32, over all layers' weights: encoding is dense always
gather   rows of the step's own tables, k drawn at random for a token, summed by embedding_bag: the decoder's products
         forward, of the values and of the weights, and the encoder's weight gradient each take as many rows
pass     the faster of a copy between two buffers far larger than any cache and of scaling one where it lies, bytes read
         and written; weights and the two moments of Adam are read and written once, the gradient is never in memory

A copy alone would be no floor: it fetches what it overwrites, which an optimiser need not, and steps have been faster
than that. The floor with a copy's rate is given as well (`copy`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Transcoder
from pipeline.stages.bench_train_shapes import FLOAT, Shape

FORMULA = "floor = B 2LDF / gemm + 4Bk D(3S + L) / gather + 24P / pass"

PASS_BYTES = 64 << 20
"""Of the buffer that is copied; four times that on a GPU."""
GATHER_TABLES = 12
"""Tables whose rows are gathered in a turn, at most: the next turn takes the next ones, so that they are as cold as in
a step."""


class Rates(NamedTuple):
    """Of a machine, in one round."""

    gemm: float
    """Floating-point operations a second."""
    gather: float
    """Bytes a second."""
    copy: float
    """Bytes a second, read and written."""
    in_place: float
    """The same."""


class Floor(NamedTuple):
    """Seconds of a step's parts at given rates."""

    gemm: float
    gather: float
    parameters: float
    parameters_copied: float
    """At a copy's rate."""

    @property
    def seconds(self) -> float:
        return self.gemm + self.gather + self.parameters

    @property
    def copy_seconds(self) -> float:
        """With the rate of a copy for the parameters."""
        return self.gemm + self.gather + self.parameters_copied


class Work(NamedTuple):
    """What a step cannot do without."""

    gemm_flops: float
    gathered_bytes: float
    parameter_bytes: float

    def at(self, rates: Rates) -> Floor:
        return Floor(
            self.gemm_flops / rates.gemm,
            self.gathered_bytes / rates.gather,
            self.parameter_bytes / max(rates.copy, rates.in_place),
            self.parameter_bytes / rates.copy,
        )


def work(shape: Shape, k: float) -> Work:
    """Of a step with k active features of a token and layer."""
    rows = 3 * shape.n_tables + shape.n_layers
    return Work(
        2.0 * shape.batch_tokens * shape.n_layers * shape.d_model * shape.d_features,
        FLOAT * shape.batch_tokens * k * shape.d_model * rows,
        6.0 * FLOAT * shape.n_parameters,
    )


class Machine:
    """The products whose rates are timed, on a model's own tables. `seconds` times a call."""

    def __init__(self, model: Transcoder, shape: Shape, k: int) -> None:
        device = model.b_enc.device
        self.shape, self.k = shape, k
        self.encoders: list[Tensor] = [weight.detach() for weight in model.encoders]
        self.tables = [table.detach() for source in range(model.n_sources) for table in model.tables(source)]
        self.x = torch.randn(shape.batch_tokens, shape.d_model, device=device)
        self.pre_acts = torch.empty(shape.batch_tokens, shape.d_features, device=device)
        self.ids = torch.randint(shape.d_features, (shape.batch_tokens, k), device=device)
        self.weights = torch.rand(shape.batch_tokens, k, device=device)
        n = PASS_BYTES // FLOAT * (4 if device.type == "cuda" else 1)
        self.buffers = torch.ones(n, device=device), torch.empty(n, device=device)
        self.turn = 0

    def rates(self, seconds: Callable[[Callable[[], object]], float]) -> Rates:
        shape = self.shape
        flops = 2.0 * shape.batch_tokens * shape.d_model * shape.d_features * len(self.encoders)
        gathered = float(FLOAT * self.ids.numel() * shape.d_model * min(GATHER_TABLES, len(self.tables)))
        moved = 2.0 * self.buffers[0].nbytes
        return Rates(
            flops / seconds(self._gemm),
            gathered / seconds(self._gather),
            moved / seconds(lambda: self.buffers[1].copy_(self.buffers[0])),
            moved / seconds(lambda: self.buffers[0].mul_(1.0)),
        )

    def _gemm(self) -> None:
        for weight in self.encoders:
            torch.mm(self.x, weight.T, out=self.pre_acts)

    def _gather(self) -> None:
        for _ in range(min(GATHER_TABLES, len(self.tables))):
            self.turn = (self.turn + 1) % len(self.tables)
            F.embedding_bag(self.ids, self.tables[self.turn], mode="sum", per_sample_weights=self.weights)
