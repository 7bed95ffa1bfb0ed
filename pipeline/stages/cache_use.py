"""Which runs use which cache: what the commands on caches ask before they answer, or remove anything.

A finished run names its cache's key in final/config.json, an unfinished one in its newest checkpoint. Before the first
checkpoint there is config.yaml alone: it names the options, and every cache of the same options counts as used; or
`cache.path`, and every cache of that name does.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.asking import asked
from pipeline.data.inventory import Found
from pipeline.data.layout import MERGED, targets_of
from pipeline.data.options import DatasetOptions, Targets
from pipeline.errors import UserError
from pipeline.plain import from_plain
from pipeline.train import checkpoint

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Use = str | Json
"""The key of a cache, or the options of one: model, dataset, codec, targets; or its path."""


class Runs:
    """The runs under a directory, read once; sweeps (runs/NAME/0, 1, ...) included."""

    def __init__(self, runs_dir: Path) -> None:
        self.unreadable: list[Path] = []
        """Runs whose files are damaged: whether they use a cache is not known."""
        self._uses: list[tuple[str, Use]] = []
        for directory in _directories(runs_dir):
            try:
                use = _use(directory)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
                logger.warning("%s: its settings cannot be read; whether it uses a cache is not known", directory)
                self.unreadable.append(directory)
            else:
                self._uses += [] if use is None else [(str(directory.relative_to(runs_dir)), use)]

    def of(self, found: Found) -> list[str]:
        """Names of the runs that use a cache."""
        return [name for name, use in self._uses if _names(use, found)]

    def refuse(self, found: list[Found]) -> None:
        """Raises UserError when a run uses one of these caches, or cannot be read."""
        for cache in found:
            if names := self.of(cache):
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                raise UserError(f"{cache.path} is used by {shown}; --force removes it all the same")
        if self.unreadable:
            names = [str(path) for path in self.unreadable]
            raise UserError(f"whether {', '.join(names)} uses a cache is not known; mend that, or use --force")


def _directories(runs_dir: Path) -> Iterator[Path]:
    found = {file.parent for file in runs_dir.rglob("config.yaml")}
    found |= {file.parent.parent for file in runs_dir.rglob("final/config.json")}
    return iter(sorted(found - {runs_dir}))


def _use(directory: Path) -> Use | None:
    """None for a run of another kind."""
    final = directory / "final" / "config.json"
    if final.exists():
        return str(json.loads(final.read_bytes())["cache"]["key"])
    last = checkpoint.newest(directory)
    if last is not None and (key := json.loads((last / "state.json").read_bytes()).get("cache")):
        return str(key)
    settings = yaml.safe_load((directory / "config.yaml").read_bytes())
    if not {"model", "dataset", "cache"} <= settings.keys():
        return None
    if settings["cache"].get("path") is not None:
        return {"path": settings["cache"]["path"]}
    dataset = asked(from_plain(DatasetOptions, settings["dataset"]))
    cache = settings["cache"]
    return {
        "model": settings["model"],
        "dataset": dataset,
        "codec": cache["codec"],
        "targets": cache.get("targets", Targets.stored),
    }


def _names(use: Use, found: Found) -> bool:
    if isinstance(use, str):
        return use == found.key
    if "path" in use:
        return Path(use["path"]).name == found.path.name
    request = found.request
    if request is None or MERGED in request:
        return False
    same_model = all(use["model"].get(key) == value for key, value in request["model"].items())
    same_form = use["codec"] == request["codec"] and use["targets"] == targets_of(request)
    return same_model and use["dataset"] == request["dataset"] and same_form
