"""Adam that takes a gradient as terms and writes none (`core/native.py`, float32 on a CPU).

    g = .grad + sum of the terms            m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    W = W - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

with g + weight_decay W in place of g (Adam), or W (1 - lr weight_decay) in place of W first (`decoupled`: AdamW). Each
row of W, m and v is read and written once: 24 bytes a parameter, where a gradient in memory makes it 32 and more.

The formulas and the names of the state are torch.optim.Adam's, so that a checkpoint of either continues with the other.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.core import deferred, native


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
        assert supports(held), "float32 on a CPU, each in one piece"
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decoupled": decoupled}
        super().__init__(held, settings)
        for parameter in held:
            if parameter.dim() == 2:
                deferred.want(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                terms = deferred.take(parameter)
                if terms or parameter.grad is not None:
                    self._step(parameter, terms, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        deferred.discard(parameter for group in self.param_groups for parameter in group["params"])

    def _step(self, parameter: Tensor, terms: list[deferred.RowTerm], group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        grad = parameter.grad
        native.adam(
            parameter,
            (state["exp_avg"], state["exp_avg_sq"]),
            None if grad is None else grad.contiguous(),
            terms,
            step=state["step"].item(),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled"],
        )


def supports(parameters: Iterable[Tensor]) -> bool:
    """Whether the kernel is for all of these."""
    return all(native.handles(p) and p.is_contiguous() for p in parameters)
