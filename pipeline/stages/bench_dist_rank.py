"""A rank of `clt bench dist`, at the other end of a connection: python -m pipeline.stages.bench_dist_rank ADDRESS

It answers what it is asked until it is told to end. Alone, or as torchrun starts it.

    begin SETTINGS FEATURES DATA    make a trainer -> nothing
    steps N                         take N steps -> the seconds that passed, and those that this process computed
    wire                            -> {what: [calls, bytes]} of a step, as counted in the last stretch
    sum BYTES N                     a sum of so many bytes over all ranks, N times -> the median of their seconds
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Client
from typing import Any

import torch

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions
from pipeline.core import products
from pipeline.core.activations import ACTIVATIONS
from pipeline.core.options import ActivationOptions, Kernels, LossOptions
from pipeline.data.loader import Batch
from pipeline.dist import mesh as meshes
from pipeline.dist import sharded
from pipeline.dist.mesh import Mesh
from pipeline.dist.options import DistOptions
from pipeline.plain import from_plain
from pipeline.stages import bench_train_sides as sides
from pipeline.stages.bench_train_shapes import SHAPES

CPU = torch.device("cpu")


class Rank:
    def __init__(self, mesh: Mesh, settings: dict[str, Any]) -> None:
        shape = SHAPES[settings["shape"]]
        activation = from_plain(ActivationOptions, settings["activation"])
        if ACTIVATIONS[activation.name].chooses:
            activation.k = activation.k or shape.k
        arch = ArchOptions("clt", shape.d_features)
        model, ranks = sharded.build(arch, activation, Dims(shape.n_layers, shape.d_model), mesh)
        _fill(model, mesh.features.rank)
        self.mesh = mesh
        self.trainer = sides.trainer(model, LossOptions("mse"), shape, ranks=ranks)
        self.batches = [self._own(batch) for batch in sides.batches(shape)]
        self.trainer.start()
        self.n_steps = 0
        self.last: dict[str, list[float]] = {}

    def _own(self, whole: Batch) -> Batch:
        """The rows of a batch that come to this rank."""
        [rows] = self.trainer.share.spans(len(whole.rows))
        here = slice(rows.start, rows.stop)
        assert whole.mlp_out is not None
        return Batch(whole.resid_mid[here], whole.mlp_out[here], whole.rows[here])

    def steps(self, n: int) -> tuple[float, float]:
        with self.mesh.wire.counting() as counts:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(n):
                self.trainer.advance(self.batches[self.n_steps % len(self.batches)], 0.0)
                self.n_steps += 1
            spent = time.perf_counter() - wall, time.process_time() - cpu
        self.last = {what: [count.calls / n, count.sent / n] for what, count in counts.items()}
        return spent

    def wire(self) -> dict[str, list[float]]:
        return self.last

    def sum(self, n_bytes: int, times: int) -> float:
        numbers, found = torch.ones(n_bytes // 4), []
        for _ in range(times):
            start = time.perf_counter()
            self.mesh.world.sum(numbers, "bench")
            found.append(time.perf_counter() - start)
        return statistics.median(found)


def _fill(model: Transcoder, seed: int) -> None:
    """Small random weights, so that pre-activations have a variance of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.startswith("b_"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * model.dims.d_model**-0.5)


def main(address: str) -> None:
    with Client(address, "AF_UNIX") as controller, ExitStack() as stack:
        controller.send(int(os.environ.get("RANK", "0")))
        word, settings, features, data = controller.recv()
        assert word == "begin"
        stack.enter_context(products.using(Kernels.auto, CPU))
        mesh = stack.enter_context(meshes.started(DistOptions("mesh", features, data), CPU))
        rank = Rank(mesh, settings)
        controller.send(None)
        answers: dict[str, Callable[..., Any]] = {"steps": rank.steps, "sum": rank.sum, "wire": rank.wire}
        while (question := controller.recv())[0] != "end":
            controller.send(answers[question[0]](*question[1:]))
        controller.send(None)


if __name__ == "__main__":
    main(sys.argv[1])
