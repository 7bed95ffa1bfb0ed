"""What a run directory says about itself, finished or not, evaluated or not, of this version or an older one."""

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from pipeline.train import run as run_directory
from pipeline.train.run_log import METRICS, whole_lines

Tree = dict[str, Any]

NO_PARAMETERS = ("y_mean", "y_scale", "rank_norms", "offset.")
"""Tensors of a finished transcoder that training did not learn; thresholds are learned by JumpReLU alone."""


@dataclass(frozen=True)
class Run:
    """A run directory as it stood when it was read. Numbers that are not finite are None."""

    directory: Path
    name: str
    """Unique on the page: the directory, from where the runs lie together."""

    settings: Tree
    """config.yaml, flattened: {"optim.lr": 1e-3}."""

    lines: list[Tree]
    """metrics.jsonl."""

    timings: list[Tree]
    """timings.jsonl."""

    final: Tree | None
    """final/config.json; None while the run goes on."""

    metrics: Tree | None
    """eval/metrics.json; None before `clt eval`."""

    others: dict[str, Tree]
    """By data set: eval/metrics-DATASET.json, of other text."""

    parameters: int | None
    """Learned numbers; None where neither a finished transcoder nor a checkpoint is there."""

    @property
    def arch(self) -> str:
        return str(self.settings.get("arch.name"))

    @property
    def activation(self) -> str:
        return str(self.settings.get("activation.name"))

    @property
    def seed(self) -> Any:
        return self.settings.get("train.seed")

    @property
    def state(self) -> str:
        """evaluated, finished (not evaluated), or how far training is."""
        if self.metrics is not None:
            return "evaluated"
        if self.final is not None:
            return "finished, not evaluated"
        step = f"at step {self.lines[-1]['step']:,}" if self.lines else "nothing logged yet"
        return f"unfinished, {step}"

    def number(self, path: str) -> float | None:
        """A number of eval/metrics.json by its dotted path; None where it is missing, null or no number."""
        found = lookup(self.metrics, path)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

    def numbers(self, path: str) -> list[float | None] | None:
        """A list of numbers of eval/metrics.json; None where there is none."""
        found = lookup(self.metrics, path)
        return found if isinstance(found, list) and all(isinstance(n, int | float | None) for n in found) else None

    def tokens(self) -> int | None:
        """Tokens trained on so far."""
        return self.lines[-1].get("tokens") if self.lines else None

    def seconds(self) -> float | None:
        """Time in training steps, from the log. Steps that a resumed run took twice count once."""
        by_step = {line["step"]: line["step_ms"] for line in self.timings if line.get("step_ms") is not None}
        steps = sorted(by_step)
        spent = [(step - before) * by_step[step] / 1e3 for before, step in pairwise([0, *steps])]
        return sum(spent) if spent else None

    def memory_mb(self) -> float | None:
        """The most that training took, where it was noted: of the GPU, or of the whole process."""
        noted = [line["memory_mb"] for line in self.timings if line.get("memory_mb") is not None]
        return max(noted, default=None)

    def tokens_per_second(self) -> float | None:
        """Tokens over the time in training steps."""
        tokens, seconds = self.tokens(), self.seconds()
        return tokens / seconds if tokens and seconds else None


def read(directories: Sequence[Path]) -> list[Run]:
    """Every directory as a Run, in the order given."""
    return [_read(directory, name) for directory, name in zip(directories, names(directories), strict=True)]


def is_run(directory: Path) -> bool:
    """Whether `clt train` (or convert) has begun a run there."""
    return (directory / "config.yaml").is_file() or (directory / "final" / "config.json").is_file()


def names(directories: Sequence[Path]) -> list[str]:
    """Short and different: without the path that all share."""
    paths = [Path(os.path.normpath(directory.absolute())) for directory in directories]
    shared = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [path.relative_to(shared).as_posix() for path in paths]


def lookup(tree: Any, path: str) -> Any:
    """The value at "a.b.c", None where any part of the way is missing."""
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _read(directory: Path, name: str) -> Run:
    final = _json(directory / "final" / "config.json")
    saved = directory / "config.yaml"
    settings = _yaml(saved) if saved.is_file() else {key: final[key] for key in ("arch", "activation") if final}
    return Run(
        directory=directory,
        name=name,
        settings=run_directory.ADDED | run_directory.flatten(settings),
        lines=_lines(directory / METRICS),
        timings=_lines(directory / "timings.jsonl"),
        final=final,
        metrics=_json(directory / "eval" / "metrics.json"),
        others=_others(directory / "eval"),
        parameters=_parameters(directory),
    )


def _yaml(file: Path) -> Tree:
    return yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def _json(file: Path) -> Tree | None:
    return _finite(json.loads(file.read_text())) if file.is_file() else None


def _others(place: Path) -> dict[str, Tree]:
    found = {file.stem.removeprefix("metrics-"): _json(file) for file in sorted(place.glob("metrics-*.json"))}
    return {name: metrics for name, metrics in found.items() if metrics is not None}


def _lines(file: Path) -> list[Tree]:
    return [_finite(json.loads(line)) for line in whole_lines(file)] if file.is_file() else []


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON knows none of, as None."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parameters(directory: Path) -> int | None:
    """From the shapes in a safetensors header, or an index, so that no weight is read."""
    finished = _sizes(directory / "final", "transcoder")
    if finished:
        final = _json(directory / "final" / "config.json") or {}
        left_out = NO_PARAMETERS + (() if lookup(final, "activation.name") == "jumprelu" else ("threshold",))
        return sum(n for name, n in finished.items() if not name.startswith(left_out))
    checkpoints = sorted(path for path in directory.glob("checkpoints/step_*") if _sizes(path, "model"))
    return sum(_sizes(checkpoints[-1], "model").values()) if checkpoints else None


def _sizes(folder: Path, stem: str) -> dict[str, int]:
    """Elements of each tensor of a safetensors file, or of several with an index; {} where there is neither."""
    file, index = folder / f"{stem}.safetensors", folder / "index.json"
    if index.is_file():
        entries = json.loads(index.read_text())["files"][stem]
        return {name: math.prod(entry["shape"]) for name, entry in entries.items()}
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
