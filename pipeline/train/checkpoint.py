"""Checkpoints: everything that an exact continuation needs, as safetensors and JSON. Nothing is pickled.

    checkpoints/step_N/
        model.safetensors        weights (with signsgd the averaged ones) and buffers, in the transcoder's units
        optimizer.safetensors    what the optimiser remembers (`train/optimisers.py`)
        state.safetensors        tokens since each feature fired, random generators, the controller's numbers, and the
                                 small tensors of whatever else remembers something (`State.more`), by their names
        state.json               step, the cache's key, where it was scored the FVU on held-out text
        metrics.jsonl            what had been logged by then

The data position is the step: batch n of a run is a function of the seed and n (`data/loader.py`). A checkpoint is
written beside its place, synced and renamed, so that whatever bears its name is whole.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.files import atomic_directory
from pipeline.train.controller import Steering
from pipeline.train.optimisers import averaged, optimizer_tensors, restore_optimizer
from pipeline.train.run_log import METRICS

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
    directory: Path, model: Transcoder, optimizer: torch.optim.Optimizer, state: State, about: dict[str, object]
) -> Path:
    """Write checkpoints/step_N of a run directory. `about` goes into state.json; a copy of metrics.jsonl lies beside
    it, from which whatever happens to that file is mended."""
    target = directory / "checkpoints" / f"step_{state.step}"
    with atomic_directory(target) as aside:
        with averaged(optimizer):
            save_file(contiguous(model.state_dict()), aside / "model.safetensors")
        save_file(contiguous(optimizer_tensors(model, optimizer)), aside / "optimizer.safetensors")
        save_file(contiguous(_state_tensors(state)), aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": state.step, **about}, indent=2) + "\n")
        if (directory / METRICS).exists():
            shutil.copyfile(directory / METRICS, aside / METRICS)
    return target


def load(checkpoint: Path, model: Transcoder, optimizer: torch.optim.Optimizer) -> State:
    """Restore model, optimiser and random generators in place, and return the rest."""
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    restore_optimizer(model, optimizer, load_file(checkpoint / "optimizer.safetensors"))
    tensors = load_file(checkpoint / "state.safetensors")
    torch.set_rng_state(tensors.pop("torch_rng"))
    if "cuda_rng" in tensors:
        torch.cuda.set_rng_state(tensors.pop("cuda_rng"), model.b_enc.device)
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    fired = tensors.pop("tokens_since_fired").to(model.b_enc.device)
    own = [name for name in tensors if name.startswith(STEERING)]
    steering = {name.removeprefix(STEERING): float(tensors.pop(name)) for name in own}
    return State(step, fired, Steering(**steering) if steering else None, tensors)


def _state_tensors(state: State) -> dict[str, Tensor]:
    own = {"tokens_since_fired": state.tokens_since_fired, "torch_rng": torch.get_rng_state()}
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
