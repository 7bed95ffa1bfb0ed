"""The sizes that `clt bench train` times, and whether they fit into the memory."""

from typing import NamedTuple

import torch

from pipeline.data.layout import gb
from pipeline.data.loader import available_memory
from pipeline.errors import UserError
from pipeline.stages.bench_options import BenchTrainOptions

FLOAT = 4
DENSE = 6
"""Tensors of the size of all pre-activations that the dense step has at once: those, their positive part, the chosen
ones and the gradients of each."""


class Shape(NamedTuple):
    """Of a CLT and its batch."""

    n_layers: int
    d_model: int
    d_features: int
    batch_tokens: int
    k: int
    """Active features of a token and layer, unless `activation.k` or `bench.l0` says otherwise."""

    @property
    def n_tables(self) -> int:
        """Decoder tables [F, D]: one for each (source, target) pair."""
        return self.n_layers * (self.n_layers + 1) // 2

    @property
    def n_parameters(self) -> int:
        """Weights and biases, thresholds apart."""
        weights = (self.n_layers + self.n_tables) * self.d_features * self.d_model
        return weights + self.n_layers * (self.d_features + self.d_model)

    @property
    def side_bytes(self) -> int:
        """Weights, gradients and two moments in float32."""
        return 4 * FLOAT * self.n_parameters

    def needed_bytes(self, n_sides: int) -> int:
        """Of the dense reference and so many of our own beside it, in one process."""
        acts = FLOAT * self.batch_tokens * self.n_layers * self.d_features
        return (1 + n_sides) * self.side_bytes + DENSE * acts


SHAPES = {
    "A": Shape(n_layers=4, d_model=128, d_features=2048, batch_tokens=1024, k=16),
    "B": Shape(n_layers=12, d_model=768, d_features=3072, batch_tokens=256, k=16),
    "gpt2": Shape(n_layers=12, d_model=768, d_features=24_576, batch_tokens=4096, k=32),
}
CUSTOM = "custom"
OWN = ("n_layers", "d_model", "d_features", "batch_tokens")


def chosen(options: BenchTrainOptions, device: torch.device, n_sides: int) -> tuple[dict[str, Shape], dict[str, str]]:
    """The shapes to time, and why others are not: name -> a line. UserError for one that was named and cannot be."""
    sizes = {name: value for name in OWN if (value := getattr(options, name)) is not None}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"bench.{name}={value} must be at least 1")
    known = {**SHAPES, CUSTOM: SHAPES["A"]._replace(**sizes)}
    named = options.shapes
    if named is None:
        named = [CUSTOM] if sizes else ["A", "B", "gpt2"] if device.type == "cuda" else ["A", "B"]
    if not named:
        raise UserError(f"bench.shapes=[] times nothing; choose from {', '.join(known)}")
    for name in named:
        if name not in known:
            raise UserError(f"bench.shapes: {name} does not exist; choose from {', '.join(known)}")
    if sizes and CUSTOM not in named:
        raise UserError(f"bench.{next(iter(sizes))} is a size of the custom shape; use bench.shapes=[custom]")
    if CUSTOM in named and not sizes:
        raise UserError("bench.shapes: custom has no size of its own; set one, such as bench.d_features=8192")
    kept, skipped = {}, {}
    there = memory(device)
    for name in named:
        line = shortage(name, known[name], n_sides, there)
        if line and options.shapes is not None:
            raise UserError(f"{line}; leave it out of bench.shapes, or use smaller sizes")
        if line:
            skipped[name] = line
        else:
            kept[name] = known[name]
    return kept, skipped


def shortage(name: str, shape: Shape, n_sides: int, there: int) -> str:
    """Memory that is needed against what is there, where it is not enough; else nothing."""
    needed = shape.needed_bytes(n_sides)
    if needed <= there:
        return ""
    return (
        f"shape {name} does not fit: {shape.n_parameters:.2g} parameters, {gb(shape.side_bytes)} of weights, gradients "
        f"and moments on each of {1 + n_sides} sides, {gb(needed)} in all with the dense activations; {gb(there)} there"
    )


def memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def doubled(shape: Shape) -> Shape:
    """Twice the features."""
    return shape._replace(d_features=2 * shape.d_features)
