"""Steps of training on the ranks of a mesh, and what was said in each."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import Site
from pipeline.config import compose
from pipeline.core.normalize import Scaling
from pipeline.data.loader import Batch
from pipeline.dist import gradient_plan, mesh, select, sharded
from pipeline.dist.gradient_plan import Held, Whole
from pipeline.dist.mesh import Mesh
from pipeline.dist.options import DistOptions
from pipeline.stages.options import TrainConfig
from pipeline.train import optim, precision
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.objective import Objective
from pipeline.train.optim import Place
from pipeline.train.run_plan import Plan

L, D = 3, 6
CPU = torch.device("cpu")
RUN = 1000
"""Steps of the run that the trainer thinks of."""


class Said(NamedTuple):
    """By one rank in one step."""

    counts: dict[str, tuple[int, int]]
    """what: calls, bytes."""
    dead: list[int]
    """Its dead features of each source, before the step."""
    ties: int
    """How often a cut fell between equal values."""
    gradients: tuple[list[Held], list[Whole]] | None
    """What the choice of terms was made from; None where no data rank is asked."""


def composed(*words: str) -> TrainConfig:
    cfg = compose("train", list(words))
    assert isinstance(cfg, TrainConfig)
    return cfg


def taken(configs: list[TrainConfig], features: int, data: int, n_steps: int, equal: bool = False) -> list[list[Said]]:
    """Of each configuration what this rank says in the steps after the first. equal: all tokens but the first
    are the same one."""
    found = []
    with mesh.started(DistOptions("mesh", features, data), CPU) as ranks:
        for cfg in configs:
            made = trainer(cfg, ranks)
            batches = [mine(made, batch(cfg, step, equal)) for step in range(n_steps + 1)]
            made.advance(batches[0], 0.0)
            found.append([_said(made, one) for one in batches[1:]])
    return found


def _said(made: Trainer, batch: Batch) -> Said:
    decided, nth_largest = gradient_plan.decided, select.nth_largest
    gradients: list[tuple[list[Held], list[Whole]]] = []
    rows: list[int] = []

    def noted(held: list[Held], whole: list[Whole]) -> Any:
        gradients.append((held, whole))
        return decided(held, whole)

    def cut(keys: Any, n: Any, bits: int, total: Any) -> Any:
        rows.append(bits)
        return nth_largest(keys, n, bits, total)

    dead = made.dead().sum(dim=1).tolist()
    gradient_plan.decided, select.nth_largest = noted, cut  # type: ignore[assignment]
    try:
        with made.ranks.mesh.wire.counting() as counts:
            made.advance(batch, 0.0)
    finally:
        gradient_plan.decided, select.nth_largest = decided, nth_largest
    said = {what: (count.calls, count.sent) for what, count in counts.items() if count.calls}
    ties = sum(bits not in (32, 64) for bits in rows)
    return Said(said, dead, ties, gradients[0] if gradients else None)


def trainer(cfg: TrainConfig, ranks: Mesh) -> Trainer:
    """Of small random weights; a feature is dead that has not fired for two batches."""
    model, place = sharded.build(cfg.arch, cfg.activation, Dims(L, D), ranks)
    fill(model, ranks.features.rank)
    precision.store(model, cfg.train.weights)
    zero, one = torch.zeros(L, D), torch.ones(L, D)
    inputs = Inputs(None, Scaling(zero, one, zero, one), CPU, Site.resid_mid, cfg.arch.target)
    batch_tokens, parts = cfg.train.batch_tokens, cfg.train.accumulate
    plan = Plan(RUN, batch_tokens, 2 * batch_tokens, RUN, 1, RUN, 0, 0, 0, torch.ones(L, D), accumulate=parts)
    layers = torch.tensor([2.0, 4.0, 1.25])
    objective = Objective(cfg.loss, model, 7.25, RUN, layers, 0, cfg.train.sparse, place)
    optimizer = optim.build(model.named_parameters(), cfg.optim, Place(ranks.features))
    made = Trainer(Path(), model, optimizer, objective, inputs, plan, cfg.optim)
    made.start()
    made.state.tokens_since_fired[:, ::2] += 2 * batch_tokens
    return made


def fill(model: Transcoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def batch(cfg: TrainConfig, seed: int, equal: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (cfg.train.batch_tokens, L, D)
    rows = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2)]
    rows = [torch.cat([row[:1], row[1:2].repeat(shape[0] - 1, 1, 1)]) for row in rows] if equal else rows
    return Batch(rows[0], rows[1], torch.arange(cfg.train.batch_tokens))


def mine(made: Trainer, whole: Batch) -> Batch:
    """The rows of a batch that come to this rank."""
    rows = torch.cat([torch.arange(one.start, one.stop) for one in made.share.spans(len(whole.rows))])
    assert whole.mlp_out is not None
    return Batch(whole.resid_mid[rows], whole.mlp_out[rows], whole.rows[rows])
