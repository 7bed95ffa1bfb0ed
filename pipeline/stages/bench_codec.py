"""`clt bench codec`: what int8 loses of channels with heavy tails, by how its scale is chosen.

    clt bench codec                          400,000 rows, fitted to 7,281 of them
    clt bench codec bench.sample=130000

Each channel is a distribution; `100 sd in 1e-3` is a normal one of which that share of the numbers is as many times
larger. The code is fitted to the first `bench.sample` rows and measured on all: fraction of variance lost.

fitted    as caches are: least squares among clipping points (`codecs.fit_int8`)
absmax    the largest deviation in the sample is the last code
99.9 %    that percentile of the deviations is
clipped   share of the numbers that `fitted` clips
lost      part of its FVU that the clipped numbers cost
bound     of the rest: half a step for every number, (scale / 2 sd)^2
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.data.codecs import WORST_FVU, Int8, encoded, fit_int8
from pipeline.errors import UserError
from pipeline.stages.bench_options import BenchCodecConfig, BenchCodecOptions
from pipeline.stages.bench_report import hand_over

logger = logging.getLogger(__name__)

OUTLIERS = {"100 sd in 1e-3": (100, 1e-3), "1000 sd in 1e-3": (1000, 1e-3), "300 sd in 1e-4": (300, 1e-4)}
PERCENTILE = 0.999


def run(cfg: BenchCodecConfig) -> Path:
    """Measures, prints a table and writes it as JSON. -> the file"""
    bench = cfg.bench
    if not 2 <= bench.sample <= bench.rows:
        raise UserError(f"bench.sample={bench.sample}: fitted to some of bench.rows={bench.rows}; use 2 to that many")
    report = measure(bench)
    logger.info("%-18s%10s%10s%10s%10s%10s%10s", "FVU of all rows", *next(iter(report.values())))
    for name, row in report.items():
        marks = " above the warning" if row["fitted"] > WORST_FVU else ""
        logger.info("%-18s%s%s", name, "".join(f"{value:10.1e}" for value in row.values()), marks)
    return hand_over(report, cfg.to, "codec", "clt extract cache.codec=int8 prints the same of a model's own channels")


def measure(bench: BenchCodecOptions) -> dict[str, dict[str, float]]:
    """channel -> column -> figure"""
    channels = synthetic(bench.rows, bench.seed)
    rows = torch.stack(list(channels.values()), dim=1)[:, None].bfloat16()
    sample = rows[: bench.sample]
    offset = sample.float().mean(dim=0)
    deviation = (sample.float() - offset).abs()
    tail = deviation.sort(dim=0).values[int(PERCENTILE * (len(sample) - 1))]
    fitted = fit_int8(sample)
    spread = (rows.double() - rows.double().mean(dim=0)).square().sum(dim=0)
    codes = {"fitted": fitted, "absmax": Int8(deviation.amax(dim=0) / 127, offset), "99.9 %": Int8(tail / 127, offset)}
    columns: dict[str, Any] = {name: encoded(code, rows)[1][0] / spread for name, code in codes.items()}
    outside = (rows.float() - fitted.offset).abs() > 127.5 * fitted.scale
    error = (fitted.again(rows).double() - rows.double()).square()
    columns["clipped"] = outside.double().mean(dim=0)
    columns["lost"] = (error * outside).sum(dim=0) / spread
    columns["bound"] = (fitted.scale.double() / 2).square() * len(rows) / spread
    return {name: {column: float(v[0, i]) for column, v in columns.items()} for i, name in enumerate(channels)}


def synthetic(n: int, seed: int) -> dict[str, Tensor]:
    """Channels by name, float32 [n]."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(n, generator=generator)

    found = {"normal": normal()}
    for freedom in (3, 2):
        chi = torch.stack([normal() for _ in range(freedom)]).square().sum(dim=0)
        found[f"Student t, {freedom} df"] = normal() / (chi / freedom).sqrt()
    for name, (size, share) in OUTLIERS.items():
        found[name] = torch.where(torch.rand(n, generator=generator) < share, size * normal(), normal())
    return found
