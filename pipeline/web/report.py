"""One page about runs, and a CSV: what was compared on what, which is best, and everything behind it.

The page holds all that it needs, Plotly's JavaScript included, so that it opens without a network and can be mailed.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import pipeline
from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.web import columns as headline
from pipeline.web import (
    contexts,
    faithfulness,
    plots_compare,
    plots_layers,
    plots_training,
    runs,
    summary,
    sweeps,
    tables,
)
from pipeline.web.csv_table import csv_text
from pipeline.web.groups import Group, differing, grouped
from pipeline.web.paired import Pairs
from pipeline.web.panels import Figure
from pipeline.web.runs import Run

FEW = 6
"""Up to so many runs have ten worst contexts each on the page, more have three."""


@dataclass(frozen=True)
class Report:
    """What the page is made of."""

    runs: list[Run]
    groups: list[Group]
    keys: list[str]
    """Settings that differ."""

    figures: dict[str, Figure]
    page: str


def build(directories: Sequence[Path], to: Path, baseline: Path | None = None, resamples: int = 2000) -> Path:
    """Write the page, and beside it the CSV of the same name. -> `to`

    directories: runs, finished or not. baseline: the one that others are compared with in pairs; None is the best by
    KL. resamples: of the intervals of these differences; 0 leaves them out. Raises UserError for no directory, one
    that is no run, a baseline that is none of them, and a missing plotly.
    """
    return write(compose(directories, baseline, resamples), to)


def write(report: Report, to: Path) -> Path:
    """The page and its CSV, each whole or not at all. -> `to`"""
    to.parent.mkdir(parents=True, exist_ok=True)
    write_aside(to.with_suffix(".csv"), csv_text(report.runs, report.keys).encode())
    write_aside(to, report.page.encode())
    return to


def compose(directories: Sequence[Path], baseline: Path | None = None, resamples: int = 2000) -> Report:
    """The same, not yet written."""
    _check(directories, baseline)
    read = runs.read(directories)
    keys = differing(read)
    groups = grouped(read, keys)
    read = [run for group in groups for run in group.runs]
    figures, detailed = _figures(groups), []
    for index, run in enumerate(read):
        worst, darkest = contexts.worst(run, 10 if len(read) <= FEW else 3)
        detail = plots_layers.in_detail(run)
        if detail is not None:
            figures[f"detail{index}"] = detail
        if detail is not None or worst:
            detailed.append({"name": run.name, "index": index, "contexts": worst, "darkest": darkest})
    against = next((run for run in read if baseline and run.directory.resolve() == baseline.resolve()), None)
    swept = sweeps.read(read)
    content = {
        **_about(read, groups, swept),
        "sweeps": swept,
        "others": tables.of_other_text(read),
        **_tables(read, groups, keys, against, Pairs(resamples)),
        "figures": figures,
        "detailed": detailed,
        "plotly": plotly_script(),
    }
    content["contents"] = _contents(content)
    return Report(read, groups, keys, figures, template().render(content))


def _check(directories: Sequence[Path], baseline: Path | None) -> None:
    if not directories:
        raise UserError("no run to report on; name one, such as runs/demo, or a sweep's directory")
    for directory in directories:
        if not runs.is_run(directory):
            raise UserError(f"{directory} is no run (it has no config.yaml); name a directory that clt train made")
    if baseline is not None and baseline.resolve() not in [directory.resolve() for directory in directories]:
        raise UserError(f"the baseline {baseline} is none of the runs; name one of them, or add it to them")


def _figures(groups: Sequence[Group]) -> dict[str, Figure]:
    evaluated = [group for group in groups if any(run.metrics is not None for run in group.runs)]
    made = {
        "ranking": plots_compare.ranking(evaluated),
        "pareto": plots_compare.pareto(evaluated) if sum(len(group.runs) for group in evaluated) > 1 else None,
        "training": plots_training.main(groups),
        "training_rest": plots_training.rest(groups),
        "by_layer": plots_layers.by_layer(evaluated),
        "replacement": plots_layers.replacement(evaluated),
        "by_position": plots_layers.by_position(evaluated),
        "decoder_mass": faithfulness.decoder_mass(evaluated),
        "histograms": plots_layers.histograms(evaluated) if len(groups) > 1 else None,
        "speed": plots_training.speed(groups),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _about(read: Sequence[Run], groups: Sequence[Group], swept: Sequence[sweeps.Sweep]) -> dict[str, Any]:
    facts = {"sweep" if len(swept) == 1 else f"sweep {sweep.name}": sweep.about for sweep in swept}
    return {
        "title": _titled(read, groups),
        "facts": facts | summary.facts(read),
        "warnings": summary.warnings(read),
        "unfinished": sum(run.final is None for run in read),
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": pipeline.__version__,
    }


def _tables(
    read: Sequence[Run], groups: Sequence[Group], keys: Sequence[str], baseline: Run | None, drawn: Pairs
) -> dict[str, Any]:
    measured = [run for run in read if run.metrics is not None]
    return {
        "contests": summary.contests(groups, drawn) if len(measured) > 1 else [],
        "contest_columns": summary.CONTESTS,
        "columns": headline.COLUMNS,
        "has_numbers": True,
        "any_exact": any(headline.FVU.value_exact(run) is not None for run in measured),
        "seeds": tables.of_seeds(groups),
        "rows": tables.of_runs(read, keys),
        "paired": _paired(measured, baseline, drawn) if len(measured) > 1 and drawn.resamples else None,
        "extras": faithfulness.of_runs(measured),
        "extras_title": faithfulness.TITLE,
        "settings": tables.settings(groups, keys),
        "cost": tables.cost(read),
    }


def _paired(measured: Sequence[Run], baseline: Run | None, drawn: Pairs) -> dict[str, Any]:
    against = baseline or measured[0]
    columns, rows, said = tables.pairs(measured, against, drawn)
    return {
        "baseline": against.name,
        "reason": "the baseline asked for" if baseline else "lowest KL",
        "columns": columns,
        "rows": rows,
        "said": said,
    }


def _contents(content: dict[str, Any]) -> list[tuple[str, str]]:
    figures = content["figures"]
    parts = [
        ("best", "Best", content["contests"]),
        ("numbers", "Numbers", True),
        ("pareto", "Error against L0", "pareto" in figures),
        ("paired", "Differences", content["paired"]),
        ("others", "Other text", content["others"]),
        ("training", "Training", True),
        ("layers", "By layer", {"by_layer", "replacement"} & figures.keys()),
        ("position", "By position", "by_position" in figures),
        ("faithfulness", content["extras_title"], content["extras"] or "decoder_mass" in figures),
        ("features", "Features", "histograms" in figures),
        ("detail", "One run", content["detailed"]),
        ("settings", "Settings", True),
        ("sweep", "Sweep", content["sweeps"]),
        ("cost", "Cost", True),
    ]
    return [(id, name) for id, name, there in parts if there]


def template(name: str = "page.html.j2") -> jinja2.Template:
    """A page of this folder, for text that is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(name)


def plotly_script() -> Markup:
    """Plotly's JavaScript. Raises UserError where plotly is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise UserError("the page's plots need plotly; pip install 'clt-pipeline[report]'") from error
    script = get_plotlyjs()
    assert "</script" not in script
    return Markup(script)


def _titled(read: Sequence[Run], groups: Sequence[Group]) -> str:
    if len(read) == 1:
        return read[0].name
    if len(groups) <= 3:
        return " and ".join(group.label for group in groups)
    folders = {run.directory.absolute().parent.name for run in read}
    recipes = f"{len(groups)} recipes, " if len(groups) < len(read) else ""
    return (f"{folders.pop()}: " if len(folders) == 1 else "") + f"{recipes}{len(read)} runs"
