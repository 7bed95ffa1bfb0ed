"""The table of `clt compare`: a row for each run, and for each experiment the mean and spread over its seeds."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Of one run: its seed, COMMON and the MEASURED numbers, None where missing."""

COMMON = ("experiment", "arch", "features", "parameters", "tokens", "l0_basis", "kl_basis")
"""What the runs of an experiment share. kl_basis: how the MLPs were replaced, `replacement.basis` of `clt eval`."""

MEASURED = {
    "l0": ("L0", 1),
    "fvu": ("FVU", 4),
    "kl": ("KL, nats", 4),
    "fvu_own_rule": ("FVU, own rule", 4),
    "kl_own_rule": ("KL, own rule", 4),
    "top1": ("top-1", 3),
    "dead": ("dead", 3),
    "tasks": ("tasks", 3),
    "seconds": ("seconds", 0),
}
"""Key of a row -> heading and digits. All but seconds are those of `clt eval`, with fixed thresholds unless they say under
the rule that the run was trained with: a BatchTopK rule, which looks at other tokens, has no KL of its own."""


def row(directory: Path, experiment: str, seed: int, arch: str, parameters: int, basis: str) -> Row:
    """What a finished and evaluated run says about itself."""
    metrics = json.loads((directory / "eval" / "metrics.json").read_text())
    final = json.loads((directory / "final" / "config.json").read_text())
    replaced, tasks = metrics["replacement"] or {}, metrics.get("tasks")
    own_rule = metrics.get("exact") or metrics  # thresholds are the rule itself where there is no other
    return {
        "experiment": experiment,
        "seed": seed,
        "arch": arch,
        "features": final["arch"]["d_features"],
        "parameters": parameters,
        "tokens": final["metrics"]["tokens"],
        "l0_basis": basis,
        "kl_basis": replaced.get("basis", "none"),
        "l0": metrics["l0"]["total"],
        "fvu": metrics["fvu"]["pooled"],
        "kl": replaced.get("kl"),
        "fvu_own_rule": own_rule["fvu"]["pooled"],
        "kl_own_rule": (own_rule.get("replacement") or {}).get("kl"),
        "top1": replaced.get("top1"),
        "dead": metrics["dead_fraction"]["total"],
        "tasks": tasks["mean"].get("threshold") if tasks else None,
        "seconds": seconds(directory / "timings.jsonl"),
    }


def seconds(timings: Path) -> float:
    """Time in training steps, from the log. Steps that a resumed run took twice count once."""
    by_step = {line["step"]: line["step_ms"] for line in map(json.loads, timings.read_text().splitlines())}
    steps = sorted(by_step)
    return sum((step - before) * by_step[step] / 1e3 for before, step in zip([0, *steps], steps, strict=False))


def summary(rows: list[Row], order: list[str]) -> list[Row]:
    """For each experiment: what its runs have in common, and of each measured number the mean and the spread.

    The spread is the sample standard deviation over seeds, None for a single one.
    """
    result = []
    for experiment in order:
        own = [row for row in rows if row["experiment"] == experiment]
        if not own:
            continue
        common = {key: own[0][key] for key in COMMON}
        result.append(common | {"seeds": [row["seed"] for row in own]} | {key: _spread(own, key) for key in MEASURED})
    return result


def _spread(rows: list[Row], key: str) -> dict[str, float | None]:
    values = [row[key] for row in rows if row[key] is not None]
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "spread": statistics.stdev(values) if len(values) > 1 else None}


def markdown(rows: list[Row], order: list[str]) -> str:
    """The summary as a table; a column that no run has a number for is left out."""
    shown = [key for key in MEASURED if any(row[key] is not None for row in rows)]
    heads = [
        "experiment",
        "arch",
        "features",
        "parameters",
        "L0 is",
        "KL is",
        "seeds",
        *(MEASURED[key][0] for key in shown),
    ]
    lines = [heads, ["---"] * len(heads)]
    for line in summary(rows, order):
        about = [line["experiment"], line["arch"], f"{line['features']:,}", f"{line['parameters']:,}", line["l0_basis"]]
        about.append(line["kl_basis"])
        numbers = [_shown(line[key], MEASURED[key][1]) for key in shown]
        lines.append([*about, str(len(line["seeds"])), *numbers])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _shown(value: dict[str, float | None], digits: int) -> str:
    if value["mean"] is None:
        return ""
    spread = "" if value["spread"] is None else f" +- {value['spread']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def csv_text(rows: list[Row]) -> str:
    """A line for each run."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
