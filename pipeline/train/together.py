"""A directory that several ranks fill at once, and that takes its name when all have.

    .NAME.tmp/    made by rank 0; every rank writes its files, waits until they are on disk, and says so in rank_R.json
    NAME/         rank 0 has found all of those, written the index and renamed

The ranks share a file system and nothing else: once it is begun no collective is called, so that a thread may do it
while a step is taken. A crash at any moment leaves .NAME.tmp, which counts for nothing.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from safetensors import SafetensorError

from pipeline.dist.mesh import Mesh
from pipeline.errors import UserError
from pipeline.files import aside_of, sync
from pipeline.train import row_files
from pipeline.train.row_files import Entries

logger = logging.getLogger(__name__)

POLL_S = 0.02
"""Between two looks for what the others have written; longer while nothing changes, at most `SLOW_S`."""

SLOW_S = 0.5

SLOW_WARNING_S = 60.0
"""After so long rank 0 says whom it waits for."""


class Together:
    """One writing of a directory by `features` x `data` ranks; this is number `rank`."""

    def __init__(self, target: Path, rank: int, features: int, data: int) -> None:
        self.target, self.rank, self.features, self.data = target, rank, features, data
        self.aside = target.with_name(f".{target.name}.tmp")

    @classmethod
    def begin(cls, target: Path, mesh: Mesh) -> "Together":
        """With an empty directory, which rank 0 makes before anyone writes. All ranks of `mesh` call it."""
        made = cls(target, mesh.world.rank, mesh.features.size, mesh.data.size)
        if made.rank == 0:
            shutil.rmtree(made.aside, ignore_errors=True)
            made.aside.mkdir(parents=True)
        mesh.world.barrier()
        return made

    @property
    def n_ranks(self) -> int:
        return self.features * self.data

    def write(self, fill: Callable[[Path], dict[str, Entries]]) -> None:
        """This rank's files. fill: writes them, and returns its part of the index by stem. UserError when the disk
        cannot hold them; rank 0 hears of it."""
        try:
            part = fill(self.aside)
            names = {piece["file"] for entries in part.values() for e in entries.values() for piece in e["pieces"]}
            sync(self.aside / name for name in names)
            self._say({"part": part})
        except (OSError, SafetensorError) as error:
            said = UserError(f"{self.target} could not be written ({error}); free some space and run again")
            self._say_failed(str(said))
            raise said from error

    def finish(self, rest: Callable[[Path], None], stop: Event | None = None) -> bool:
        """Rank 0, after its own `write`: wait for the others, write the index and by `rest` what there is one of, and
        rename. -> False when `stop` was set meanwhile: then nothing is left. UserError where a rank has failed."""
        assert self.rank == 0
        try:
            parts = self._parts(stop)
            if parts is None:
                shutil.rmtree(self.aside, ignore_errors=True)
                return False
            index = row_files.merged(parts, self.features, self.data)
            (self.aside / row_files.INDEX).write_text(json.dumps(index) + "\n")
            rest(self.aside)
            for rank in range(self.n_ranks):
                self._note(rank).unlink()
            sync([*(path for path in self.aside.iterdir() if path.suffix != ".safetensors"), self.aside])
            if self.target.exists():
                shutil.rmtree(self.target)
            self.aside.rename(self.target)
            sync([self.target.parent])
        except OSError as error:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise UserError(f"{self.target} could not be written ({error}); free some space and run again") from error
        except BaseException:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise
        return True

    def _note(self, rank: int) -> Path:
        return self.aside / f"rank_{rank}.json"

    def _say(self, what: dict[str, Any]) -> None:
        # As soon as the note bears its name rank 0 may rename the directory, so that nothing can be synced after that.
        note = self._note(self.rank)
        aside_of(note).write_text(json.dumps(what))
        aside_of(note).replace(note)

    def _say_failed(self, why: str) -> None:
        try:
            self._say({"failed": why})
        except OSError:
            logger.warning("rank 0 cannot be told that %s", why)

    def _parts(self, stop: Event | None) -> list[dict[str, Entries]] | None:
        """Every rank's, in order; None when `stop` was set before the last was there."""
        found: dict[int, dict[str, Entries]] = {}
        begun, pause, warned = time.monotonic(), POLL_S, False
        while len(found) < self.n_ranks:
            # A listing, not a look at each name: a network file system remembers for a while that a name was not there.
            there = set(os.listdir(self.aside))
            new = [r for r in range(self.n_ranks) if r not in found and self._note(r).name in there]
            for rank in new:
                said: dict[str, Any] = json.loads(self._note(rank).read_text())
                if "failed" in said:
                    raise UserError(f"rank {rank}: {said['failed']}")
                found[rank] = said["part"]
            if len(found) == self.n_ranks:
                break
            pause = POLL_S if new else min(2 * pause, SLOW_S)
            if (stop or Event()).wait(pause):
                return None
            if not warned and time.monotonic() - begun > SLOW_WARNING_S:
                warned = True
                left = [str(rank) for rank in range(self.n_ranks) if rank not in found]
                logger.warning("%s: waiting for ranks %s", self.target, ", ".join(left))
        return [found[rank] for rank in range(self.n_ranks)]
