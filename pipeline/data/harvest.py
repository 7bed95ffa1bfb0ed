"""Token contexts to rows of activations, and their sums.

    buffers = Buffers(model, context=128, batch_tokens=8192, n=1)
    for rows in harvest(model, packed, range(0, 128), buffers):
        rows.resid_mid, rows.mlp_out        # bfloat16 [n, L, D] of training tokens rows.first, rows.first + 1, ...

Position 0 of a context and the padding at the end of the last one are no rows. Activations are rounded to bfloat16
(nearest, ties to even): that is what is stored, and what statistics are made of.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data.layout import SITES, STORED
from pipeline.data.models import LanguageModel
from pipeline.data.tokens import Packed
from pipeline.errors import UserError

PIECE = 1 << 17
"""Numbers summed at a time on a CPU: float64 copies of more leave its cache."""


class Rows(NamedTuple):
    """Consecutive rows of a split, in the order of its tokens, on the model's device."""

    first: int
    resid_mid: Tensor
    """bfloat16 [n, L, D], or int8 as they are stored (`scales.stored`)."""
    mlp_out: Tensor
    """The same."""


class Buffers:
    """Room for the rows of `n` forward passes of about `batch_tokens` tokens, used in turn: fresh memory for each pass
    costs a CPU more than what is written there (5 % of GPT-2 small's forward pass)."""

    def __init__(self, model: LanguageModel, context: int, batch_tokens: int, n: int) -> None:
        self.n_contexts = max(1, batch_tokens // context)
        shape = (n, 2, self.n_contexts, context - 1, model.n_layers, model.d_model)
        self._all = torch.empty(shape, dtype=torch.bfloat16, device=model.device)
        self._turn = 0

    def next(self, n_contexts: int) -> tuple[Tensor, Tensor]:
        """Two bfloat16 [n_contexts, T-1, L, D]; what was in them is given up."""
        self._turn = (self._turn + 1) % len(self._all)
        resid_mid, mlp_out = self._all[self._turn, :, :n_contexts]
        return resid_mid, mlp_out


def harvest(model: LanguageModel, packed: Packed, contexts: range, buffers: Buffers) -> Iterator[Rows]:
    """The rows of some contexts, a forward pass at a time. They lie in `buffers`: those of a pass are valid for as many
    passes as there are buffers. Which contexts share a pass depends on the arguments alone, so that extracting them
    again gives the same bits."""
    width = packed.contexts.shape[1] - 1
    for start in range(contexts.start, contexts.stop, buffers.n_contexts):
        batch = packed.contexts[start : min(start + buffers.n_contexts, contexts.stop)]
        sites = model.collect(torch.from_numpy(batch.astype(np.int64)), first=1, out=buffers.next(len(batch)))
        first = start * width
        n_rows = min(len(batch) * width, packed.n_rows - first)
        assert n_rows > 0, "a context without rows"
        yield Rows(first, *(values.flatten(0, 1)[:n_rows] for values in sites))  # [n, T-1, L, D] -> [n_rows, L, D]


def sums(rows: Rows, norm: MlpNorm) -> Tensor:
    """Sum and sum of squares over the rows of each of SITES: float64 [sites, 2, L, D], on the rows' device (for mps, on
    the CPU). `norm` on the rows' device.

    A CPU does it on one thread, in pieces: two threads wait for each other at every small one, which took four times
    as long.
    """
    n_rows, *shape = rows.resid_mid.shape
    device = rows.resid_mid.device if rows.resid_mid.is_cuda else torch.device("cpu")  # mps has no float64
    total = torch.zeros(len(SITES), 2, *shape, dtype=torch.float64, device=device)
    step = n_rows if device.type == "cuda" else max(1, PIECE // (shape[0] * shape[1]))
    with _one_thread():
        for start in range(0, n_rows, step):
            resid_mid, mlp_out = rows.resid_mid[start : start + step], rows.mlp_out[start : start + step]
            for site, values in enumerate((resid_mid, norm(resid_mid), mlp_out)):
                exact = values.to(device, torch.float64)
                total[site, 0] += exact.sum(dim=0)
                total[site, 1] += exact.square().sum(dim=0)
    return total


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def finite(total: Tensor, first_layer: int) -> NDArray[np.float64]:
    """Sums on the CPU. Raises UserError, naming the layer of the base model, when an activation was not finite."""
    result: NDArray[np.float64] = total.cpu().numpy()
    if not np.isfinite(result).all():
        site, _, layer, _ = np.argwhere(~np.isfinite(result))[0]
        where = f"{(*SITES, *STORED)[site]} of layer {first_layer + layer}"
        raise UserError(f"{where} is not finite (NaN or infinity); use model.dtype=float32")
    return result


def statistics(total: NDArray[np.float64], n_rows: int) -> dict[str, NDArray[np.float64]]:
    """`<site>/mean`, `<site>/std` [L, D] and `<site>/rms` [L] from the sums over all rows."""
    found = {}
    for site, (total_x, total_x2) in zip(SITES, total, strict=True):
        mean, mean_square = total_x / n_rows, total_x2 / n_rows
        found[f"{site}/mean"] = mean
        found[f"{site}/std"] = np.sqrt(np.maximum(mean_square - mean**2, 0))  # rounding can leave -1e-17
        found[f"{site}/rms"] = np.sqrt(mean_square.mean(axis=1))
    return found
