"""What the commands have in common: their options, and how they start."""

import ctypes
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


class Cfg(StrEnum):
    job = "job"
    hydra = "hydra"
    all = "all"


class Info(StrEnum):
    all = "all"
    config = "config"
    defaults = "defaults"
    defaults_tree = "defaults-tree"
    plugins = "plugins"
    searchpath = "searchpath"


def _complete(ctx: typer.Context, incomplete: str) -> list[str]:
    """Overrides that continue what is typed. bash cuts words at `=` and replaces only the piece after it."""
    from pipeline.config import complete

    command = ctx.command_path.split()  # clt, bench, extract
    stage = "_".join(command[1:])
    words = [str(word) for word in ctx.params.get("overrides") or []]
    if "COMP_WORDS" not in os.environ:
        return complete(stage, words, incomplete)
    pieces = os.environ["COMP_WORDS"].splitlines()[len(command) : int(os.environ["COMP_CWORD"]) + 1]
    glued = " ".join(pieces).replace(" = ", "=").replace(" =", "=").split(" ")
    *words, typed = glued
    cut = typed.rfind("=") + 1
    return [found[cut:] for found in complete(stage, words, typed)]


def _complete_runs(ctx: typer.Context, incomplete: str) -> list[str]:
    """Directories that begin so, under runs/ where no other is named; and settings."""
    folder, _, start = incomplete.rpartition("/")
    at = Path(folder or ("runs" if not incomplete.startswith("/") else "/"))
    found = [path for path in sorted(at.glob(f"{start}*")) if path.is_dir()] if "=" not in incomplete else []
    return [*map(str, found), *_complete(ctx, incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="OVERRIDE",
        help="Settings: group=choice, key=value, +experiment=name. --cfg job shows them all.",
        show_default=False,
        autocompletion=_complete,
    ),
]
Runs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN",
        help="Run directories, names of runs, directories of runs; settings (key=value) among them.",
        show_default=False,
        autocompletion=_complete_runs,
    ),
]
Multirun = Annotated[bool, typer.Option("--multirun", "-m", help="Run every combination of a=1,2 b=x,y.")]
ShowCfg = Annotated[Cfg | None, typer.Option("--cfg", "-c", help="Print the configuration and leave.")]
Resolve = Annotated[bool, typer.Option("--resolve", help="With --cfg: resolve ${...}.")]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", "-cd", help="Folder with YAML files of your own.")]
ConfigName = Annotated[str | None, typer.Option("--config-name", "-cn", help="Root YAML to use instead.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, write nothing.")]
ShowInfo = Annotated[Info | None, typer.Option("--info", help="Print what Hydra knows and leave.")]


def launch(stage: str, overrides: list[str] | None, **flags: Any) -> None:
    """Run a stage with its settings, and leave with its exit code."""
    _set_environment()
    from pipeline import config

    raise typer.Exit(config.launch(stage, config.Request(overrides=tuple(overrides or ()), **flags)))


def answer(work: Callable[[], str]) -> None:
    """What is asked for goes to stdout; what is said on the way, and what is wrong, to stderr."""
    _set_environment()
    from pipeline.config import attempt

    raise typer.Exit(attempt(lambda: typer.echo(work())))


def _keep_freed_memory() -> None:
    """Tell glibc to hand freed tensors to the next ones. By default it gives those of some MB back to the system, which
    clears their pages again at each use: 12,000 page faults a step of 512 rows of 12 x 768, a third of its CPU time."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that it takes
        library.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _set_environment() -> None:
    # Read by OpenMP when torch is loaded. Threads that spin while they wait take the core from the one that works: with
    # one other busy process on two cores, training went from 2,000 to 9,000 tokens a second.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The hub's client announces every failed request; what becomes of it is said once, in the stage's own words.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    _keep_freed_memory()
