"""A library's optimisers behind one face: one list of groups, one state, gradients that are whole and clipped.

    Optimiser       one or several of torch's optimisers, each on its own parameters
    EightBit        torchao's Adam, whose moments are tensors of 8-bit codes (`train/eight_bit.py`)
    ScheduleFree    facebook's wrapper around the sign of the gradient (Defazio et al. 2024, arXiv:2405.15682)

Schedule-free training knows three points: z, which the steps move; x, the average of all z so far, which is the
result; and y, between the two, where gradients are taken. The parameters hold y while a run is at work, the state holds
z, and x follows from both. `averaged` puts x into the parameters for a while, `settle` for good.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.core import deferred
from pipeline.dist.wire import Group
from pipeline.train import eight_bit


class Optimiser(Optimizer):
    """Optimisers that share their groups and their state with this one. Before each step gradients that are kept as
    terms (`core/deferred.py`) are summed, and all are clipped."""

    def __init__(self, parts: Sequence[Optimizer], clip: float | None = None, features: Group | None = None) -> None:
        """clip: the largest norm of all gradients together; None for no limit. features: ranks that hold the other
        parameters."""
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, parts[0].defaults if len(parts) == 1 else {})
        for part in parts:
            part.state = self.state
        self.parts, self.clip, self.features = list(parts), clip, features

    def parameters(self) -> list[Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for parameter in self.parameters():
            deferred.materialise(parameter)
        if self.clip is not None:
            clip_gradients(self.parameters(), self.clip, self.features)
        self._advance()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        deferred.discard(self.parameters())

    def _advance(self) -> None:
        for part in self.parts:
            part.step()


class EightBit(Optimiser):
    """torchao's optimisers compile their step, which a CPU does not repay: a minute of compiling comes first, and the
    step is slow either way."""

    def _advance(self) -> None:
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):  # a number would be compiled into the step
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        if self.parameters()[0].device.type == "cpu":
            with torch.compiler.set_stance("force_eager"):
                super()._advance()
        else:
            super()._advance()


class ScheduleFree(Optimiser):
    """Steps of `lr` against the sign of the gradient, averaged. momentum: how far y lies from z towards x."""

    SCALARS: ClassVar[tuple[str, ...]] = ("k", "lr_max", "weight_sum")
    """What the wrapper keeps in each group: steps, the highest rate, the sum of the average's weights."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float,
        momentum: float,
        clip: float | None,
        features: Group | None = None,
    ) -> None:
        from schedulefree import ScheduleFreeWrapper

        base = torch.optim.SGD(parameters, lr=lr, fused=True)
        super().__init__([base], clip, features)
        self.wrapper = ScheduleFreeWrapper(base, momentum=momentum)
        self.wrapper.train()

    def _advance(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.sign_()
        self.wrapper.step()


@torch.no_grad()
def clip_gradients(parameters: Sequence[Parameter], largest: float, features: Group | None = None) -> None:
    """Shorten all gradients together, those of other feature ranks too, to the norm `largest`, if they exceed it.

    A parameter of which there is one for all ranks must have a gradient on one of them alone. 8 bytes on the wire.
    """
    if features is None or features.size == 1:
        torch.nn.utils.clip_grad_norm_(parameters, largest)
        return
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    square = norm.to(features.device, torch.float64).square().reshape(1)
    features.sum(square, "gradient norm")
    torch.nn.utils.clip_grads_with_norm_(parameters, largest, square.sqrt().to(norm.dtype).squeeze())


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters are what the run would end with; afterwards they are what they were, to the last bit.

    For all but `ScheduleFree` they are that already. Takes a second copy of the weights for as long.
    """
    if not isinstance(optimizer, ScheduleFree) or not optimizer.wrapper.train_mode:
        yield
        return
    kept = {parameter: parameter.detach().clone() for parameter in optimizer.parameters()}
    optimizer.wrapper.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept.items():
                parameter.copy_(value)
        optimizer.wrapper.train_mode = True  # its own train() would undo eval() up to rounding only


def settle(optimizer: Optimizer) -> None:
    """The end of training: the parameters become the result. No step may follow."""
    if isinstance(optimizer, ScheduleFree):
        optimizer.wrapper.eval()


# ------------------------------------------------------------------------------------------------------- the state


def optimizer_tensors(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All that the optimiser remembers, as what/parameter; a tensor of 8-bit codes as what.part/parameter, a number of
    a group as group.I/what, and with `ScheduleFree` the parameters themselves as y/parameter."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        f"{what}{part}/{names[parameter]}": tensor
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
        for part, tensor in eight_bit.parts(torch.as_tensor(value)).items()
    }
    if isinstance(optimizer, ScheduleFree) and "k" in optimizer.param_groups[0]:
        found |= {f"y/{names[parameter]}": parameter.detach() for parameter in optimizer.parameters()}
        for index, group in enumerate(optimizer.param_groups):
            for what in ScheduleFree.SCALARS:
                dtype = torch.int64 if isinstance(group[what], int) else torch.float64
                found[f"group.{index}/{what}"] = torch.tensor(group[what], dtype=dtype)
    return found


@torch.no_grad()
def restore_optimizer(model: torch.nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for what in ScheduleFree.SCALARS:
            group.pop(what, None)
    coded: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        what, name = key.split("/", 1)
        if what.startswith("group."):
            optimizer.param_groups[int(what.removeprefix("group."))][name] = tensor.item()
            continue
        parameter = parameters[name]
        if what == "y":
            parameter.copy_(tensor)
            continue
        # Step counters stay where the optimiser put them: on the CPU unless it is fused on a GPU.
        device = parameter.device if tensor.dim() or groups[parameter].get("fused") else tensor.device
        # A copy, or the moments would lie in the mapped file of a checkpoint that is soon removed.
        copied = tensor.to(device, copy=True)
        base, _, part = what.partition(".")
        if part:
            coded.setdefault((base, name), {})[part] = copied
        else:
            optimizer.state[parameter][what] = copied
    for (what, name), parts in coded.items():
        optimizer.state[parameters[name]][what] = eight_bit.moment(what, parts, parameters[name])


@torch.no_grad()
def forget(optimizer: Optimizer, parameter: Tensor, rows: Tensor) -> None:
    """Make the optimiser begin again with some rows of a parameter, which were just set. rows: a boolean over its first
    axes."""
    for what, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if what == "z":
            value[rows] = parameter[rows]  # so that the average begins there too
        elif eight_bit.is_coded(value):
            value.codes[rows] = value.qmap.abs().argmin().to(torch.uint8)  # type: ignore[attr-defined]
        else:
            value[rows] = 0
