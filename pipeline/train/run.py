"""The run directory: `runs/NAME/`, and what a second start under the same name means."""

import logging
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError
from pipeline.files import aside_of, write_aside
from pipeline.plain import to_plain

logger = logging.getLogger(__name__)

RUNS = Path("runs")

SWEEP = "sweep.yaml"
"""In the directory of a sweep: what its jobs are (`stages/sweep.py`)."""

NO_EFFECT = {
    "cache.dir", "cache.read", "cache.shards_ahead", "cache.local_dir", "cache.local_gb", "newest_cache",
    "train.keep_checkpoints", "train.keep_best", "train.diverged", "train.share_pass", "train.async_checkpoints",
    "experiment", "dry_run", "resume",
    "dist.name", "dist.features", "dist.data", "dist.timeout_s", "dist.world",
    "log.name", "log.project", "log.entity", "log.group", "log.tags", "log.mode", "log.report",
}  # fmt: skip
"""Settings that do not change what a run computes, so they may differ when it is continued."""

ADDED = {
    "dataset.skip_tokens": "0", "train.accumulate": 1, "train.finish": "last", "train.weights": "float32",
    "optim.momentum": 0.95, "optim.weight_decay": 0.0, "optim.clip": None, "train.kernels": "auto",
    "train.sparse": "auto", "log.held_out_every": "auto", "log.held_out_rows": 2048,
    "dist.name": "single", "dist.features": 1, "dist.data": 1, "dist.timeout_s": 600.0, "dist.world": None,
}  # fmt: skip
"""Settings that the config.yaml of an older run lacks, and what they were then."""


def start(name: str, config: Any) -> Path:
    """The directory of run `name`, made when it is new, with its config.yaml.

    config: the command's dataclass. Raises UserError when the name is taken by a run with other settings.
    """
    directory = RUNS / name
    if RUNS.resolve() not in directory.resolve().parents:
        raise UserError(f"name={name!r} is no place under {RUNS}/; use a plain name such as name=demo")
    return begin(directory, config, key="name")


def place(to: str) -> Path:
    """The directory that `to=` means: runs/NAME for a plain name, else the path."""
    return Path(to) if "/" in to else RUNS / to


def begin(directory: Path, config: Any, key: str) -> Path:
    """Make the directory with its config.yaml, or find that it is a run of the same settings. `key` chooses another."""
    file = directory / "config.yaml"
    plain = to_plain(config)
    if file.exists():
        _refuse_difference(directory, key, flatten(yaml.safe_load(file.read_text())), flatten(plain))
    elif directory.exists() and any(not _may_be_there(child, file) for child in directory.iterdir()):
        raise UserError(f"{directory} exists and is no run (it has no config.yaml); choose another {key}=")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write_aside(file, yaml.safe_dump(plain, sort_keys=False).encode())
    return directory


def _may_be_there(child: Path, file: Path) -> bool:
    """In a directory that becomes a run: a sweep's runs, and what a process killed as it writes `file` leaves."""
    return child.name.isdigit() or child.name in {SWEEP, aside_of(file).name}


def finished(directory: Path) -> bool:
    return (directory / "final" / "config.json").exists()


def saved(directory: Path) -> dict[str, Any] | None:
    """The settings of a run that exists, as they stand in config.yaml."""
    file = directory / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.exists() else None


def named(run: str) -> Path:
    """The directory that `run=` means: a path, or the name of a run."""
    return RUNS / run if not Path(run).exists() and (RUNS / run).exists() else Path(run)


def newest() -> Path:
    """The finished run that ended last, sweeps included. UserError when there is none."""
    done = [path.parent.parent for path in (*RUNS.glob("*/final/config.json"), *RUNS.glob("*/*/final/config.json"))]
    if not done:
        raise UserError(
            f"no finished run under {RUNS}/; train one (clt train +experiment=batchtopk_across) or name it with run=DIR"
        )
    return max(done, key=lambda run: (run / "final" / "config.json").stat().st_mtime_ns)


def newest_unfinished() -> Path:
    """The unfinished run that was at work last, sweeps included. UserError when there is none."""
    begun = [path.parent for path in (*RUNS.glob("*/config.yaml"), *RUNS.glob("*/*/config.yaml"))]
    left = [run for run in begun if not finished(run)]
    if not left:
        raise UserError(f"no unfinished run under {RUNS}/, so nothing to continue; leave resume=true out to begin one")
    return max(left, key=_last_change)


def _last_change(run: Path) -> int:
    """When a run last wrote a line or a checkpoint, ns."""
    files = [run / "config.yaml", run / "metrics.jsonl", run / "checkpoints"]
    return max(file.stat().st_mtime_ns for file in files if file.exists())


def name_of(directory: Path) -> str:
    """What `name=` calls it."""
    return str(directory.relative_to(RUNS) if directory.is_relative_to(RUNS) else directory)


def chosen(run: str | None) -> Path:
    """The directory that `run=` means; without it the newest finished run, which is said."""
    if run:
        return named(run)
    found = newest()
    logger.info("no run named: using the newest, %s", found)
    return found


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _refuse_difference(directory: Path, key: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    old = {name: value for name, value in ADDED.items() if name in new} | old
    names = sorted(old.keys() | new.keys())
    differ = [name for name in names if old.get(name) != new.get(name) and name not in NO_EFFECT]
    if differ:
        shown = ", ".join(f"{name}={new.get(name)} (was {old.get(name)})" for name in differ[:6])
        more = f" and {len(differ) - 6} more" if len(differ) > 6 else ""
        raise UserError(f"{directory} was made with other settings: {shown}{more}; choose another {key}=")
