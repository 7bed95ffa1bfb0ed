"""A training step of many ranks as shapes alone: nothing is allocated, nobody is started."""

from typing import NamedTuple

import torch

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.core import activations
from pipeline.core.activations import Choosing
from pipeline.core.peers import Peers
from pipeline.dist import plan, shard, sharded
from pipeline.dist.plan import Grid
from pipeline.dist.share import Share
from pipeline.stages.options import TrainConfig
from pipeline.train import precision
from pipeline.train.objective import WIDER, Objective


class Paper(NamedTuple):
    """What is built of shapes alone, on torch's meta device."""

    grid: Grid
    whole: Transcoder
    rank: Transcoder
    """What feature rank 0 holds, which no other holds more than; its tables of the dtype that they are trained in."""
    held: list[int]
    """Features of each feature rank."""
    objective: Objective


def built(cfg: TrainConfig, dims: Dims, grid: Grid, n_steps: int) -> Paper:
    """UserError for a transcoder that cannot be, or not on so many ranks."""
    shards = shard.shards(cfg.arch, cfg.activation, table.n_sources(cfg.arch, dims), grid.features)
    with torch.device("meta"):
        whole = _shapes(cfg, dims, shard.whole(cfg.arch.d_features))
        rank = _shapes(cfg, dims, shards[0])
    precision.store(rank, cfg.train.weights)
    activations.check_batch(whole.activation, cfg.train.batch_tokens // cfg.train.accumulate)
    ones = torch.ones(dims.n_layers)
    objective = Objective(cfg.loss, whole, 1.0, n_steps, ones, cfg.train.seed, cfg.train.sparse)
    return Paper(grid, whole, rank, [one.n for one in shards], objective)


class _Absent(Peers):
    """Ranks that are only planned: they hold the other features."""

    def __init__(self, d_features: int) -> None:
        self._d_features = d_features

    def whole(self, d_features: int) -> int:
        return self._d_features


def _shapes(cfg: TrainConfig, dims: Dims, held: shard.Shard) -> Transcoder:
    """The whole transcoder, or what a rank of several holds of it."""
    arch = cfg.arch if held.is_whole else sharded.held_arch(cfg.arch, held)
    rule = activations.build(cfg.activation, table.n_sources(cfg.arch, dims), held.n, _Absent(held.d_features))
    return table.build(arch, dims, rule)


def step_of(cfg: TrainConfig, paper: Paper, explains: bool, feature_rank: int = 0, data_rank: int = 0) -> plan.Step:
    """A step of a rank, as `dist/plan.py` wants it. explains: whether AuxK has dead features to revive."""
    whole, objective, grid = paper.whole, paper.objective, paper.grid
    part = cfg.train.batch_tokens // cfg.train.accumulate
    rule = whole.activation
    k = tuple(rule.k) if isinstance(rule, Choosing) else ()
    nests = isinstance(whole, Matryoshka) and whole.nests
    shorter = len(whole.sizes(cfg.train.seed, 0)) - 1 if isinstance(whole, Matryoshka) else 0
    terms = [
        True, nests, objective.penalises, cfg.loss.l0 > 0, cfg.loss.pre_act > 0, objective.wider is not None, explains,
    ]  # fmt: skip
    small = 2 + len(list(rule.parameters()))  # biases, thresholds
    return plan.Step(
        grid=grid,
        n_layers=whole.dims.n_layers,
        d_model=whole.dims.d_model,
        n_sources=whole.n_sources,
        held=tuple(paper.held),
        feature_rank=feature_rank,
        tokens=len(Share(data_rank, grid.data, cfg.train.accumulate).part(part)),
        parts=cfg.train.accumulate,
        part_tokens=part,
        rule=rule.name,
        k=k,
        shorter=shorter,
        wider=tuple(min(WIDER * one, whole.d_features) for one in k) if objective.wider is not None else (),
        aims_at_l0=cfg.loss.l0 > 0,
        clips=cfg.optim.clip is not None,
        n_scalars=sum(terms) + small + whole.n_sources + 2,
        item=whole.b_dec.element_size(),
    )
