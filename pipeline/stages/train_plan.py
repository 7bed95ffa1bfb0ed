"""What each of many ranks would hold, say and take: `clt train --dry-run dist.world=64`, and `clt plan`.

Shapes alone are read: nothing is allocated, no rank is started. The formulas of what is said are those of
`dist/plan.py`, which tests hold against counted bytes; memory is `train_estimate`'s, of a rank's model and tokens;
time is `dist/times.py`'s, at rates that are given, measured or assumed.
"""

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.cost import flops
from pipeline.core.activations import Choosing
from pipeline.core.options import Kernels
from pipeline.dist import mesh, plan, plan_gradients, times
from pipeline.dist.mesh import Mesh
from pipeline.dist.plan import Grid
from pipeline.dist.share import Share
from pipeline.errors import UserError
from pipeline.stages import plan_paper, plan_rates, train_estimate, train_ranks
from pipeline.stages.options import TrainConfig
from pipeline.stages.plan_options import PlanOptions
from pipeline.train import optim
from pipeline.train.objective import Objective
from pipeline.train.options import Precision, SparseStep
from pipeline.train.run_plan import Plan

logger = logging.getLogger(__name__)

KEPT = ("weights", "gradients", "optimiser", "activations", "buffers")
"""Of `Planned.bytes`, what lies in memory in a step."""


class Planned(NamedTuple):
    """Of the rank that has most: feature rank 0 of data rank 0."""

    grid: Grid
    d_features: int
    """Of a layer, over all ranks."""
    parameters: int
    """Of the whole transcoder."""
    rank: Transcoder
    """Shapes of what the rank holds."""
    rows: int
    """Tokens of a step that it sees."""
    bytes: dict[str, int]
    """What is in `KEPT`; start, checkpoint."""
    talks: list[plan.Talk]
    assumed: list[str]
    """What the data will decide, and what is planned with instead."""
    work: times.Work
    rates: times.Rates
    rates_from: str
    seconds: times.Seconds
    batch_tokens: int
    n_steps: int
    device_gb: float

    @property
    def fits(self) -> bool:
        return self.step_bytes <= 1e9 * self.device_gb

    @property
    def step_bytes(self) -> int:
        """Memory of a rank in a step."""
        return sum(self.bytes[name] for name in KEPT)

    @property
    def tokens_per_s(self) -> float:
        return self.batch_tokens / self.seconds.step

    @property
    def hours(self) -> float:
        return self.n_steps * self.seconds.step / 3600


def check(cfg: TrainConfig) -> None:
    """UserError for ranks to plan for where a run is to begin."""
    if cfg.dist.world is not None and not cfg.dry_run:
        raise UserError(
            f"dist.world={cfg.dist.world} plans for so many ranks and starts none; add --dry-run, or leave it out and "
            "start them with torchrun"
        )


def with_grid(cfg: TrainConfig) -> TrainConfig:
    """For ranks to plan for, where nothing says what they share: features within a machine, tokens between machines, as
    `clt plan` has it. UserError as `check`."""
    check(cfg)
    if cfg.dist.name != "single" or cfg.dist.world is None or cfg.dist.world < 2:
        return cfg
    features = math.gcd(cfg.dist.world, PlanOptions().ranks_per_machine)
    logger.info("dist=single is one process; %d are planned as dist=mesh dist.features=%d", cfg.dist.world, features)
    return replace(cfg, dist=replace(cfg.dist, name="mesh", features=features, data=None))


def mesh_of(cfg: TrainConfig, device: torch.device) -> AbstractContextManager[Mesh]:
    """The mesh of the ranks that were started, or of one process that plans for others."""
    return mesh.started(cfg.dist, device) if cfg.dist.world is None else nullcontext(mesh.alone())


def planned(cfg: TrainConfig, dims: Dims, n_steps: int, options: PlanOptions) -> Planned:
    """The plan for `dist.world` ranks. UserError for settings that make no sense, alone or on so many ranks."""
    world = 1 if cfg.dist.world is None else cfg.dist.world
    if world < 1:
        raise UserError(f"dist.world={world} must be at least 1")
    train_ranks.check(cfg)
    grid = Grid(*mesh.grid(cfg.dist, world))
    optim.check(cfg.optim, grid.features)
    share = Share(0, grid.data, cfg.train.accumulate)
    share.check(cfg.train.batch_tokens)
    rows = share.rows(cfg.train.batch_tokens)
    paper = plan_paper.built(cfg, dims, grid, n_steps)
    whole, rank, objective = paper.whole, paper.rank, paper.objective
    train_ranks.check_moments(cfg, whole, grid.features)
    rates, rates_from = plan_rates.rates(options, cfg.train.weights)
    seen, assumed = expected(cfg, rank, grid, options)
    step = plan_paper.step_of(cfg, paper, any(map(any, seen.dead)))
    said = [*plan.talks(step, seen), *_gradients(cfg, rank, step, seen, options)]
    n_bytes = _bytes(cfg, rank, rows, grid.data, objective, options) | {"buffers": plan.buffers(said, grid)}
    work = _work(cfg, rank, rows, objective, options, n_bytes)
    return Planned(
        grid=grid,
        d_features=cfg.arch.d_features,
        parameters=whole.n_parameters,
        rank=rank,
        rows=rows,
        bytes=n_bytes,
        talks=said,
        assumed=assumed,
        work=work,
        rates=rates,
        rates_from=rates_from,
        seconds=times.seconds(work, said, grid, rates),
        batch_tokens=cfg.train.batch_tokens,
        n_steps=n_steps,
        device_gb=options.device_gb,
    )


