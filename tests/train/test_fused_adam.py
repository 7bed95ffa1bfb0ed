"""Adam on terms takes the steps of torch's Adam, and either goes on where the other stopped."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.core import deferred, losses
from pipeline.core.options import Kernels
from pipeline.train import checkpoint, optim
from pipeline.train.checkpoint import State
from pipeline.train.fused_adam import FusedAdam
from pipeline.train.options import OptimOptions
from tests import oracle

B, L, F, D = 13, 3, 40, 37


def new(architecture: str = "clt") -> Transcoder:
    options = oracle.arch_options(architecture)
    return oracle.transcoder(options, "topk", L, F, D, dtype=torch.float32).train()


def fused(model: Transcoder, decoupled: bool = False) -> FusedAdam:
    decay = 0.1 if decoupled else 0.0
    return FusedAdam(list(model.parameters()), 0.01, (0.9, 0.99), weight_decay=decay, decoupled=decoupled)


def torchs(model: Transcoder, decoupled: bool = False) -> Optimizer:
    if decoupled:
        return torch.optim.AdamW(model.parameters(), 0.01, (0.9, 0.99), weight_decay=0.1, fused=True)
    return torch.optim.Adam(model.parameters(), 0.01, (0.9, 0.99), fused=True)


def train(model: Transcoder, optimizer: Optimizer, steps: range, dense: bool = False, penalty: float = 0.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        for part in range(2):  # gradients of two parts add up
            x, y = (oracle.normal(B, L, D, seed=10 * step + 3 * part + i, dtype=torch.float32) for i in range(2))
            loss = losses.reconstruction(model(x, dense).y_hat, y)
            (loss + penalty * model.decoder_norms().sum()).backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()


def assert_close(one: Transcoder, other: Transcoder, start: Transcoder) -> None:
    """What five steps changed, not what was there before."""
    for (name, a), b, c in zip(one.named_parameters(), other.parameters(), start.parameters(), strict=True):
        assert oracle.normwise(a - c, b - c) < 1e-4, name


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("architecture", ["clt", "skip", "tied", "crosscoder"])
def test_five_steps_are_those_of_torchs_adam_on_dense_gradients(
    architecture: str, penalty: float, decoupled: bool, kernels: Kernels
) -> None:
    ours, theirs, start = new(architecture), new(architecture), new(architecture)
    train(ours, fused(ours, decoupled), range(5), penalty=penalty)
    train(theirs, torchs(theirs, decoupled), range(5), dense=True, penalty=penalty)
    assert_close(ours, theirs, start)


def test_no_table_has_a_gradient_between_backward_and_step(kernels: Kernels) -> None:
    model = new()
    optimizer = fused(model)
    x = oracle.normal(B, L, D, dtype=torch.float32)
    model(x).y_hat.square().sum().backward()
    tables = [*model.encoders, *(table for layer in range(L) for table in model.tables(layer))]
    assert all(table.grad is None and len(deferred.terms(table)) == 1 for table in tables)
    optimizer.step()
    assert all(table.grad is None and deferred.terms(table) == [] for table in tables)


def test_zero_grad_forgets_terms(kernels: Kernels) -> None:
    model, start = new(), new()
    optimizer = fused(model)
    model(oracle.normal(B, L, D, dtype=torch.float32)).y_hat.square().sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))


def test_a_parameter_without_a_gradient_does_not_move(kernels: Kernels) -> None:
    model, start = new(), new()
    optimizer = fused(model)
    train(model, optimizer, range(1))
    before = model.b_dec.detach().clone()
    model.b_dec.requires_grad_(False)
    train(model, optimizer, range(1, 2))
    assert torch.equal(model.b_dec, before)
    assert not torch.equal(model.b_enc, start.b_enc)


@pytest.mark.parametrize("first_is_ours", [True, False])
def test_either_goes_on_from_the_others_checkpoint(first_is_ours: bool, kernels: Kernels, tmp_path: Path) -> None:
    makers = [fused, torchs] if first_is_ours else [torchs, fused]
    model, through, start = new(), new(), new()
    first = makers[0](model)
    train(model, first, range(2))
    state = State(2, torch.zeros(L, F, dtype=torch.int64))
    path = checkpoint.save(tmp_path, model, first, state, {})
    continued = new()
    second = makers[1](continued)
    checkpoint.load(path, continued, second)
    train(continued, second, range(2, 5))
    train(through, torchs(through), range(5))
    assert_close(continued, through, start)


def test_a_run_that_is_resumed_goes_on_bit_for_bit(kernels: Kernels, tmp_path: Path) -> None:
    model, through = new(), new()
    first = fused(model)
    train(model, first, range(2))
    path = checkpoint.save(tmp_path, model, first, State(2, torch.zeros(L, F, dtype=torch.int64)), {})
    continued = new()
    second = fused(continued)
    checkpoint.load(path, continued, second)
    train(continued, second, range(2, 4))
    train(through, fused(through), range(4))
    assert all(torch.equal(a, b) for a, b in zip(continued.parameters(), through.parameters(), strict=True))


def test_adam_and_adamw_on_a_cpu_are_this_one() -> None:
    options = OptimOptions("adamw", lr=0.02, beta1=0.5, beta2=0.9, weight_decay=0.3)
    optimizer = optim.build(new().named_parameters(), options)
    assert isinstance(optimizer, FusedAdam)
    expected = {"lr": 0.02, "betas": (0.5, 0.9), "weight_decay": 0.3, "decoupled": True}
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    adam = optim.build(new().named_parameters(), OptimOptions("adam"))
    assert isinstance(adam, FusedAdam)
    assert not adam.param_groups[0]["decoupled"]


def test_clipping_and_other_types_keep_torchs_own() -> None:
    clipped = optim.build(new().named_parameters(), OptimOptions("adam", clip=1.0))
    assert not isinstance(clipped, FusedAdam)
    half: list[tuple[str, torch.nn.Parameter]] = [(name, p) for name, p in new().bfloat16().named_parameters()]
    assert not isinstance(optim.build(half, OptimOptions("adam")), FusedAdam)


def moments(optimizer: Optimizer) -> set[str]:
    states: list[dict[str, Tensor]] = list(optimizer.state.values())
    return {name for state in states for name in state}


def test_the_state_has_torchs_names(kernels: Kernels) -> None:
    ours, theirs = new(), new()
    optimizers = [fused(ours), torchs(theirs)]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(model, optimizer, range(1))
    assert moments(optimizers[0]) == moments(optimizers[1]) == {"step", "exp_avg", "exp_avg_sq"}
