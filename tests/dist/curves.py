"""A run of a few steps on any grid of ranks, and all that it says of itself: what one process says is the measure."""

import hashlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.arch import init
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions, Init, Site
from pipeline.core import activations
from pipeline.core.normalize import Scaling
from pipeline.core.options import ActivationOptions, LossOptions, SparsityForm
from pipeline.data.loader import Batch
from pipeline.dist import mesh, sharded
from pipeline.dist.options import DistOptions
from pipeline.train import calibrate, optim, precision
from pipeline.train.held_out import HeldOut
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.objective import Objective
from pipeline.train.optim import Place
from pipeline.train.options import OptimOptions, Precision, SparseStep
from pipeline.train.run_plan import Plan
from tests import oracle
from tests.dist import processes

B, L, D, F = 13, 3, 6, 44
DEAD = [(0, 1), (0, 2), (0, 15), (0, 16), (0, 30), (0, 43), (1, 20), (2, 33)]
"""(layer, feature) that do not fire at first: more than d/2 of the first layer, on every rank."""

GRIDS = [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (4, 1), (1, 4)]
"""Feature ranks, data ranks."""


AT_ONCE = 3
"""Cases for which ranks are started: on a busy machine they have to be done in the time of `processes`."""


@dataclass
class Case:
    arch: ArchOptions
    rule: ActivationOptions
    loss: LossOptions
    sparse: SparseStep = SparseStep.auto
    dtype: torch.dtype = torch.float64
    optim: OptimOptions = field(default_factory=lambda: OptimOptions("adam", lr=0.01))
    accumulate: int = 1
    n_steps: int = 50
    resample_steps: int = 0
    weights: Precision = Precision.float32
    noise: int = 0
    """Seed of the rounding of weights of 16 bits."""

    def __str__(self) -> str:
        return f"{self.arch.name} {self.rule.name} {self.loss.name} {self.sparse}"


def usual(architecture: str, activation: str, **changes: Any) -> Case:
    """With the losses that go with a rule, all that there are at once."""
    chooses = activations.ACTIVATIONS[activation].chooses
    aux = LossOptions("aux_k", aux_k=1 / 4, multi_topk=1 / 8 if chooses and activation != "groupmax" else 0.0)
    gates = LossOptions("tanh", sparsity=0.02, sparsity_form=SparsityForm.tanh, pre_act=0.01, aux_k=1 / 4)
    rule = oracle.activation_options(activation)
    rule = replace(rule, k=4) if chooses else rule
    arch = oracle.arch_options(architecture, d_features=F, init=Init.uniform)
    return Case(arch, rule, aux if chooses else gates, **changes)


def curve(case: Case, grid: tuple[int, int], directory: Path | None = None) -> dict[str, Any]:
    """Every line of the log, and what the run is measured by at its end. Of rank 0 of the process's grid."""
    if directory is None:
        with tempfile.TemporaryDirectory() as folder:
            return curve(case, grid, Path(folder))
    options = DistOptions("mesh", features=grid[0], data=grid[1])
    torch.manual_seed(0)
    with mesh.started(options, torch.device("cpu")) as ranks:
        trainer = _trainer(case, ranks, directory)
        trainer.start()
        lines = []
        for step in range(case.n_steps):
            trainer.advance(_share(trainer, step), 0.0)
            lines.append(trainer.last_record)
        return {"lines": lines, **_end(case, trainer)}


def both(cases: list[Case], grid: tuple[int, int]) -> list[tuple[Case, dict[str, Any], dict[str, Any]]]:
    """Each case with what one process and what the grid say."""
    one = [curve(case, (1, 1)) for case in cases]
    many = []
    for start in range(0, len(cases), AT_ONCE):
        some = cases[start : start + AT_ONCE]
        found = processes.run(grid[0] * grid[1], lambda some=some: [curve(case, grid) for case in some])
        assert all(said == found[0] for said in found), "every rank says the same"
        many += found[0]
    return list(zip(cases, one, many, strict=True))


def _trainer(case: Case, ranks: mesh.Mesh, directory: Path) -> Trainer:
    model, around = sharded.build(case.arch, case.rule, Dims(L, D), ranks)
    model = model.to(case.dtype)
    nothing = torch.empty(0, L, D)
    init.initialise(model, nothing, nothing, torch.Generator().manual_seed(5), held=around.held)
    ids = around.shard.ids().tolist()
    with torch.no_grad():
        for layer, feature in DEAD:
            if feature in ids:
                model.b_enc[layer % model.n_sources, ids.index(feature)] = -3.0
    around.bare(model)
    precision.store(model, case.weights)
    zero, scale = torch.zeros(L, D, dtype=case.dtype), oracle.normal(L, D, seed=9, dtype=case.dtype).abs() + 0.5
    scaling = Scaling(zero, scale, zero, scale)
    inputs = Inputs(None, scaling, torch.device("cpu"), Site.resid_mid, case.arch.target)
    plan = Plan(
        case.n_steps, B * case.accumulate, 3 * B, case.n_steps, 1, 1, case.resample_steps, case.n_steps, seed=0,
        y_variance=torch.ones(L, D), accumulate=case.accumulate, held_out_steps=20,
    )  # fmt: skip
    variance = torch.tensor([2.0, 4.0, 1.25], dtype=torch.float64)
    objective = Objective(case.loss, model, 7.25, case.n_steps, variance, 0, case.sparse, around)
    trainable = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    optimizer = optim.build(trainable, case.optim, Place(ranks.features, case.noise, around.shard.ids()))
    trainer = Trainer(directory, model, optimizer, objective, inputs, plan, case.optim)
    trainer.held_out = HeldOut(lambda n: _rows(31, 1000), inputs, 31, B, 0, around)
    trainer.plan.saves = lambda done: False  # type: ignore[method-assign]
    return trainer


def _share(trainer: Trainer, step: int) -> Batch:
    """This rank's rows of a batch."""
    resid_mid, mlp_out = _rows(trainer.plan.batch_tokens, step)
    rows = torch.cat([torch.arange(s.start, s.stop) for s in trainer.share.spans(trainer.plan.batch_tokens)])
    return Batch(resid_mid[rows], mlp_out[rows], rows)


def _rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = oracle.normal(n, L, D, seed=2 * seed + 1)
    y = x.roll(1, dims=2).abs() + 0.3 * oracle.normal(n, L, D, seed=2 * seed + 2)
    return x.bfloat16(), y.bfloat16()


def _end(case: Case, trainer: Trainer) -> dict[str, Any]:
    trainer.end()
    replicas = _replicas(trainer)
    precision.restore(trainer.model)
    model, ranks = trainer.model.eval(), trainer.ranks
    x, y = trainer.inputs(*_rows(29, 2000))
    y_scale = trainer.inputs.scaling.y_scale
    exact = calibrate.measure(model, x, y, y_scale, B, 0, ranks)
    model.activation = activations.FixedThreshold(calibrate.thresholds(model, x, B, 0))
    return {"replicas": replicas, "exact": exact, "fixed": calibrate.measure(model, x, y, y_scale, B, 0, ranks)}


def _replicas(trainer: Trainer) -> int:
    """How many different weights there are among ranks with the same features: 1."""
    held = b"".join(p.detach().float().numpy().tobytes() for p in trainer.model.parameters())
    number = torch.tensor([int.from_bytes(hashlib.sha256(held).digest()[:7], "little")])
    return len(set(trainer.ranks.mesh.data.gather(number, "replicas").flatten().tolist()))
