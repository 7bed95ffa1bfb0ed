"""The MLPs of a language model alone: what each adds to the residual stream, from where its norm reads it.

    mlps = model.mlps()            # LanguageModel.mlps
    mlps(resid_mid)                # [B, L, D] -> [B, L, D], in the model's dtype

Only these modules are held. Dropping the model frees the rest of it.
"""

import inspect
import time

import torch
from torch import Tensor, nn

from pipeline.errors import UserError

ROWS = 8192
"""Rows that go through an MLP at a time: its hidden layer takes several times their memory."""


class Mlps:
    """Modules of each layer, applied one after the other: norm, MLP and, where there is one, the norm behind it.
    `name` is the model's, for messages. Raises UserError for a module that needs more than its input, as BLOOM's MLP
    does, which adds the residual stream itself."""

    def __init__(
        self, layers: list[list[nn.Module]], d_model: int, dtype: torch.dtype, device: torch.device, name: str
    ) -> None:
        self.layers = layers
        self.d_model, self.dtype, self.device, self.name = d_model, dtype, device, name
        for module in layers[0]:
            if len(needed := _needed(module)) > 1:
                raise self._refusal(f"{type(module).__name__} needs {' and '.join(needed[1:])} besides its input")

    @torch.no_grad()
    def __call__(self, resid_mid: Tensor) -> Tensor:
        """resid_mid [B, L, D] of any dtype on any device -> mlp_out [B, L, D] in the model's dtype, on its device. No
        gradient. Raises UserError for an MLP that gives something else."""
        assert resid_mid.shape[1:] == (len(self.layers), self.d_model)
        out = torch.empty(resid_mid.shape, dtype=self.dtype, device=self.device)
        for start in range(0, len(resid_mid), ROWS):
            rows = resid_mid[start : start + ROWS].to(self.device, self.dtype, non_blocking=True)
            for layer, modules in enumerate(self.layers):
                value = rows[None, :, layer]  # a model's modules are given [contexts, positions, D]
                for module in modules:
                    value = self._checked(module(value), module)
                out[start : start + ROWS, layer] = value[0]
        return out

    def rows_per_second(self, n_rows: int) -> float:
        """Of random rows, alone, the best of three; the first time does not count."""
        rows = torch.randn(n_rows, len(self.layers), self.d_model, dtype=torch.bfloat16).to(self.device)

        def seconds() -> float:
            start = time.perf_counter()
            self(rows)[-1, -1, -1].item()  # waits for the device
            return time.perf_counter() - start

        seconds()
        return n_rows / min(seconds() for _ in range(3))

    @property
    def flops(self) -> int:
        """Of a token: two for each weight of a matrix."""
        return sum(2 * parameter.numel() for parameter in self._parameters() if parameter.dim() > 1)

    @property
    def n_bytes(self) -> int:
        """Memory of the weights."""
        return sum(parameter.nbytes for parameter in self._parameters())

    def _parameters(self) -> list[nn.Parameter]:
        return [weight for modules in self.layers for module in modules for weight in module.parameters()]

    def _checked(self, value: object, module: nn.Module) -> Tensor:
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == self.d_model:
            return value
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise self._refusal(f"{type(module).__name__} gives {found}, no rows of width {self.d_model}")

    def _refusal(self, what: str) -> UserError:
        return UserError(f"{self.name}: {what}, so mlp_out cannot be recomputed; use cache.targets=stored")


def _needed(module: nn.Module) -> list[str]:
    """Arguments of a module that have no default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = inspect.signature(module.forward).parameters.values()
    return [p.name for p in given if p.kind in kinds and p.default is inspect.Parameter.empty]
