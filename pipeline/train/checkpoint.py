"""Checkpoints: everything that an exact continuation needs, as safetensors and JSON. Nothing is pickled.

    checkpoints/step_N/
        model.safetensors        weights and buffers of the transcoder, in the transcoder's units
        optimizer.safetensors    the optimiser's tensors, named <what>/<parameter>
        state.safetensors        tokens since each feature fired, the random generator, the controller's numbers
        state.json               step, tokens, the cache's key

The data position is the step: batch n of a run is a function of the seed and n (`data/loader.py`). A checkpoint is
written beside its place, synced and renamed, so that whatever bears its name is whole.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.arch.base import Transcoder
from pipeline.files import atomic_directory
from pipeline.train.controller import Steering

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

    @property
    def log_lambda(self) -> float | None:
        """Of the sparsity penalty, where a controller steers it."""
        return None if self.steering is None else self.steering.log_lambda


def save(
    directory: Path, model: Transcoder, optimizer: torch.optim.Optimizer, state: State, about: dict[str, object]
) -> Path:
    """Write checkpoints/step_N of a run directory. `about` goes into state.json."""
    target = directory / "checkpoints" / f"step_{state.step}"
    tensors = {"tokens_since_fired": state.tokens_since_fired, "torch_rng": torch.get_rng_state()}
    if state.steering is not None:
        for name, value in dataclasses.asdict(state.steering).items():
            tensors[STEERING + name] = torch.tensor(value, dtype=torch.float64)
    with atomic_directory(target) as aside:
        save_file(contiguous(model.state_dict()), aside / "model.safetensors")
        save_file(contiguous(optimizer_tensors(model, optimizer)), aside / "optimizer.safetensors")
        save_file(contiguous(tensors), aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": state.step, **about}, indent=2) + "\n")
    return target


def load(checkpoint: Path, model: Transcoder, optimizer: torch.optim.Optimizer) -> State:
    """Restore model, optimiser and random generator in place, and return the rest."""
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    restore_optimizer(model, optimizer, load_file(checkpoint / "optimizer.safetensors"))
    tensors = load_file(checkpoint / "state.safetensors")
    torch.set_rng_state(tensors["torch_rng"])
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    steering = {name.removeprefix(STEERING): float(t) for name, t in tensors.items() if name.startswith(STEERING)}
    tokens_since_fired = tensors["tokens_since_fired"].to(model.b_enc.device)
    return State(step, tokens_since_fired, Steering(**steering) if steering else None)


def newest(directory: Path) -> Path | None:
    """The checkpoint with the most steps in a run directory."""
    found = _all(directory)
    return found[-1] if found else None


def prune(directory: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in _all(directory)[:-keep]:
        shutil.rmtree(old)


def _all(directory: Path) -> list[Path]:
    named = [
        (int(m[1]), p) for p in (directory / "checkpoints").glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))
    ]
    return [path for _, path in sorted(named)]


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them."""
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments, as moment/parameter."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{what}/{names[parameter]}": torch.as_tensor(tensor)
        for parameter, moments in optimizer.state.items()
        for what, tensor in moments.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, tensor in tensors.items():
        what, name = key.split("/", 1)
        parameter = parameters[name]
        # Step counters stay where the optimiser put them: on the CPU unless it is fused on a GPU.
        device = parameter.device if tensor.dim() or optimizer.defaults.get("fused") else tensor.device
        optimizer.state[parameter][what] = tensor.to(device)
