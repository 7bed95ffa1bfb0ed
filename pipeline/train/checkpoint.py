"""Checkpoints: everything that an exact continuation needs, as safetensors and JSON. Nothing is pickled.

    checkpoints/step_N/
        model.safetensors        weights (with signsgd the averaged ones) and buffers, in the transcoder's units
        optimizer.safetensors    what the optimiser remembers (`train/optimisers.py`)
        state.safetensors        tokens since each feature fired, random generators, the controller's numbers, and the
                                 small tensors of whatever else remembers something (`State.more`), by their names
        state.json               step, the cache's key, where it was scored the FVU on held-out text
        metrics.jsonl            what had been logged by then

Several ranks write the same tensors together, by the rows of their features, into files of their own (`model-00001-of-
00004.safetensors`, ...; `train/row_files.py`), and any number of ranks reads either.

The data position is the step: batch n of a run is a function of the seed and n (`data/loader.py`). A checkpoint is
written beside its place, synced and renamed, so that whatever bears its name is whole.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.dist.mesh import Mesh, alone
from pipeline.dist.shard import Shard, whole
from pipeline.files import atomic_directory, save_tensors
from pipeline.train import row_files
from pipeline.train.checkpoint_rows import COUNTERS, MODEL, OPTIMIZER, STATE, Layout, Parts, check_ranks
from pipeline.train.controller import Steering
from pipeline.train.optimisers import averaged, optimizer_tensors, restore_optimizer
from pipeline.train.row_files import Held, Stored
from pipeline.train.run_log import METRICS
from pipeline.train.together import Together

SCORE = "held_out_fvu"
"""What the best checkpoints have the least of; in state.json."""

STEERING = "steering/"
"""What the names of the controller's numbers begin with."""


@dataclass
class State:
    """What changes during a run, weights and optimiser apart."""

    step: int
    """Optimiser steps done, which is also the number of batches consumed."""

    tokens_since_fired: Tensor
    """[L, F] int64"""

    steering: Steering | None = None
    """Where a controller sets lambda of the sparsity penalty."""

    more: dict[str, Tensor] = field(default_factory=dict)
    """Small tensors of whatever else remembers something from step to step, named owner/what ("density/share"), on the
    CPU. The owner puts its own here before a save and takes them back after a load; dtypes and bits survive."""

    @property
    def log_lambda(self) -> float | None:
        """Of the sparsity penalty, where a controller steers it."""
        return None if self.steering is None else self.steering.log_lambda


def save(
    directory: Path,
    model: Transcoder,
    optimizer: Optimizer,
    state: State,
    about: dict[str, object],
    mesh: Mesh | None = None,
    shard: Shard | None = None,
) -> Path:
    """Write checkpoints/step_N of a run directory and wait until it is there. `about` goes into state.json; a copy of
    metrics.jsonl lies beside it, from which whatever happens to that file is mended. All ranks of `mesh` call it at the
    same step, with the transcoder that holds the features of `shard`; the directory is one that all see.

    UserError when the disk cannot hold it. `checkpoint_writer.Writer` does the same beside the training.
    """
    saving = prepared(directory, model, optimizer, state, about, mesh, shard)
    saving.write()
    if mesh is not None:
        mesh.world.barrier()
    return saving.target


Files = Generator[tuple[str, dict[str, Held]], None, None]
"""(stem, tensors): of the transcoder while the optimiser's averaged weights are in it, then the others'."""


@dataclass
class Saving:
    """A checkpoint that is to be written: `files` are read once, in order."""

    target: Path
    files: Files
    texts: dict[str, bytes]
    together: Together | None
    """Where several ranks write it."""

    def write(self, stop: Event | None = None) -> bool:
        """What this rank has to write; on rank 0 it lasts until the others have written too, or `stop` is set: then
        there is no checkpoint. -> whether this rank made it appear."""
        if self.together is None:
            with atomic_directory(self.target) as aside, closing(self.files) as files:
                for stem, held in files:
                    tensors = {name: one.tensor for name, one in held.items()}
                    save_tensors(contiguous(tensors), aside / f"{stem}.safetensors")
                self._write_texts(aside)
            return True
        rank, n = self.together.rank, self.together.n_ranks
        with closing(self.files) as files:
            self.together.write(lambda at: {stem: row_files.write(at, stem, held, rank, n) for stem, held in files})
        return rank == 0 and self.together.finish(self._write_texts, stop)

    def _write_texts(self, folder: Path) -> None:
        for name, text in self.texts.items():
            (folder / name).write_bytes(text)


