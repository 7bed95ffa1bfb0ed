"""`clt weights`: the features that one feature reads and feeds, whatever the prompt.

clt weights run=demo feature=1/299
clt weights run=demo feature=1/299 weights.n=50 to=weights.parquet
"""

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.data import caches
from pipeline.data.address import cache_place
from pipeline.errors import UserError
from pipeline.files import csv_text, write_aside
from pipeline.interp import naming, opening
from pipeline.interp.circuits import attribution, global_weights
from pipeline.interp.circuits.global_weights import Strongest, Together, Weight
from pipeline.interp.dashboards import feature_files, feature_labels
from pipeline.interp.dashboards.feature_options import Text
from pipeline.interp.dashboards.feature_text import FeatureText
from pipeline.interp.replacement import ReplacementModel
from pipeline.progress import Progress
from pipeline.stages.circuit_options import WeightsConfig
from pipeline.train import finished
from pipeline.train import run as runs

logger = logging.getLogger(__name__)

COLUMNS = ("direction", *Weight._fields)


def run(cfg: WeightsConfig) -> Path | None:
    """Show the strongest virtual weights of a feature. -> the file, where one was asked for"""
    layer, feature = place(cfg)
    directory = runs.chosen(cfg.run)
    trained = finished.read(directory, cfg.transcoder, cfg.device)
    attribution.check_linear(trained.transcoder)
    opening.check_replaces(trained)
    key, request = trained.config["cache"]["key"], trained.config["cache"]["request"]
    cache = caches.with_key(cache_place(cfg.cache), key, request)
    model = opening.opened(trained, opening.base_model(trained, cfg.device))
    text = FeatureText(cache, trained, model.lm, Text.evaluation, cfg.weights.n_tokens, cfg.weights.batch_tokens)
    contexts = torch.from_numpy(text.contexts[: cfg.weights.norm_contexts].astype("int64"))
    gates = global_weights.typical(model.lm, contexts)
    together = count(model, text, layer, feature) if cfg.weights.count else None
    found = global_weights.strongest(model, gates, layer, feature, cfg.weights.n, together)
    for line in lines(found, together, cfg, directory):
        logger.info(line)
    if cfg.to is None:
        return None
    file = Path(cfg.to)
    write(file, found)
    logger.info("%s", file)
    return file


def place(cfg: WeightsConfig) -> tuple[int, int]:
    """(layer, feature). UserError for settings that mean nothing, before anything is loaded."""
    if cfg.feature is None:
        raise UserError(
            "no feature is named; add feature=LAYER/INDEX, such as 1/17 (clt features and clt graph name some)"
        )
    found = naming.place(cfg.feature)
    if found is None or found.position is not None:
        raise naming.no_feature(f"feature={cfg.feature}")
    for key in ("n", "norm_contexts"):
        if (value := getattr(cfg.weights, key)) < 1:
            raise UserError(f"weights.{key}={value} must be 1 or more")
    if cfg.to is not None and Path(cfg.to).suffix not in (".csv", ".parquet"):
        raise UserError(f"to={cfg.to} ends neither in .csv nor in .parquet; give one of them")
    return found.layer, found.feature


def count(model: ReplacementModel, text: FeatureText, layer: int, feature: int) -> Together:
    """The feature with all others on the text."""
    global_weights.check_feature(model, layer, feature)

    def batches() -> Iterator[torch.Tensor]:
        with Progress(text.n_rows, "tok", "count") as bar:
            for block in text.blocks():
                yield text.read(block)
                bar.update(block.n_rows)

    return global_weights.count(model.transcoder, batches(), layer, feature)


def lines(found: Strongest, together: Together | None, cfg: WeightsConfig, run: Path) -> Iterator[str]:
    """Two tables, inputs and outputs."""

    def label(layer: int, feature: int) -> str:
        return ", ".join(feature_labels.top_tokens_of(feature_files.read(run / "features", layer, feature)))

    layer, feature = place(cfg)
    named = label(layer, feature)
    active = ""
    if together is not None:
        n = int(together.tokens[layer, feature])
        active = f", active at {n:,} of {together.n_tokens:,} held-out tokens"
    yield f"feature {layer}/{feature}{f' [{named}]' if named else ''}{active}"
    for title, rows in (("inputs", found.inputs), ("outputs", found.outputs)):
        yield ""
        yield f"{title:9}path             weight         TWERA  together  top tokens".rstrip()
        for row in rows:
            twera = "-" if row.twera is None else f"{row.twera:.4g}"
            tokens = "-" if row.tokens is None else f"{row.tokens:,}"
            cells = f"{f'{row.layer}/{row.feature}':9}{row.path:10}{row.weight:13.4g}{twera:>14}{tokens:>10}"
            yield f"{cells}  {label(row.layer, row.feature)}".rstrip()
        if not rows:
            yield "none"


def write(file: Path, found: Strongest) -> None:
    """All rows as one table."""
    rows: list[dict[str, Any]] = [
        {"direction": direction, **row._asdict()}
        for direction, own in (("input", found.inputs), ("output", found.outputs))
        for row in own
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".csv":
        write_aside(file, csv_text(COLUMNS, rows).encode())
        return
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    kinds = [pa.string(), pa.string(), pa.int32(), pa.int32(), pa.float64(), pa.float64(), pa.float64(), pa.int64()]
    buffer = io.BytesIO()
    schema = pa.schema(list(zip(COLUMNS, kinds, strict=True)))
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_aside(file, buffer.getvalue())
