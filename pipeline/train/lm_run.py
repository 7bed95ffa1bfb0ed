"""The working directory of a language model that is being trained, and what a second start of the command means.

    models/.NAME.training/           gone when models/NAME is there
        lock                         held by the process that is at work
        settings.json                the settings that decide the result
        tokenizer/                   the one that was trained or fetched
        packing/                     progress of the packing, its own business
        checkpoints/step_N/
            model.safetensors        weights, float32
            optimizer.safetensors    AdamW's tensors, named <what>/<parameter>
            state.safetensors        torch's random generator
            state.json               step, and the fingerprint of the tokens
            metrics.jsonl            the lines up to here
        metrics.jsonl                the lines so far, to look at while it runs

The order of the contexts is a function of the seed, so the step says where in it training stands. A checkpoint is
written beside its place, synced and renamed. Nothing is pickled.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.errors import UserError
from pipeline.files import atomic_directory, remove_empty, save_tensors, take_lock, write_aside
from pipeline.train import checkpoint
from pipeline.train.optimisers import optimizer_tensors, restore_optimizer
from pipeline.train.run import flatten

logger = logging.getLogger(__name__)

Json = dict[str, Any]

REPORT = "pretrain.json"
"""Of a finished model: what it was made from, and what came out."""
NO_EFFECT = {"lm.checkpoint_every"}
"""Settings that may differ when training goes on."""
PARTS = ("lm", "dataset", "source")


class Work:
    """An unfinished model: its directory, locked until `release` or `discard`, and the lines of its metrics."""

    def __init__(self, to: Path) -> None:
        self.to = to
        self.directory = work_directory(to)
        self.new = [parent for parent in to.parents if not parent.exists()]  # innermost first
        self.lock: int | None = take_lock(self.directory, to)
        self.lines: list[Json] = []
        self.data = ""
        """Fingerprint of the tokens that it is trained on."""

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer"

    @property
    def packing(self) -> Path:
        return self.directory / "packing"

    @property
    def checkpoint(self) -> Path | None:
        """The newest one."""
        return checkpoint.newest(self.directory)

    def log(self, line: Json) -> None:
        """One more line of metrics.jsonl."""
        self.lines.append(line)
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(_line(line))

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write checkpoints/step_N and remove the one before it."""
        weights = dict(model.named_parameters())  # tied ones once
        with atomic_directory(self.directory / "checkpoints" / f"step_{step}") as aside:
            save_tensors(checkpoint.contiguous(weights), aside / "model.safetensors")
            moments = optimizer_tensors(model, optimizer)
            save_tensors(checkpoint.contiguous(moments), aside / "optimizer.safetensors")
            save_tensors({"torch_rng": torch.get_rng_state()}, aside / "state.safetensors")
            (aside / "state.json").write_text(json.dumps({"step": step, "data": self.data}, indent=2) + "\n")
            (aside / "metrics.jsonl").write_text("".join(map(_line, self.lines)))
        checkpoint.prune(self.directory, keep=1)

    @torch.no_grad()
    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore weights, optimiser, random generator and metrics from the newest checkpoint. -> its step, 0 for none.

        Raises UserError when that was trained on other tokens.
        """
        last, self.lines, step = self.checkpoint, [], 0
        if last is not None:
            state = json.loads((last / "state.json").read_text())
            if state["data"] != self.data:
                raise UserError(f"{last}: trained on other tokens than the text gives now; {self._fix()}")
            saved = load_file(last / "model.safetensors")
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
            moments = load_file(last / "optimizer.safetensors")
            restore_optimizer(model, optimizer, moments)
            torch.set_rng_state(load_file(last / "state.safetensors")["torch_rng"])
            self.lines = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
            step = state["step"]
            logger.info("going on from %s", last)
        write_aside(self.directory / "metrics.jsonl", "".join(map(_line, self.lines)).encode())
        return step

    def release(self) -> None:
        """Let another process go on."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def discard(self) -> None:
        """Remove it, and the directories above that it made and that hold nothing."""
        shutil.rmtree(self.directory, ignore_errors=True)
        remove_empty(self.new)
        self.release()

    def _fix(self) -> str:
        return f"choose another to=, or remove {self.directory} to begin again"


def start(to: Path, settings: Json) -> Work | None:
    """The working directory of a new or unfinished model; None when the model is there, made by these settings.

    settings: lm, dataset and source, plain values. Raises UserError when the place is taken by anything else.
    """
    if to.exists():
        if not (to / REPORT).is_file():
            raise UserError(f"to={to} exists already and was not made by clt pretrain; choose another to=")
        made = json.loads((to / REPORT).read_text())
        _refuse_difference(to, "holds a model of", {part: made[part] for part in PARTS}, settings, "choose another to=")
        shutil.rmtree(work_directory(to), ignore_errors=True)
        return None
    work = Work(to)
    try:
        _claim(work, settings)
    except UserError:
        work.release()
        raise
    return work


def work_directory(to: Path) -> Path:
    return to.with_name(f".{to.name}.training")


def _claim(work: Work, settings: Json) -> None:
    """Write settings.json. What was begun with other settings is refused once there is a checkpoint to lose, and
    removed before."""
    file = work.directory / "settings.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    if work.checkpoint is not None:
        fix = f"go on with those, {work._fix()}"
        _refuse_difference(work.directory, "holds an unfinished model of", before, settings, fix)
    elif before != settings:
        for part in (work.tokenizer, work.packing):
            shutil.rmtree(part, ignore_errors=True)
    write_aside(file, (json.dumps(settings, indent=2) + "\n").encode())


def _refuse_difference(place: Path, what: str, old: Json, new: Json, fix: str) -> None:
    before, now = flatten(old), flatten(new)
    differ = [
        key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key) and key not in NO_EFFECT
    ]
    if differ:
        shown = ", ".join(_shown(key, before.get(key), now.get(key)) for key in differ[:6])
        more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise UserError(f"{place} {what} other settings: {shown}{more}; {fix}")


def _shown(key: str, old: object, new: object) -> str:
    part, _, name = key.partition(".")
    return f"the {name.partition('.')[0]}'s files have changed" if part == "source" else f"{key}={new} (was {old})"


def _line(line: Json) -> str:
    return json.dumps(line) + "\n"
