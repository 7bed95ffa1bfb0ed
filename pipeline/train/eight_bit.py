"""torchao's Adam with moments of 8 bits, in blocks of 256 numbers of a table laid flat.

Tables of features alone have such moments (`has_codes`), and which is no matter of how the features are shared: where
a rank's rows begin and end at the borders of blocks, its moments are the rows of those of one process. Biases,
thresholds and skip paths, which are few, keep moments of 32 bits.
"""

import importlib
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.train import rounding

BLOCK = 256
"""Numbers of a table that share the scale of their moments."""

TABLES = {"encoders", "decoders", "U", "V"}
"""Where in a transcoder the tables lie whose rows are features, by the first part of a parameter's name."""


def in_tables(name: str) -> bool:
    return name.split(".")[0] in TABLES


def has_codes(name: str, parameter: Tensor) -> bool:
    """Whether its moments have 8 bits; those of others have 32."""
    return in_tables(name) and parameter.numel() % BLOCK == 0


def adam(named: list[tuple[str, Parameter]], seed: int, ids: Tensor | None, **numbers: Any) -> Optimizer:
    """AdamW with such moments. Of parameters that are bfloat16 each step is rounded at random (`train/rounding.py`).
    ids: int64 [F], of each row its number in the whole; None for 0, 1, ..."""
    library, state = _quietly("torchao.optim"), _quietly("torchao.optim.subclass_8bit")
    single = _quietly("torchao.optim.adam").single_param_adam
    names = {id(parameter): name for name, parameter in named}

    @cache
    def rows(n: int, device: torch.device) -> Tensor:
        found = torch.arange(n) if ids is None else ids
        return found.to(device, torch.int32)[:, None]

    def rounded(p: Tensor, own: Tensor, key: Tensor, *rest: Any) -> None:
        exact = p.float()
        single(exact, *rest, False)
        p.copy_(rounding.rounded(exact, own, key))

    class Adam(library.AdamW8bit):  # type: ignore[name-defined]
        def _new_buffer(self, p: Tensor, signed: bool) -> Any:
            if not has_codes(names[id(p)], p):
                assert p.dtype is not torch.bfloat16, "second moments of 16 bits follow nothing"
                return torch.zeros_like(p)
            zeros = state.OptimState8bit.zeros(p.shape, signed, BLOCK, p.device, dtype=p.dtype)
            if not signed:
                # A second moment below the smallest step of its block would become 0, and the update, which is
                # divided by its root, would be without bounds where the first moment is not 0 too: in features
                # that fire rarely, that is the rule.
                zeros.qmap[0] = zeros.qmap[1] / 2
            return zeros

        @torch.no_grad()
        def step(self, closure: object = None) -> None:
            """As the library's, but for the rounding, which there draws from torch's generator."""
            with torch._dynamo.utils.disable_cache_limit():
                for group in self.param_groups:
                    for p in group["params"]:
                        if p.grad is not None:
                            self._step_one(p, group)

        def _step_one(self, p: Tensor, group: Mapping[str, Any]) -> None:
            kept = self.state[p]
            if not kept:
                kept["step"] = torch.tensor(0.0)
                kept["exp_avg"], kept["exp_avg_sq"] = self._new_buffer(p, True), self._new_buffer(p, False)
            kept["step"] += 1
            moments = kept["step"], kept["exp_avg"], kept["exp_avg_sq"], None
            rest = p.grad, *moments, group["lr"], *group["betas"], group["weight_decay"], group["eps"], True
            if p.dtype is torch.bfloat16:
                key = rounding.key(seed, names[id(p)], int(kept["step"]))
                _compiled(rounded)(p.detach(), rows(len(p), p.device), key, *rest)
            else:
                _compiled(single)(p.detach(), *rest, False)

    return Adam([parameter for _, parameter in named], **numbers)


def _compiled(work: Any) -> Any:
    return torch.compile(work, fullgraph=True, dynamic=False)


def is_coded(tensor: Tensor) -> bool:
    return hasattr(tensor, "__tensor_flatten__")


def parts(tensor: Tensor) -> dict[str, Tensor]:
    """A tensor by the names of its parts, "" for one that is plain: .codes uint8, as the tensor; .scale float32, one of
    each block; .qmap float32 [256], what the codes stand for."""
    if not is_coded(tensor):
        return {"": tensor}
    return {f".{name}": getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}  # type: ignore[attr-defined]


def moment(what: str, parts: Mapping[str, Tensor], parameter: Tensor) -> Any:
    """The inverse of `parts`, for the moment of this name."""
    state = _quietly("torchao.optim.subclass_8bit")
    return state.OptimState8bit(**parts, signed=what == "exp_avg", dtype=parameter.dtype)


def _quietly(module: str) -> Any:
    """torchao's modules. On import it complains of kernels for other machines, which no optimiser uses."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(module)
    finally:
        logging.disable(before)
