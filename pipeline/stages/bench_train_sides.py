"""The two sides of `clt bench train`: the trainer's own step, and a step of the dense reference, on the same weights.

Data are normal numbers: x through a layer norm as at `arch.site=mlp_in`, y as they are. Encoder rows are directions of
inputs (`arch.init=random_rows`), so that pre-activations have a variance of 1; decoders are small random numbers.
Features fire about equally often then, where those of a language model do not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.arch import init, table
from pipeline.arch.base import Dims, Output, Transcoder
from pipeline.arch.init_rows import FIRING
from pipeline.arch.options import ArchOptions, Init
from pipeline.core import activations, deferred
from pipeline.core.normalize import MlpNorm, Scaling
from pipeline.core.options import ActivationOptions, LossOptions
from pipeline.core.sparse import Sparse
from pipeline.data.loader import Batch
from pipeline.dist.sharded import Ranks
from pipeline.stages.bench_train_dense import Dense
from pipeline.stages.bench_train_shapes import Shape
from pipeline.train import inputs, optim
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions
from pipeline.train.run_plan import Plan

RATE = 1e-4
"""Learning rate: small, so that the features stay about as active as they begin."""
STEPS = 1000
"""Length of the run that the schedules think of."""
N_BATCHES = 4

Step = Callable[[], object]


class Ours:
    """The trainer's step on batches that lie in memory."""

    def __init__(self, trainer: Trainer, batches: list[Batch]) -> None:
        self.trainer, self.batches, self.n = trainer, batches, 0

    def __call__(self) -> None:
        self.trainer.model.train()
        batch = self.batches[self.n % len(self.batches)]
        self.n += 1
        self.trainer.step(batch, RATE)
        self.trainer.state.step += 1


class Seen(NamedTuple):
    """What a step of the trainer went through."""

    outputs: list[Output]
    losses: list[float]
    """What was differentiated."""


class Reference:
    """The dense reference's step on the same ones."""

    def __init__(self, model: Dense, objective: Objective, prepare: Inputs, batches: list[Batch]) -> None:
        self.model, self.objective, self.inputs, self.batches = model, objective, prepare, batches
        self.optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
        self.n = 0

    def __call__(self) -> Tensor:
        batch = self.batches[self.n % len(self.batches)]
        x, y = self.inputs(batch.resid_mid, batch.mlp_out)
        loss = self.model.loss(x, y, self.penalty(self.n))
        self.n += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def penalty(self, step: int) -> float:
        return self.objective.lambda_at(step, None)


def batches(shape: Shape, seed: int = 0) -> list[Batch]:
    """A few batches of normal numbers, on the CPU as a loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch_tokens, shape.n_layers, shape.d_model)
    sites = ([torch.randn(size, generator=generator).bfloat16() for _ in range(2)] for _ in range(N_BATCHES))
    return [Batch(resid_mid, mlp_out, torch.arange(shape.batch_tokens)) for resid_mid, mlp_out in sites]


def prepare(shape: Shape, device: torch.device) -> Inputs:
    """The MLP's norm with gains of 1, and scales of 1."""
    ones, zeros = torch.ones(shape.n_layers, shape.d_model), torch.zeros(shape.n_layers, shape.d_model)
    maps = Scaling(zeros, ones, zeros, ones)
    return inputs.build(MlpNorm("layer", ones, zeros, 1e-5), ArchOptions("clt", 1).site, maps, device)


def transcoder(shape: Shape, activation: ActivationOptions, l0: int | None, device: torch.device) -> Transcoder:
    """A CLT, its weights from a seed. l0: active features of a token and layer, for a rule that does not choose."""
    dims, options = Dims(shape.n_layers, shape.d_model), ArchOptions("clt", shape.d_features, init=Init.random_rows)
    rule = activations.build(activation, shape.n_layers, shape.d_features)
    model = table.build(options, dims, rule).to(device)
    generator = torch.Generator().manual_seed(0)
    n = max(shape.d_features, 2048)
    sample = batches(shape._replace(batch_tokens=n), seed=1)[0]
    x, y = prepare(shape, device)(sample.resid_mid, sample.mlp_out)
    init.initialise(model, x, y, generator, float(l0 or FIRING))
    bound = (shape.n_layers * shape.d_model) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("decoders."):
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return model