def prepared(
    directory: Path,
    model: Transcoder,
    optimizer: Optimizer,
    state: State,
    about: dict[str, object],
    mesh: Mesh | None = None,
    shard: Shard | None = None,
) -> Saving:
    """What `save` writes. All ranks make room for it together."""
    mesh, shard = mesh or alone(), shard or whole(model.d_features)
    target = directory / "checkpoints" / f"step_{state.step}"
    texts = {"state.json": (json.dumps({"step": state.step, **about}, indent=2) + "\n").encode()}
    if (directory / METRICS).exists():
        texts[METRICS] = (directory / METRICS).read_bytes()
    together = Together.begin(target, mesh) if mesh.world.size > 1 else None
    return Saving(target, _files(model, optimizer, state, Layout(model, mesh, shard)), texts, together)


def _files(model: Transcoder, optimizer: Optimizer, state: State, layout: Layout) -> Files:
    """By stem what this rank writes."""
    named = {MODEL: model.state_dict(), OPTIMIZER: optimizer_tensors(model, optimizer), STATE: _state_tensors(state)}
    mine = layout.mine(named)

    def held(stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Held]:
        return {name: layout.held(stem, name, tensors[name]) for name in tensors if (stem, name) in mine}

    with averaged(optimizer):
        yield MODEL, held(MODEL, model.state_dict())
    yield OPTIMIZER, held(OPTIMIZER, optimizer_tensors(model, optimizer))
    yield STATE, held(STATE, named[STATE])


def load(
    checkpoint: Path, model: Transcoder, optimizer: Optimizer, mesh: Mesh | None = None, shard: Shard | None = None
) -> State:
    """Restore model, optimiser and random generators in place, and return the rest: of a checkpoint of any number of
    ranks the rows of `shard`. What is of a rank alone comes from rank 0 where the ranks are others now. UserError for
    moments that several feature ranks cannot share."""
    layout = Layout(model, mesh or alone(), shard or whole(model.d_features))
    with (
        Stored(checkpoint, MODEL) as weights,
        Stored(checkpoint, OPTIMIZER) as moments,
        Stored(checkpoint, STATE) as own,
    ):
        check_ranks(moments, layout, checkpoint)
        model.load_state_dict(dict(Parts(weights, MODEL, layout)))
        restore_optimizer(model, optimizer, Parts(moments, OPTIMIZER, layout))
        tensors = {name: tensor.clone() for name, tensor in Parts(own, STATE, layout).items()}
    torch.set_rng_state(tensors.pop("torch_rng"))
    if "cuda_rng" in tensors:
        torch.cuda.set_rng_state(tensors.pop("cuda_rng"), model.b_enc.device)
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    fired = tensors.pop(COUNTERS).to(model.b_enc.device)
    own_names = [name for name in tensors if name.startswith(STEERING)]
    steering = {name.removeprefix(STEERING): float(tensors.pop(name)) for name in own_names}
    return State(step, fired, Steering(**steering) if steering else None, tensors)


def _state_tensors(state: State) -> dict[str, Tensor]:
    own = {COUNTERS: state.tokens_since_fired, "torch_rng": torch.get_rng_state()}
    if state.tokens_since_fired.is_cuda:
        own["cuda_rng"] = torch.cuda.get_rng_state(state.tokens_since_fired.device)
    if state.steering is not None:
        numbers = dataclasses.asdict(state.steering)
        own |= {STEERING + name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    assert not own.keys() & state.more.keys(), "a name of State.more is taken"
    return own | state.more


def newest(directory: Path, before: int | None = None) -> Path | None:
    """The checkpoint with the most steps in a run directory; of those with at most `before` steps."""
    found = [path for path in _all(directory) if before is None or _step(path) <= before]
    return found[-1] if found else None


def best(directory: Path, n: int = 1) -> list[Path]:
    """The n checkpoints of the lowest score, the best first; of equal ones the earlier."""
    scores = {path: json.loads((path / "state.json").read_text()).get(SCORE) for path in _all(directory)}
    return sorted((path for path in scores if scores[path] is not None), key=lambda path: scores[path])[:n]


def prune(directory: Path, keep: int, keep_best: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints and the best `keep_best`."""
    found = _all(directory)
    kept = {*found[-keep:], *(best(directory, keep_best) if keep_best else [])}
    for old in found:
        if old not in kept:
            # Under its name, what is half removed would pass for a checkpoint.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))


def tidy(directory: Path) -> None:
    """Remove what a process that was killed left of checkpoints half written or half removed."""
    for left in (directory / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(left)


def _all(directory: Path) -> list[Path]:
    named = (directory / "checkpoints").glob("step_*")
    return sorted((path for path in named if re.fullmatch(r"step_\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them."""
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
