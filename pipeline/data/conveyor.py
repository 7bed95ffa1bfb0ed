"""Rows to the writer on a thread of its own, so that the model computes the next ones meanwhile.

    with Writer(plan) as writer, Conveyor(writer, first_layer) as conveyor:
        for block in writer.todo:
            for rows in harvest(...):
                conveyor.put(block, *stored(block.split, rows, norm, codes))
            conveyor.finish(block)

From a GPU, rows come through pinned memory: the copy runs beside the next forward pass, and the thread waits for its
end. What the thread raises is raised by the next call here.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipeline.data.harvest import Rows, finite
from pipeline.data.plan import Block
from pipeline.data.writer import Writer

DEPTH = 1
"""Batches that wait for the writer at most, while another one is being written."""


def n_buffers(device: torch.device) -> int:
    """Batches whose rows must stay valid: those, and the one that is being computed. A GPU hands over copies."""
    return 1 if device.type == "cuda" else DEPTH + 2


class Conveyor:
    """`first_layer` of the base model, for messages."""

    def __init__(self, writer: Writer, first_layer: int) -> None:
        self._writer = writer
        self._first_layer = first_layer
        self._thread = ThreadPoolExecutor(1, "clt-writer")
        self._waiting: deque[Future[None]] = deque()
        self._total: Tensor | None = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What was handed over is written, also when the program was interrupted meanwhile."""
        self._thread.shutdown()
        if error is None:
            self.flush()

    def put(self, block: Block, rows: Rows, sums: Tensor) -> None:
        """Rows of a block as they are stored, with their sums: float64 [n, 2, L, D]."""
        self._total = sums if self._total is None else self._total.add_(sums)
        host = Rows(rows.first, _to_host(rows.resid_mid), _to_host(rows.mlp_out))
        copied = torch.cuda.current_stream(rows.mlp_out.device).record_event() if rows.mlp_out.is_cuda else None
        self._submit(self._write, block, host, copied)

    def finish(self, block: Block) -> None:
        """All rows of the block were put."""
        assert self._total is not None
        total, self._total = finite(self._total, self._first_layer), None
        self._submit(self._writer.finish_block, block, total)

    def flush(self) -> None:
        """Until everything that was handed over is written."""
        self._wait(0)

    def _write(self, block: Block, rows: Rows, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._writer.write(block.split, rows)

    def _submit(self, work: Callable[..., None], *arguments: object) -> None:
        self._wait(DEPTH)
        self._waiting.append(self._thread.submit(self._unless_failed, work, *arguments))

    def _unless_failed(self, work: Callable[..., None], *arguments: object) -> None:
        """Nothing is written behind what could not be: a block must not count as done then."""
        if not self._failed:
            self._failed = True
            work(*arguments)
            self._failed = False

    def _wait(self, n: int) -> None:
        """Until at most n pieces of work wait."""
        while len(self._waiting) > n:
            self._waiting.popleft().result()


def _to_host(values: Tensor) -> Tensor:
    """Started, not finished, for CUDA; torch keeps pinned memory for the next batch."""
    if not values.is_cuda:
        return values.cpu()
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
