"""The grid of ranks.

    rank = data rank * (number of feature ranks) + feature rank

so that those that share a transcoder are neighbours, as the GPUs of one machine are: feature ranks talk in every layer
of a step, data ranks at its end.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as td
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from pipeline import ranks
from pipeline.dist.options import DistOptions
from pipeline.dist.wire import CPU, Group, Wire, meeting
from pipeline.errors import UserError


class Mesh(NamedTuple):
    features: Group
    """Ranks that hold the features of one transcoder between them, and read the same tokens."""
    data: Group
    """Ranks that hold the same features, and read different tokens."""
    world: Group
    """All."""

    @property
    def wire(self) -> Wire:
        return self.world.wire

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that reports and writes what there is one of."""
        return self.world.rank == 0


def alone() -> Mesh:
    """The mesh of one process."""
    one = Group(1, 0, Wire())
    return Mesh(one, one, one)


def local_device(device: torch.device) -> torch.device:
    """Of the devices of its kind, the one of this rank."""
    if device.type != "cuda" or device.index is not None or ranks.world() == 1:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def grid(options: DistOptions, world: int) -> tuple[int, int]:
    """Feature ranks and data ranks. UserError when they do not make up the world."""
    features, data = options.features, options.data
    for name, n in (("features", features), ("data", data)):
        if n is not None and n < 1:
            raise UserError(f"dist.{name}={n} must be at least 1; null for all ranks that the other axis leaves")
    if features is None and data is None:
        raise UserError("dist.features and dist.data are both null; say how many ranks one of them has")
    known = features if features is not None else data
    assert known is not None
    if features is None or data is None:
        if world % known:
            axis = "features" if data is None else "data"
            raise UserError(f"dist.{axis}={known} does not divide the {world} ranks; start a multiple of {known}")
        features, data = features or world // known, data or world // known
    if features * data != world:
        fix = (
            "add dist=feature_shard (or ddp, or mesh)"
            if options.name == "single"
            else "start as many, or set one of them to null"
        )
        raise UserError(
            f"dist={options.name} is for {features * data} ranks ({features} x {data}) and {world} were started; {fix}"
        )
    return features, data


def _meet(backend: str, timeout: timedelta) -> None:
    """The process group of torchrun's variables. Of what earlier ranks have left in torchrun's store, addresses too,
    nothing may be found: without a name for each restart, half of all restarts failed."""
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    again = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    td.init_process_group(backend, store=again, rank=rank, world_size=world, timeout=timeout)


@contextmanager
def started(options: DistOptions, device: torch.device, on_cpu: bool = False) -> Iterator[Mesh]:
    """The mesh of the ranks that were started (`torchrun --nproc-per-node=8`), gloo between CPUs and NCCL between GPUs.
    One process needs none of it. A process group that is there already is used, and left there. on_cpu: all but feature
    ranks talk through the CPU wherever they compute. UserError as `grid`."""
    n_features, n_data = grid(options, ranks.world())
    if ranks.world() == 1:
        yield alone()
        return
    device = local_device(device) if n_features > 1 or not on_cpu else CPU
    others = CPU if on_cpu else device
    ours = not td.is_initialized()
    if ours:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device != others else "nccl" if device.type == "cuda" else "gloo"
        with meeting("the ranks' first meeting"):
            _meet(backend, timedelta(seconds=options.timeout_s))
    try:
        wire = Wire()
        with meeting("the ranks' first meeting"):
            axes = init_device_mesh(device.type, (n_data, n_features), mesh_dim_names=("data", "features"))
        groups = {
            name: Group(axes[name].size(), axes.get_local_rank(name), wire, axes.get_group(name), where)
            for name, where in (("features", device), ("data", others))
        }
        yield Mesh(**groups, world=Group(n_features * n_data, td.get_rank(), wire, td.group.WORLD, others))
    finally:
        if ours:
            td.destroy_process_group()
