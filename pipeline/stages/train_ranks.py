"""`clt train` on several ranks: what is refused there, and what rank 0 does for all."""

from collections.abc import Callable
from typing import TypeVar

import torch

from pipeline import ranks
from pipeline.arch.base import Transcoder
from pipeline.data.models import resolve_device
from pipeline.dist import mesh as meshes
from pipeline.dist.mesh import Mesh
from pipeline.dist.shard import shards
from pipeline.errors import UserError
from pipeline.stages.options import TrainConfig
from pipeline.train import optim, precision

T = TypeVar("T")


def first(mesh: Mesh, work: Callable[[], T]) -> T:
    """What rank 0 finds, a plain value, on every rank; where it finds a mistake of the user's, each raises it."""
    if mesh.world.size == 1:
        return work()
    found: T | None = None
    mistake = None
    if mesh.speaks:
        try:
            found = work()
        except UserError as error:
            mistake = str(error)
    said = mesh.world.share({"found": found, "mistake": mistake}, "first")
    if said["mistake"] is not None:
        raise UserError(said["mistake"])
    result: T = said["found"]
    return result


def device(cfg: TrainConfig) -> torch.device:
    """What a rank computes on, of a machine that may be another where ranks are only planned for."""
    return resolve_device(cfg.train.device, here=cfg.dist.world is None)


def check(cfg: TrainConfig) -> None:
    """UserError for settings that make no sense with the ranks that were started, or are planned for; says nothing to
    others."""
    world = ranks.world() if cfg.dist.world is None else cfg.dist.world
    meshes.grid(cfg.dist, world)
    if world == 1:
        return
    if cfg.train.share_pass:
        raise UserError("train.share_pass=true trains several runs in one process, not one on several; leave one out")


def check_moments(cfg: TrainConfig, whole: Transcoder, feature_ranks: int) -> None:
    """UserError for weights of 16 bits and moments of 8 that this transcoder cannot have, or not on so many ranks.
    `whole` may lie on the meta device."""
    precision.check(cfg.train.weights, cfg.optim.name, whole)
    optim.check_borders(cfg.optim.name, whole, shards(cfg.arch, cfg.activation, whole.n_sources, feature_ranks))
