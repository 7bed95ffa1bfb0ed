"""Checkpoints that are written while the training goes on.

    with Writer(directory, mesh, shard, beside=True) as writer:
        state = writer.load(path, model, optimizer)             to go on
        writer.check()                                          before each step
        writer.save(model, optimizer, state, about, then)       where a checkpoint is due
        writer.wait()                                           at the end, and before anyone reads checkpoints

`save` copies the tensors to the CPU's memory, which is kept for the next time, and returns; a thread writes them. From
a GPU they go into pinned memory, and the thread waits for the end of the copy. The files are those of
`checkpoint.save`, to the byte. The thread calls no collective: ranks learn from the file system that others are done.
"""

import contextlib
import logging
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.dist.mesh import Mesh, alone
from pipeline.dist.shard import Shard, whole
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Saving, State
from pipeline.train.options import AsyncCheckpoints

logger = logging.getLogger(__name__)


def beside(asked: AsyncCheckpoints, device: torch.device) -> bool:
    """Whether `train.async_checkpoints` means so: by itself where the weights are copied to the CPU's memory anyway."""
    return asked is AsyncCheckpoints.always or (asked is AsyncCheckpoints.auto and device.type == "cuda")


class Writer:
    """One for each rank of a run. At most one checkpoint is under way.

    beside: on a thread, from a copy, which takes as much memory of the CPU as weights and optimiser state together (12
    bytes a parameter with Adam), from the first checkpoint on. Else `save` returns when the checkpoint is there.
    """

    def __init__(
        self, directory: Path, mesh: Mesh | None = None, shard: Shard | None = None, beside: bool = False
    ) -> None:
        self._directory, self._mesh, self._shard, self._beside = directory, mesh or alone(), shard, beside
        self._thread: ThreadPoolExecutor | None = None
        self._at_work: Future[None] | None = None
        self._unmet = False
        self._stop = Event()
        self._copies = Copies()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Without an error what is under way is waited for. After one, one process still writes it; of several ranks
        nobody waits for the others, and it counts for nothing where they have not written."""
        try:
            if error is None:
                self.wait()
        finally:
            self.close()

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that removes checkpoints and clears away what was left half written."""
        return self._mesh.speaks

    def load(self, path: Path, model: Transcoder, optimizer: Optimizer) -> State:
        """`checkpoint.load` of this rank's rows. All ranks load the same one."""
        return checkpoint.load(path, model, optimizer, self._mesh, self._shard)

    def save(
        self,
        model: Transcoder,
        optimizer: Optimizer,
        state: State,
        about: dict[str, object],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Write checkpoints/step_N; the one before is waited for. All ranks call it at the same step.

        then: called when it bears its name, on rank 0 alone and perhaps on the thread: removes what is not to be kept.
        UserError as `check`.
        """
        self.wait()
        shard = self._shard or whole(model.d_features)
        saving = checkpoint.prepared(self._directory, model, optimizer, state, about, self._mesh, shard)
        self._unmet = True
        if not self._beside:
            self._write(saving, then)
            self.wait()
            return
        copied, ready = self._copies.of(saving)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "clt-checkpoint")
        self._at_work = self._thread.submit(self._write, copied, then, ready)

    def check(self) -> None:
        """Raise what the thread has raised since: UserError where the disk cannot hold the checkpoint, or, on rank 0,
        another rank's. No collective; costs nothing."""
        if self._at_work is not None and self._at_work.done():
            done, self._at_work = self._at_work, None
            done.result()

    def wait(self) -> None:
        """Until the last checkpoint bears its name, for every rank; all ranks call it at the same moment. Raises as
        `check`."""
        if self._at_work is not None:
            done, self._at_work = self._at_work, None
            done.result()
        if self._unmet:
            self._unmet = False
            self._mesh.world.barrier()

    def settle(self) -> None:
        """Until this rank has no part in a checkpoint under way; what went wrong with it is raised or said by others.
        For whoever is about to give up, and says which checkpoint is the last. No collective."""
        if self._at_work is not None:
            futures.wait([self._at_work])

    def close(self) -> None:
        """Ends the thread: after what it has to write itself, not after what other ranks have. Its error, which nobody
        asks for any more, is logged."""
        self._stop.set()
        if self._thread is not None:
            self._thread.shutdown()
        if self._at_work is not None and (error := self._at_work.exception()) is not None:
            logger.error("the last checkpoint is not there: %s", error)
        self._at_work = None

    def _write(self, saving: Saving, then: Callable[[], None] | None, ready: Callable[[], None] | None = None) -> None:
        if ready is not None:
            ready()
        if saving.write(self._stop) and then is not None:
            then()


class Copies:
    """Tensors as they are now, in the CPU's memory; there is one copy of each at a time."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Tensor] = {}

    def of(self, saving: Saving) -> tuple[Saving, Callable[[], None]]:
        """The same with copies in the tensors' place -> it, and what waits until they are filled."""
        with contextlib.closing(saving.files) as files:
            copied = [
                (stem, {name: replace(one, tensor=self._copy(stem, name, one.tensor)) for name, one in held.items()})
                for stem, held in files
            ]
        return replace(saving, files=(file for file in copied)), _filled()

    def _copy(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get((stem, name))
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[stem, name] = kept
        # On the stream of the training: what changes the tensor next comes after it.
        return kept.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def _filled() -> Callable[[], None]:
    if not torch.cuda.is_available():
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