def expected(cfg: TrainConfig, rank: Transcoder, grid: Grid, options: PlanOptions) -> tuple[plan.Seen, list[str]]:
    """What the data are taken to decide, and how to say so."""
    said = []
    active = _active(cfg, rank, options)
    if not isinstance(rank.activation, Choosing):
        said.append(
            "every layer in dense form; plan.l0 for less"
            if active is None
            else f"an L0 of {sum(active) * cfg.arch.d_features / rank.d_features:g}"
        )
    dead: tuple[tuple[int, ...], ...] = ()
    if cfg.loss.aux_k > 0:
        said.append(f"{100 * options.dead:g} % of the features dead (plan.dead)")
        n_dead = round(options.dead * rank.d_features)
        dead = tuple((n_dead,) * rank.n_sources for _ in range(grid.features)) if n_dead else ()
    if cfg.activation.name.startswith("batchtopk"):
        said.append("no equal values at the cut")
    return plan.Seen(dead), said


def _gradients(
    cfg: TrainConfig, rank: Transcoder, step: plan.Step, seen: plan.Seen, options: PlanOptions
) -> list[plan.Talk]:
    """Of the data ranks, which all have what this one has."""
    if step.grid.data == 1:
        return []
    active, revives = _active(cfg, rank, options), seen.dead[0] if seen.dead else ()
    own = plan_gradients.dense(rank)
    leaves = cfg.arch.name in plan_gradients.LEAVES and isinstance(rank.activation, Choosing)
    if leaves and active is not None and _sparse(cfg, rank, options):
        pairs = [round(step.tokens * one) for one in active]
        own = plan_gradients.held(rank, step.tokens, [pairs] * step.parts, revives)
    return list(plan_gradients.talks([own] * step.grid.data, plan_gradients.whole(rank, revives)))


def keeps_terms(cfg: TrainConfig, options: PlanOptions) -> bool:
    """Whether tables keep gradients as terms on the device that is planned for (`train/fused_adam.py`)."""
    adam = cfg.optim.name in ("adam", "adamw") and cfg.optim.clip is None and cfg.train.weights is Precision.float32
    return adam and (options.device == "cpu" or cfg.train.kernels is Kernels.triton)


def _bytes(
    cfg: TrainConfig, rank: Transcoder, rows: int, n_data: int, objective: Objective, options: PlanOptions
) -> dict[str, int]:
    """What a rank holds, and what it writes of a checkpoint. start: the rows that weights start from, for a moment."""
    share = Plan(
        n_steps=1,
        batch_tokens=rows,
        dead_window=1,
        checkpoint_steps=1,
        keep_checkpoints=1,
        log_steps=1,
        resample_steps=0,
        last_resample=0,
        seed=0,
        y_variance=torch.empty(0),
        accumulate=cfg.train.accumulate,
    )
    weights, state = train_estimate.kept_bytes(cfg, rank)
    terms = keeps_terms(cfg, options) and _sparse(cfg, rank, options) and cfg.loss.aux_k == 0
    return {
        "weights": weights,
        "gradients": 0 if terms else weights,
        "optimiser": state,
        "activations": train_estimate.step_bytes(cfg, rank, share, objective.needs_pre_acts),
        "start": train_estimate.first_bytes(cfg, rank.dims, cfg.arch.d_features),
        "checkpoint": (weights + state) // n_data,
    }


def _active(cfg: TrainConfig, rank: Transcoder, options: PlanOptions) -> list[float] | None:
    """Active features of a token in each source that a rank holds; None where nobody says."""
    share = rank.d_features / cfg.arch.d_features
    if isinstance(rank.activation, Choosing):
        per_layer = cfg.activation.k_per_layer or [cfg.activation.k or 1] * rank.n_sources
        return [k * share for k in per_layer]
    l0 = options.l0 if options.l0 is not None else cfg.loss.target_l0
    return None if l0 is None else [l0 / rank.n_sources * share] * rank.n_sources


def _sparse(cfg: TrainConfig, rank: Transcoder, options: PlanOptions) -> bool:
    """Whether a step's products are of active features alone."""
    return cfg.train.sparse is not SparseStep.never and _active(cfg, rank, options) is not None


def _work(
    cfg: TrainConfig,
    rank: Transcoder,
    rows: int,
    objective: Objective,
    options: PlanOptions,
    n_bytes: dict[str, int],
) -> times.Work:
    """Of a rank's step. With every product dense: 2 encode + 3 decode. Else encode, and rows of the active pairs: three
    times the decoder's, once the encoder's, a weight for each multiply-add."""
    cost = flops(rank, objective.needs_pre_acts)
    moved = 2.0 * (n_bytes["weights"] + n_bytes["optimiser"] + n_bytes["gradients"])
    active = _active(cfg, rank, options)
    if active is None or not _sparse(cfg, rank, options):
        return times.Work(rows * (2 * cost.encode + 3 * cost.decode_dense), 0.0, moved)
    always = rank.decode_flops([0] * rank.n_sources)  # a skip path's
    chosen = rank.decode_flops(active) - always  # type: ignore[arg-type]
    products = cost.encode * (2 if objective.needs_pre_acts else 1) + 2 * always
    return times.Work(
        rows * products, rows * train_estimate.table_bytes(cfg) * (3 * chosen / 2 + sum(active) * rank.width()), moved
    )
