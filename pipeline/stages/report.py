"""`clt report`: runs -> one page and a CSV about them.

clt report runs/demo
clt report runs/world
clt report demo runs/sweep/3 to=two.html report.baseline=demo
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.stages.options import ReportConfig
from pipeline.train import run as runs
from pipeline.web import images, report, sweeps
from pipeline.web.runs import is_run

logger = logging.getLogger(__name__)

PAGE = "report.html"


def run(cfg: ReportConfig) -> Path:
    """Write the page, the CSV beside it and, where they are asked for, images. -> the page"""
    directories = chosen(cfg.runs)
    baseline = None if cfg.report.baseline is None else _baseline(cfg.report.baseline, directories)
    page = _place(cfg, directories)
    if cfg.report.resamples < 0:
        raise UserError(f"report.resamples={cfg.report.resamples} must be 0 (no intervals of differences) or more")
    made = report.compose(directories, baseline, cfg.report.resamples)
    drawn = images.write(made.figures, page.with_name(f"{page.stem}-plots")) if cfg.report.png else []
    report.write(made, page)
    beside = [page.with_suffix(".csv").name, *([f"{len(drawn)} images in {drawn[0].parent.name}/"] if drawn else [])]
    logger.info("%s (%.1f MB), beside it %s", page, page.stat().st_size / 1e6, ", ".join(beside))
    logger.info("it opens in any browser, without a network: %s", page.resolve().as_uri())
    return page


def chosen(words: Sequence[str]) -> list[Path]:
    """The run directories that the words mean: runs, or directories whose children are runs; none: the newest run.

    Raises UserError for what is neither.
    """
    found = [directory for word in words for directory in _meant(word)] if words else [_newest()]
    by_place = {directory.resolve(): directory for directory in found}
    return list(by_place.values())


def _meant(word: str) -> list[Path]:
    directory = runs.named(word)
    if not directory.is_dir():
        known = sorted(path.name for path in runs.RUNS.glob("*") if path.is_dir())
        there = f"there are {', '.join(known[:8])}" if known else "train one with clt train"
        raise UserError(f"no run {word}, here or under {runs.RUNS}/; {there}")
    if is_run(directory):
        return [directory]
    children = sorted((path for path in directory.iterdir() if path.is_dir() and is_run(path)), key=_natural)
    if not children and (causes := sweeps.failures(directory)):
        raise UserError(f"{directory}: every job of this sweep failed ({'; '.join(causes)}); mend that and sweep again")
    if not children:
        raise UserError(
            f"{directory} is no run (it has no config.yaml) and holds none; name a directory that clt train made, or "
            "one of a sweep"
        )
    return children


def _newest() -> Path:
    """The run that was begun or worked on last, finished or not."""
    found = [path.parent for path in (*runs.RUNS.glob("*/config.yaml"), *runs.RUNS.glob("*/*/config.yaml"))]
    if not found:
        raise UserError(f"no run under {runs.RUNS}/; train one (clt train +experiment=batchtopk_across) or name one")

    def touched(directory: Path) -> int:
        files = [directory / name for name in ("config.yaml", "metrics.jsonl", "final/config.json")]
        return max(file.stat().st_mtime_ns for file in files if file.exists())

    newest = max(found, key=touched)
    logger.info("no run named: using the newest, %s", newest)
    return newest


def _baseline(word: str, directories: Sequence[Path]) -> Path:
    """One of the runs, by its directory or the end of its name."""
    meant = runs.named(word).resolve()
    found = [path for path in directories if path.resolve() == meant or path.name == word]
    if len(found) != 1:
        choices = ", ".join(path.name for path in directories[:8])
        raise UserError(f"report.baseline={word} is none of the runs on the page; choices: {choices}")
    return found[0]


def _place(cfg: ReportConfig, directories: Sequence[Path]) -> Path:
    if cfg.to is not None:
        page = Path(cfg.to) / PAGE if Path(cfg.to).is_dir() else Path(cfg.to)
        if page.suffix != ".html":
            raise UserError(f"to={cfg.to} must end in .html, such as to={page.with_suffix('.html')}")
        return page
    if len(cfg.runs) > 1:
        return Path(PAGE)
    return (runs.named(cfg.runs[0]) if cfg.runs else directories[0]) / PAGE


def _natural(path: Path) -> list[tuple[int, str]]:
    """2 before 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name) if part]
