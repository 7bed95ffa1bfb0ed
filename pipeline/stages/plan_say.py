"""A plan in words, as lines of a table, and as JSON."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.data.layout import gb
from pipeline.dist import plan
from pipeline.stages.options import TrainConfig
from pipeline.stages.train_plan import KEPT, Planned

logger = logging.getLogger(__name__)

NAMES = {
    "product": "products",
    "gather": "gathered rows",
    "memory": "weights and moments",
    "link": "links",
    "net": "links between machines",
}
"""Of `times.Seconds`."""

COLUMNS = (
    "", "parameters", "features a layer", "GPUs (features x data)", "parameters of one", "weights, moments",
    "with gradients, activations", "sent a step", "ms a step", "bound by", "tokens/s", "hours",
)  # fmt: skip


def say(found: Planned, cfg: TrainConfig) -> None:
    """The plan, a line for each thing."""
    lines = _lines(found, cfg)
    width = max(map(len, lines))
    for name, text in lines.items():
        logger.info("%s %s", name.ljust(width), text)


def _lines(found: Planned, cfg: TrainConfig) -> dict[str, str]:
    grid, held, rank = found.grid, found.bytes, found.rank
    counts = plan.counts(found.talks, grid)
    calls, sent = sum(one.calls for one in counts.values()), sum(one.sent for one in counts.values())
    parts = ", ".join(
        f"{NAMES[name]} {_short(1e3 * value)}" for name, value in found.seconds._asdict().items() if value
    )
    lines = {
        "ranks": f"{grid.world}: {grid.features} share the features, {grid.data} the tokens (dist={cfg.dist.name})",
        "each holds": f"{rank.n_parameters:,} of {found.parameters:,} parameters, "
        f"{rank.n_sources} x {rank.d_features:,} of {found.d_features:,} features",
        "each sees": f"{found.rows:,} of {found.batch_tokens:,} tokens",
        "memory": ", ".join(f"{name} {gb(held[name])}" for name in KEPT)
        + f"; {gb(found.step_bytes)} in a step, of {found.device_gb:g} GB"
        + ("" if found.fits else ": NOT ENOUGH"),
    }
    if held["start"]:
        lines["start"] = (
            f"{gb(held['start'])} of rows that weights start from, once; arch.init={cfg.arch.init}, uniform takes none"
        )
    lines["checkpoint"] = f"{gb(held['checkpoint'])} written by each, {gb(held['checkpoint'] * grid.world)} in all"
    lines["sends"] = f"{_bytes_of(sent)} a step in {calls} calls"
    lines |= {f"  {what}": f"{_bytes_of(count.sent)} in {count.calls}" for what, count in counts.items()}
    if found.assumed:
        lines["assumed"] = "; ".join(found.assumed)
    return lines | {
        "time": f"{_short(1e3 * found.seconds.step)} ms a step: {parts}; bound by {NAMES[found.seconds.bound]}",
        "rates": found.rates_from,
        "run": f"{found.n_steps:,} steps of {found.batch_tokens:,} tokens, {found.tokens_per_s:,.0f} tokens/s, "
        f"{_short(found.hours)} hours",
    }


def table(plans: Mapping[tuple[str, int], Planned]) -> list[str]:
    """A line for each (model, ranks), as Markdown has it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for (name, _), one in plans.items():
        sent = sum(count.sent for count in plan.counts(one.talks, one.grid).values())
        cells = (
            name,
            f"{one.parameters / 1e9:,.3g} G",
            f"{one.d_features:,}",
            f"{one.grid.world} ({one.grid.features} x {one.grid.data})",
            f"{one.rank.n_parameters / 1e9:,.3g} G",
            gb(one.bytes["weights"] + one.bytes["optimiser"]),
            gb(one.step_bytes) + ("" if one.fits else f", over {one.device_gb:g}"),
            gb(sent),
            _short(1e3 * one.seconds.step),
            NAMES[one.seconds.bound],
            f"{one.tokens_per_s:,.0f}",
            _short(one.hours),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(found: Planned) -> dict[str, Any]:
    """The figures, for JSON: bytes, milliseconds, rates a second."""
    return {
        "ranks": found.grid._asdict() | {"world": found.grid.world},
        "parameters": found.parameters,
        "d_features": found.d_features,
        "rank_parameters": found.rank.n_parameters,
        "rank_features": found.rank.d_features,
        "rank_tokens": found.rows,
        "rank_bytes": found.bytes | {"step": found.step_bytes},
        "fits": found.fits,
        "sent": {what: asdict(count) for what, count in plan.counts(found.talks, found.grid).items()},
        "assumed": found.assumed,
        "rates": found.rates._asdict(),
        "rates_from": found.rates_from,
        "ms": {name: 1e3 * value for name, value in found.seconds._asdict().items()},
        "step_ms": 1e3 * found.seconds.step,
        "bound": found.seconds.bound,
        "tokens_per_s": found.tokens_per_s,
        "steps": found.n_steps,
        "hours": found.hours,
    }


def _short(number: float) -> str:
    """Three figures, or all before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _bytes_of(n: int) -> str:
    return gb(n) if n >= 100_000 else f"{n:,} bytes"
