"""Faithfulness diagnostics and what the built-in world knows, where `clt eval` measured them."""

from collections.abc import Sequence
from typing import Any

from pipeline.web.groups import Group
from pipeline.web.panels import Figure
from pipeline.web.runs import Run

TITLE = "Faithfulness"


def tables(measured: Sequence[Run]) -> list[dict[str, Any]]:
    """Interventions, country swap and purity; [] where no run has them."""
    return []


def decoder_mass(groups: Sequence[Group]) -> Figure | None:
    """Share of decoder mass by distance."""
    return None
