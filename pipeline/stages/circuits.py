"""`clt circuits`: what the graphs of many prompts have in common.

clt circuits graphs=runs/demo/graphs
clt circuits graphs=runs/demo/graphs circuits.least=5 to=common.json
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import csv_text, write_aside, write_report
from pipeline.interp.circuits import graph, recurring
from pipeline.interp.circuits.graph import Graph
from pipeline.interp.circuits.recurring import Recurring
from pipeline.progress import Progress
from pipeline.stages.circuit_options import CircuitsConfig
from pipeline.train import run as runs

logger = logging.getLogger(__name__)


def run(cfg: CircuitsConfig) -> Path:
    """Count what recurs in the graphs of a folder. -> the JSON file"""
    for key in ("least", "n"):
        if (value := getattr(cfg.circuits, key)) < 1:
            raise UserError(f"circuits.{key}={value} must be 1 or more")
    folder = runs.chosen(None) / "graphs" if cfg.graphs is None else Path(cfg.graphs)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no graphs; make some with clt graph prompt='...', or name another folder")
    to = folder / "circuits.json" if cfg.to is None else Path(cfg.to)
    if to.suffix != ".json":
        raise UserError(f"to={to} does not end in .json; give it that ending")
    found = recurring.recurring(_read(files), cfg.circuits.least, cfg.circuits.nodes, cfg.circuits.edges)
    plain = recurring.as_plain(found)
    write_report(to, {**plain, "graphs": [file.name for file in files]})
    for part in ("features", "edges"):
        _write_csv(to.with_name(f"{to.stem}-{part}.csv"), plain[part])
    for line in lines(found, cfg.circuits.n):
        logger.info(line)
    logger.info("%s, and two CSV files beside it", to)
    return to


def lines(found: Recurring, n: int) -> Iterator[str]:
    """The n most frequent features, and edges."""
    yield f"{found.n_graphs} graphs: {len(found.features)} features and {len(found.edges)} edges recur"
    if found.features:
        yield ""
        yield "feature    graphs  activation  influence"
    for feature in found.features[:n]:
        place = recurring.name((feature.layer, feature.feature))
        yield f"{place:10}{feature.graphs:7}{feature.activation:12.3g}{feature.influence:11.2%}"
    if found.edges:
        yield ""
        yield "edge                  graphs      weight  positive"
    for edge in found.edges[:n]:
        ends = f"{recurring.name(edge.source)} -> {recurring.name(edge.target)}"
        yield f"{ends:20}{edge.graphs:8}{edge.weight:12.3g}{edge.positive:10.0%}"


def _read(files: list[Path]) -> Iterator[Graph]:
    with Progress(len(files), "graph", "read") as bar:
        for file in files:
            yield graph.load(file)
            bar.update(1)


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    write_aside(file, (csv_text(list(rows[0]), rows) if rows else "").encode())
