"""The rates that a plan takes time from: given, measured by a bench, or assumed; and a line that says which."""

import json
from pathlib import Path
from typing import Any

from pipeline.dist.times import Rates
from pipeline.errors import UserError
from pipeline.stages.plan_options import PlanOptions
from pipeline.train.options import Precision

ASSUMED = {"gflops": 50_000.0, "gather_gb_s": 1_500.0, "memory_gb_s": 2_500.0, "link_gb_s": 300.0, "net_gb_s": 40.0}
ASSUMED |= {"latency_us": 30.0}
"""Of an H100 in a machine of eight; where each comes from stands at its option (`plan_options.py`)."""

BFLOAT16_GFLOPS = 600_000.0


class Sourced(dict[str, float]):
    """Rates by the names of their options, and where each is from."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, str] = {}

    def take(self, found: dict[str, float], source: str) -> None:
        self.update(found)
        self.sources |= dict.fromkeys(found, source)


def rates(options: PlanOptions, weights: Precision) -> tuple[Rates, str]:
    """The rates, and where they are from. UserError for those that are none, and for files that are no bench's."""
    known, times_floor = Sourced(), 1.0
    known.take(ASSUMED, "assumed")
    if weights is Precision.bfloat16:
        known.take({"gflops": BFLOAT16_GFLOPS}, "assumed")
    if options.rates is not None:
        found, times_floor = _of_train(Path(options.rates))
        known.take(found, options.rates)
    if options.links is not None:
        known.take(_of_dist(Path(options.links)), options.links)
    given = {name: value for name in ASSUMED if (value := getattr(options, name)) is not None}
    known.take(given, "given")
    for name, value in known.items():
        if value < 0 or (value == 0 and name != "latency_us"):
            raise UserError(f"plan.{name}={value} must be above 0; leave it out for {ASSUMED[name]:,g}")
    if options.ranks_per_machine < 1:
        raise UserError(f"plan.ranks_per_machine={options.ranks_per_machine} must be at least 1")
    made = Rates(
        gemm=1e9 * known["gflops"],
        gather=1e9 * known["gather_gb_s"],
        memory=1e9 * known["memory_gb_s"],
        link=1e9 * known["link_gb_s"],
        net=1e9 * known["net_gb_s"],
        latency=1e-6 * known["latency_us"],
        ranks_per_machine=options.ranks_per_machine,
        times_floor=times_floor,
    )
    return made, _said(known, times_floor)


def _said(known: Sourced, times_floor: float) -> str:
    units = {"gflops": "GFLOP/s", "latency_us": "us a call"}
    names = {"gflops": "products", "gather_gb_s": "gather", "memory_gb_s": "memory", "link_gb_s": "link"}
    names |= {"net_gb_s": "between machines", "latency_us": "latency"}
    parts = []
    for source in dict.fromkeys(known.sources.values()):
        listed = [
            f"{names[name]} {known[name]:,g} {units.get(name, 'GB/s')}"
            for name in ASSUMED
            if known.sources[name] == source
        ]
        parts.append(f"{', '.join(listed)} ({source})")
    return "; ".join(parts) + (f"; times {times_floor:.2f}, as measured" if times_floor != 1 else "")


def _of_train(file: Path) -> tuple[dict[str, float], float]:
    """Of the largest shape in a report of clt bench train: its rates, and how many floors its step took."""
    report = _read(file, "clt bench train")
    try:
        largest = max(report["shapes"].values(), key=lambda one: float(one["shape"]["n_parameters"]))
        measured, floors = largest["rates"], float(largest["times_floor"])
        found = {
            "gflops": measured["gemm"] / 1e9,
            "gather_gb_s": measured["gather"] / 1e9,
            "memory_gb_s": max(measured["copy"], measured["in_place"]) / 1e9,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no report of clt bench train ({error!r}); make one with --json FILE") from error
    return found, floors


def _of_dist(file: Path) -> dict[str, float]:
    report = _read(file, "clt bench dist")
    try:
        return {"link_gb_s": report["link"]["bytes_per_s"] / 1e9, "latency_us": 1e6 * report["link"]["latency_s"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no report of clt bench dist ({error!r}); make one with --json FILE") from error


def _read(file: Path, command: str) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; make it with {command} --json {file}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); make it with {command} --json {file}") from error
