"""Faithfulness diagnostics and what the built-in world knows, where `clt eval` measured them."""

from collections.abc import Sequence
from typing import Any

from pipeline.web import tables
from pipeline.web.groups import Group
from pipeline.web.panels import Figure, Panel, grid
from pipeline.web.plots_layers import Numbers, curves
from pipeline.web.runs import Run, lookup

TITLE = "Faithfulness"
MASS = "faithfulness.decoder_mass"

COMPARED = {
    "cosine": "replacement.cosine",
    "cosine, with errors": "with_errors.cosine",
    "cosine, mediated": "mediated.cosine",
    "cosine, MLPs frozen": "mlps_frozen.cosine",
    "slope": "replacement.slope",
    "slope, with errors": "with_errors.slope",
}
"""Headings -> numbers of faithfulness.interventions, which docs/evaluation.md defines."""

SWAPPED = {
    "features": "country features",
    "all_features": "all features",
    "exact_mlp": "the MLPs' own outputs",
    "random_features": "random features",
    "replacement": "country features, in the replacement",
}


def of_runs(measured: Sequence[Run]) -> list[dict[str, Any]]:
    """Tables of where features write, of interventions, and on the built-in world of country swaps and purity; those
    that some run has."""
    found = [
        tables.numbers(
            "Where features write: share of what they write that goes to their own layer",
            ["active features, by how much they write", "all decoders alike"],
            measured,
            [f"{MASS}.written.own", f"{MASS}.decoders.own"],
        ),
        tables.numbers(
            "Removing single features: effect in the replacement against that in the model",
            [*COMPARED, "chance"],
            measured,
            [f"faithfulness.interventions.{path}" for path in [*COMPARED.values(), "replacement.shuffled"]],
        ),
        *(
            tables.numbers(
                f"Swapping the country's features: share of answers that follow ({relation})",
                list(SWAPPED.values()),
                measured,
                [f"world.country_swap.{relation}.{name}.follows" for name in SWAPPED],
            )
            for relation in _relations(measured)
        ),
        tables.numbers(
            "One feature for one country",
            ["mean share of its activation on the country", "countries with .8 or more", "fires on the country"],
            measured,
            ["world.purity.mean", "world.purity.pure", "world.purity.active_on"],
        ),
    ]
    return [table for table in found if table is not None]


def decoder_mass(groups: Sequence[Group]) -> Figure | None:
    """Shares of what active features write: by how many layers on, of each source layer, of each target layer."""

    def by_distance(run: Run) -> Numbers | None:
        return run.numbers(f"{MASS}.written.by_distance")

    def of_source(run: Run) -> Numbers | None:
        return _diagonal(run, "of_source")

    def of_target(run: Run) -> Numbers | None:
        return _diagonal(run, "of_target")

    panels: list[Panel | None] = [
        curves(groups, "Written d layers on", "share of all that is written", by_distance, x="layers on"),
        curves(groups, "Kept in the own layer", "share of what the layer writes", of_source),
        curves(groups, "Read from the own layer", "share of what the layer is sent", of_target),
    ]
    found = [panel for panel in panels if panel is not None]
    for panel in found:
        panel.y_extra["range"] = [-0.03, 1.03]
    return grid(found, columns=3) if found else None


def _diagonal(run: Run, name: str) -> Numbers | None:
    rows = lookup(run.metrics, f"{MASS}.written.{name}")
    return [row[layer] for layer, row in enumerate(rows)] if isinstance(rows, list) else None


def _relations(measured: Sequence[Run]) -> list[str]:
    swaps = [lookup(run.metrics, "world.country_swap") or {} for run in measured]
    return list(dict.fromkeys(key for swap in swaps for key, value in swap.items() if isinstance(value, dict)))