def trainer(model: Transcoder, loss: LossOptions, shape: Shape, seed: int = 0, ranks: Ranks | None = None) -> Trainer:
    """A trainer of the model that writes nothing; no feature is ever dead. ranks: the others that train it."""
    objective = Objective(loss, model, float(shape.n_layers * shape.d_model), STEPS, seed=seed, ranks=ranks)
    options = OptimOptions(name="adam", lr=RATE)
    device = model.b_enc.device
    plan = Plan(
        n_steps=STEPS,
        batch_tokens=shape.batch_tokens,
        dead_window=1 << 60,
        checkpoint_steps=1 << 60,
        keep_checkpoints=1,
        log_steps=1 << 60,
        resample_steps=0,
        last_resample=0,
        seed=seed,
        y_variance=torch.ones(shape.n_layers, shape.d_model, device=device),
    )
    made = prepare(shape, device)
    return Trainer(Path(), model, optim.build(model.parameters(), options), objective, made, plan, options)


def compare(ours: Ours, reference: Reference) -> dict[str, float]:
    """How far a step of both is apart, before either has moved: relative differences of the loss and of the gradients
    (normwise, the worst parameter), at the selection of ours; and the share of its pairs that the dense rule, left to
    itself, chooses otherwise. AssertionError where the two do different work."""
    trainer, model = ours.trainer, reference.model
    kept, spy = trainer.optimizer, _Spy(trainer.optimizer)
    trainer.optimizer = spy  # type: ignore[assignment]
    with seen(trainer) as found_there:
        ours()
    [out], [mine] = found_there
    trainer.optimizer, trainer.state.step, ours.n = kept, 0, 0
    trainer.state.tokens_since_fired.zero_()
    masks = _masks(out)
    for parameter in trainer.model.parameters():
        deferred.materialise(parameter)
    batch = ours.batches[0]
    x, y = reference.inputs(batch.resid_mid, batch.mlp_out)
    loss = model.loss(x, y, reference.penalty(0), masks)
    loss.backward()
    with torch.no_grad():
        chosen = [z > 0 for z in model.select(model.encode(x))]
    n_differ = sum(int((mine != its).sum()) for mine, its in zip(masks, chosen, strict=True))
    found = {
        "loss": abs(mine - float(loss.detach())) / abs(float(loss.detach())),
        "gradients": max(_distances(dict(trainer.model.named_parameters()), dict(model.named_parameters()))),
        "selection": n_differ / max(1, sum(int(mask.sum()) for mask in masks)),
        "l0": sum(int(mask.sum()) for mask in masks) / x.shape[0] / x.shape[1],
    }
    for parameter in (*trainer.model.parameters(), *model.parameters()):
        parameter.grad = None
    assert found["loss"] < 1e-5, f"the trainer's loss is not that of the dense reference: {found}"
    assert found["gradients"] < 1e-4, f"the trainer's gradients are not those of the dense reference: {found}"
    assert found["selection"] < 1e-2, f"the trainer's features are not those of the dense reference: {found}"
    return found


@contextmanager
def seen(trainer: Trainer) -> Iterator[Seen]:
    """The outputs and losses of the trainer's steps while the context lasts."""
    found, objective = Seen([], []), trainer.objective
    forward, backward = objective.forward, Tensor.backward

    def kept(*args: Any, **kwargs: Any) -> Output:
        found.outputs.append(forward(*args, **kwargs))
        return found.outputs[-1]

    def noted(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        found.losses.append(float(loss.detach()))
        backward(loss, *args, **kwargs)

    try:
        objective.forward = kept  # type: ignore[method-assign]
        Tensor.backward = noted  # type: ignore[method-assign, assignment]
        yield found
    finally:
        del objective.forward
        Tensor.backward = backward  # type: ignore[method-assign]


class _Spy:
    """In place of an optimiser: leaves weights and gradients as they are."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.param_groups: list[dict[str, Any]] = [{**group} for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        pass


def _masks(out: Output) -> list[Tensor]:
    """Which pairs are active: bool [B, F] of each layer."""
    features = out.features.dense() if isinstance(out.features, Sparse) else out.features
    return [layer.detach() > 0 for layer in features.unbind(1)]


def _distances(ours: dict[str, Tensor], its: dict[str, Tensor]) -> list[float]:
    distances = []
    for name, parameter in ours.items():
        other = its[name.removeprefix("activation.")].grad
        assert parameter.grad is not None, f"{name} has no gradient"
        assert other is not None, f"{name} has no gradient in the dense reference"
        norm = float(other.double().norm())
        distances.append(float((parameter.grad - other).double().norm()) / norm if norm else 0.0)
    return distances
