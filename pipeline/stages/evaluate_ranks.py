"""The transcoder of `clt eval`, of which each of several feature ranks holds its rows alone."""

from pathlib import Path

import torch

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions
from pipeline.core.peers import ALONE, Peers
from pipeline.dist import sharded
from pipeline.dist.joined import Joined
from pipeline.dist.mesh import Mesh
from pipeline.dist.sharded import Ranks
from pipeline.errors import UserError
from pipeline.plain import from_plain
from pipeline.train import artifact, finished
from pipeline.train.artifact import Trained
from pipeline.train.options import WeightsIn

Place = tuple[Ranks, Peers]
"""Of a rank among those that share the features, and whom its features compete with."""


def read(directory: Path, where: WeightsIn, device: str, mesh: Mesh) -> tuple[Trained, Place | None]:
    """A finished run with the features of this rank alone, and its place; None where each rank has all of them.
    UserError as `finished.read`, and for features that cannot be shared among so many."""
    if mesh.features.size == 1:
        return finished.read(directory, where, device), None
    if where is WeightsIn.disk:
        fix = "use dist=ddp, or transcoder=memory"
        raise UserError(f"transcoder=disk leaves no features for {mesh.features.size} ranks to share; {fix}")
    config = artifact.config_of(artifact.folder(directory))
    arch, rule = from_plain(ArchOptions, config["arch"]), from_plain(ActivationOptions, config["activation"])
    place = sharded.place(arch, rule, Dims(**config["dims"]), mesh)
    return artifact.read(directory, place[0].shard), place


def opened(trained: Trained, place: Place | None, device: torch.device) -> Transcoder | None:
    """Put the transcoder on its device, its features and those of other ranks in one; all ranks call it. -> the same
    under the rule of training, None where the thresholds are that rule"""
    ranks, peers = place or (None, ALONE)
    trained.transcoder.to(device)
    exact = trained.exact(peers)
    if ranks is None:
        return exact
    whole = trained.transcoder = Joined(trained.transcoder, ranks)
    return None if exact is None else whole.under(exact.activation).eval()
