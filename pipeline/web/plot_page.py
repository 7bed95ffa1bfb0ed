"""One figure as a page that holds all that it needs: the figure, what it shows, and the features in it as a table."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import pipeline
from pipeline.interp.dashboards.feature_files import Record
from pipeline.web.panels import Figure
from pipeline.web.report import plotly_script, template

CONTEXT = 8
"""Tokens before a peak that the table shows, and behind it."""


def page(
    title: str, figure: Figure, caption: str, facts: Mapping[str, str], features: Sequence[tuple[str, Record]]
) -> str:
    """features: names and records (`feature_files.py`) of described ones. Raises UserError where plotly is missing."""
    return template("plot.html.j2").render(
        title=title, caption=caption, facts=facts, figures={"plot": figure}, plotly=plotly_script(),
        rows=[_row(name, record) for name, record in features], version=pipeline.__version__,
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )  # fmt: skip


def _row(name: str, record: Record) -> dict[str, Any]:
    parts = record["examples_quantiles"]
    best: Record = parts[0]["examples"][0] if parts else {"tokens": [], "train_token_ind": 0}
    at, tokens = best["train_token_ind"], best["tokens"]
    return {
        "name": name,
        "label": record.get("label", ""),
        "frequency": record["activation_frequency"],
        "shown": f"{record['activation_frequency']:.2%}",
        "before": "".join(tokens[max(0, at - CONTEXT) : at]),
        "peak": "".join(tokens[at : at + 1]),
        "after": "".join(tokens[at + 1 : at + CONTEXT]),
        "logits": ", ".join(token.strip() for token in record["top_logits"][:5]),
    }
