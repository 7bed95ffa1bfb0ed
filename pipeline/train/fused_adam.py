"""Adam that takes a gradient as terms, one table at a time, on a CPU.

    g = .grad + sum of the terms            m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    W = W - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

with g + weight_decay W in place of g (Adam), or W (1 - lr weight_decay) in place of W first (`decoupled`: AdamW).

The compiled kernel (`core/native.py`) has g in a buffer of one row: 24 bytes of memory traffic a parameter. In torch a
table's g exists while its step is taken, in memory that the next table's takes over: a gradient for each table at once
would be as large as the weights, and its fresh pages cost more than the arithmetic.

The names of the state are torch.optim.Adam's, so that a checkpoint of either continues with the other.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam

from pipeline.core import deferred, native, products
from pipeline.core.options import Kernels


class FusedAdam(torch.optim.Optimizer):
    """Matrices among the parameters are told to keep terms (`deferred.want`)."""

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        held = list(parameters)
        assert supports(held)
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(held, settings)
        for parameter in held:
            if parameter.dim() == 2:
                deferred.want(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        compiled = products.active() == Kernels.compiled
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None and not deferred.terms(parameter):
                    continue
                state = self._state(parameter)
                if compiled and native.handles(parameter):
                    _compiled_step(parameter, state, group)
                else:
                    _torch_step(parameter, state, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        deferred.discard(parameter for group in self.param_groups for parameter in group["params"])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def supports(parameters: Iterable[Tensor]) -> bool:
    """Whether these parameters may be handed to it: on a CPU, in float32 or float64, each in one piece."""
    floats = (torch.float32, torch.float64)
    return all(p.device.type == "cpu" and p.dtype in floats and p.is_contiguous() for p in parameters)


def _compiled_step(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    state["step"] += 1
    native.adam(
        parameter,
        (state["exp_avg"], state["exp_avg_sq"]),
        None if parameter.grad is None else parameter.grad.contiguous(),
        deferred.take(parameter),
        step=state["step"].item(),
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled"],
    )


def _torch_step(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    before = parameter.grad
    deferred.materialise(parameter)
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    adam(
        [parameter],
        [parameter.grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        decoupled_weight_decay=group["decoupled"],
    )
    if before is None:
        parameter.grad = None  # the next table's may take its place
