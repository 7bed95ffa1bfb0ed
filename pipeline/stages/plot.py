"""`clt plot`: run (+ prompt) -> runs/NAME/plots/KIND-PROMPT.html, a picture of features; with --png an image of it too.

clt plot kind=heatmap run=runs/demo prompt='The capital of France is'
clt plot kind=embedding run=runs/demo --png
"""

import logging
import re
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.interp import opening
from pipeline.interp.dashboards import feature_files
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.plots.plot_data import Feature
from pipeline.interp.plots.plot_options import By, Kind
from pipeline.stages.plot_kinds import DRAW, TITLES, Subject
from pipeline.stages.plot_options import PlotConfig
from pipeline.train import finished
from pipeline.train import run as runs
from pipeline.web import images, plot_page

logger = logging.getLogger(__name__)

FOLDER = "plots"
NEEDS_PROMPT = {Kind.heatmap, Kind.tokens, Kind.ranking, Kind.token_probability}
IN_TABLE = 100
"""Most features in the table below the picture."""


def run(cfg: PlotConfig) -> Path:
    """Draw a picture. -> the page"""
    check(cfg)
    directory = runs.chosen(cfg.run)
    trained = finished.read(directory, cfg.transcoder, cfg.device)
    if cfg.kind is Kind.token_probability or (cfg.kind is Kind.ranking and cfg.plot.by is By.effect):
        opening.check_replaces(trained)
    page = _place(cfg, directory)
    subject = Subject(cfg, trained, opening.base_model(trained, cfg.device))
    drawn = DRAW[cfg.kind](subject)
    facts = {"run": str(directory), "model": subject.lm.name, **drawn.facts}
    facts |= {} if cfg.prompt is None else {"prompt": cfg.prompt}
    described = _described(directory, drawn.features)
    if feature_files.about(directory / "features") is None:
        logger.warning("%s holds no described features, so none has a label; run clt features first", directory)
    title = TITLES[cfg.kind]
    text = plot_page.page(title, drawn.figure, drawn.caption, facts, described)
    page.parent.mkdir(parents=True, exist_ok=True)
    if cfg.plot.png:
        images.write_one(drawn.figure, page.with_suffix(".png"))
    write_aside(page, text.encode())
    beside = f", beside it {page.with_suffix('.png').name}" if cfg.plot.png else ""
    logger.info("%s (%.1f MB)%s", page, page.stat().st_size / 1e6, beside)
    logger.info("it opens in any browser, without a network: %s", page.resolve().as_uri())
    return page


def check(cfg: PlotConfig) -> None:
    """Raises UserError for settings that mean nothing, before anything is loaded."""
    if cfg.kind in NEEDS_PROMPT and cfg.prompt is None:
        raise UserError(f"kind={cfg.kind} is of a text; add prompt='some text'")
    if cfg.plot.n is not None and cfg.plot.n < 1:
        raise UserError(f"plot.n={cfg.plot.n} shows nothing; give 1 or more")
    if cfg.kind is Kind.token_probability and len(set(cfg.plot.factors)) < 2:
        raise UserError("plot.factors needs two different numbers or more, such as [0,1,2]")


def _described(directory: Path, features: list[Feature]) -> list[tuple[str, Record]]:
    found = [(f"{l}/{f}", feature_files.read(directory / "features", l, f)) for l, f in features[:IN_TABLE]]
    return [(name, record) for name, record in found if record is not None]


def _place(cfg: PlotConfig, directory: Path) -> Path:
    if cfg.to is None:
        slug = re.sub(r"[^a-z0-9]+", "-", (cfg.prompt or "").lower()).strip("-")[:60].strip("-")
        by = [str(cfg.plot.by)] if cfg.kind is Kind.ranking else []
        return directory / FOLDER / f"{'-'.join([str(cfg.kind), *by, *([slug] if slug else [])])}.html"
    page = Path(cfg.to)
    if page.suffix != ".html":
        raise UserError(f"to={cfg.to} must end in .html, such as to={page.with_suffix('.html')}")
    return page
