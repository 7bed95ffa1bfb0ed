"""A transcoder whose features lie on several ranks: what each builds, and what they say to each other in a step.

A rank's model is an ordinary transcoder with its share of the features. b_dec and W_skip live on feature rank 0; on the
others they are zeros without a gradient, so that the sum of what the ranks write is the model's reconstruction, with
the bias once:

    y_hat = sum over feature ranks of (their y_hat)          forward: one all-reduce        backward: the identity

Every feature rank computes the loss of the whole y_hat, so that dL/dy_hat is there already, and the gradients of its
own rows follow without another word. `Ranks` holds these seams; of one rank each is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims, Output, Transcoder
from pipeline.arch.held import Held
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.options import ActivationOptions
from pipeline.core.peers import Peers
from pipeline.dist import mesh as meshes
from pipeline.dist import select
from pipeline.dist import shard as shards
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import Shard

ONCE = ("b_dec", "W_skip")
"""Parameters without a row for each feature: they are on feature rank 0."""


@dataclass(frozen=True)
class Ranks:
    """What a rank knows of the others."""

    mesh: Mesh
    shard: Shard
    whole: Transcoder
    """The transcoder that the ranks hold between them; on the meta device, shapes alone, where those are several."""
    held: Held | None = None
    """The same for `arch/init.initialise`."""

    @property
    def many(self) -> bool:
        return self.mesh.world.size > 1

    @property
    def splits(self) -> bool:
        """Whether others hold features of the same transcoder."""
        return self.mesh.features.size > 1

    def bare(self, model: Transcoder) -> None:
        """Leave to feature rank 0 what there is once, after weights were put into the model."""
        for name in ONCE if self.mesh.features.rank else ():
            parameter = getattr(model, name)
            if parameter is not None:
                parameter.requires_grad_(False).zero_()

    def summed(self, tensors: Sequence[Tensor], what: str) -> tuple[Tensor, ...]:
        """Of tensors of one shape to which each feature rank adds: their sums, in one all-reduce. The gradient of a sum
        is that of each rank's part."""
        if not self.splits or not tensors:
            return tuple(tensors)
        found: tuple[Tensor, ...] = _Summed.apply(self.mesh.features, what, *tensors)
        return found

    def of_all(self, mask: Tensor) -> Tensor:
        """What is true of the features that are held, of all features. bool [S, n] -> [S, F]"""
        if not self.splits:
            return mask
        whole = mask.new_zeros(mask.shape[0], self.shard.d_features, dtype=torch.uint8)
        whole[:, self.shard.ids().to(mask.device)] = mask.to(torch.uint8)
        return self.mesh.features.largest(whole, "mask").bool()

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Where those of the features `ids` [m] that are held are among what is held [k], and which of `ids` they are
        [k]."""
        if not self.splits:
            return ids, torch.arange(ids.numel(), device=ids.device)
        at = torch.full((self.shard.d_features,), -1, device=ids.device)
        at[self.shard.ids().to(ids.device)] = torch.arange(self.shard.n, device=ids.device)
        which = (at[ids] >= 0).nonzero().squeeze(1)
        return at[ids[which]], which

    def total(self, own: float) -> float:
        """The sum over the feature ranks of a number that is small beside a batch."""
        if not self.splits:
            return own
        features = self.mesh.features
        return float(features.sum(torch.tensor([own], dtype=torch.float64, device=features.device), "held out"))

    def output(self, out: Output) -> Output:
        """The output whose reconstructions are those of all features, shorter prefixes included, in one call."""
        if not self.splits:
            return out
        y_hat, *shorter = self.summed([out.y_hat, *out.shorter], "reconstruction")
        return out._replace(y_hat=y_hat, shorter=tuple(shorter))

    def here(self, sizes: Sequence[int]) -> list[int]:
        """Prefixes of all features as prefixes of those that are held."""
        return [self.shard.below(m) for m in sizes] if self.splits else list(sizes)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, what: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(group.sum(torch.stack(tensors), what).unbind())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *grads


def alone(model: Transcoder) -> Ranks:
    """Those of one process."""
    return Ranks(meshes.alone(), shards.whole(model.d_features), model)


def build(arch: ArchOptions, activation: ActivationOptions, dims: Dims, mesh: Mesh) -> tuple[Transcoder, Ranks]:
    """The transcoder of this rank, its weights zero, and its place among the others. UserError for options that make no
    sense, or features that cannot be shared."""
    n_sources = table.n_sources(arch, dims)
    parts = shards.shards(arch, activation, n_sources, mesh.features.size)
    if mesh.features.size == 1:
        model = table.build(arch, dims, select.rule(activation, n_sources, parts, mesh))
        return model, Ranks(mesh, parts[0], model, select.held(parts, mesh))
    ranks, _ = place(arch, activation, dims, mesh)
    model = table.build(held_arch(arch, ranks.shard), dims, select.rule(activation, n_sources, parts, mesh))
    ranks.bare(model)
    return model, ranks


def place(arch: ArchOptions, activation: ActivationOptions, dims: Dims, mesh: Mesh) -> tuple[Ranks, Peers]:
    """A rank's place among those that hold the features of such a transcoder, and whom its features compete with.
    UserError as `build`."""
    n_sources = table.n_sources(arch, dims)
    parts = shards.shards(arch, activation, n_sources, mesh.features.size)
    with torch.device("meta"):
        whole = table.build(arch, dims, activations.build(activation, n_sources, arch.d_features))
    return Ranks(mesh, parts[mesh.features.rank], whole, select.held(parts, mesh)), select.peers(parts, mesh)


def held_arch(arch: ArchOptions, shard: Shard) -> ArchOptions:
    """The options of a transcoder with the features of a shard. Prefixes are of the whole (`Ranks.here`)."""
    return arch if shard.is_whole else replace(arch, d_features=shard.n, prefixes=None, random_prefixes=None)


class Over(Enum):
    """Which ranks add to a number."""

    all = "all"
    features = "features"
    """Data ranks have the same."""
    data = "data"
    """Feature ranks have the same."""


class Tally:
    """Numbers of a step that every rank needs to take the same decisions, summed in one all-reduce of float64. A number
    that some ranks have in common is added once; one that is not finite makes the sum so."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._names: list[str] = []
        self._values: list[Tensor] = []

    def put(self, name: str, value: Tensor | float, over: Over = Over.all) -> None:
        """All ranks put the same names, with values of the same shapes, in the same order."""
        counts = {Over.all: True, Over.features: self._mesh.data.rank == 0, Over.data: self._mesh.features.rank == 0}
        value = torch.as_tensor(value, dtype=torch.float64, device=self._device).detach()
        self._names.append(name)
        self._values.append(value if counts[over] else torch.zeros_like(value))

    def sums(self) -> dict[str, Tensor]:
        """float64, on the CPU. Waits for a GPU, once."""
        packed = torch.cat([value.flatten() for value in self._values])
        parts = self._mesh.world.sum(packed, "scalars").cpu().split([value.numel() for value in self._values])
        found = zip(self._names, parts, self._values, strict=True)
        return {name: part.view(value.shape) for name, part, value in found}
