"""Weights of 16 bits: rounded at random, summed in float32, kept exactly, float32 at the end, and where refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.arch.table import ARCHS
from pipeline.core.activations import ACTIVATIONS
from pipeline.core.options import LossOptions
from pipeline.errors import UserError
from pipeline.train import checkpoint, optim, precision
from pipeline.train.checkpoint import State
from pipeline.train.objective import Objective
from pipeline.train.optim import OPTIMISERS
from pipeline.train.options import OptimOptions, Precision
from pipeline.train.resample import resample
from tests import oracle

B, L, F, D = 7, 2, 64, 128

ADAM8 = OptimOptions("adam8bit", lr=1e-3)

ALLOWED = [
    (architecture, rule)
    for architecture in sorted(ARCHS)
    for rule in sorted(ACTIVATIONS)
    if oracle.allowed(architecture, rule) and architecture not in precision.LEFT_OUT
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported before the first test, which would seem slow."""
    import torchao.optim  # noqa: F401


def moved(weight: Parameter, optimizer: torch.optim.Optimizer, steps: int = 25) -> Tensor:
    """How far equal gradients carry a weight of ones in so many steps. -> float64, of its shape"""
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return (weight.detach().double() - 1).flatten()


def ones(dtype: torch.dtype) -> Parameter:
    return Parameter(torch.ones(64, 64, dtype=dtype))


def test_rounding_at_random_follows_float32_on_average_where_rounding_to_the_nearest_stalls() -> None:
    torch.manual_seed(0)
    exact, random, stalled = ones(torch.float32), ones(torch.bfloat16), ones(torch.bfloat16)
    want = moved(exact, optim.build([("encoders.0", exact)], ADAM8))
    got = moved(random, optim.build([("encoders.0", random)], ADAM8))
    nearest = moved(stalled, torch.optim.Adam([stalled], lr=1e-3))
    assert float(want.mean()) == pytest.approx(-0.025, rel=1e-3)
    error = float(got.std()) / got.numel() ** 0.5
    assert 0 < error < 1e-3
    assert abs(float(got.mean() - want.mean())) < 4 * error
    assert not nearest.any()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Reconstruct the same few tokens."""
    losses = []
    x = oracle.normal(B, L, D, dtype=torch.float32)
    for _ in steps:
        optimizer.zero_grad()
        loss = model(x).y_hat.sub(x).square().sum() / B
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_with_it_comes_as_far_as_float32() -> None:
    losses = {}
    for weights in Precision:
        torch.manual_seed(0)
        model = oracle.transcoder("clt", "topk", L, F, D, dtype=torch.float32).train()
        precision.store(model, weights)
        losses[weights] = train(model, optim.build(model.named_parameters(), replace(ADAM8, lr=0.03)), range(6))
    exact, rounded = losses[Precision.float32], losses[Precision.bfloat16]
    assert exact[-1] < exact[0] / 3
    assert rounded[0] == pytest.approx(exact[0], rel=0.02)
    assert rounded[-1] == pytest.approx(exact[-1], rel=0.1)
    assert rounded != exact


def test_what_is_kept_in_which_precision() -> None:
    model = oracle.transcoder("skip", "jumprelu", dtype=torch.float32)
    precision.store(model, Precision.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    parameters = dict(model.named_parameters())
    precision.store(model, Precision.bfloat16)
    assert dict(model.named_parameters()) == parameters  # the optimiser has them already
    half = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert half == {name for name in parameters if name.startswith(("encoders", "decoders"))}
    values = [p.detach().float() for p in model.parameters()]
    precision.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize(("architecture", "rule"), ALLOWED)
def test_every_loss_and_gradient_is_near_that_of_float32(architecture: str, rule: str) -> None:
    model = oracle.transcoder(architecture, rule, 3, 22, 8, dtype=torch.float32).train()
    precision.store(model, Precision.bfloat16)
    twin = oracle.transcoder(architecture, rule, 3, 22, 8, dtype=torch.float32).train()
    twin.load_state_dict({name: value.to(twin.state_dict()[name].dtype) for name, value in model.state_dict().items()})
    x, y = oracle.normal(12, 3, 8, dtype=torch.float32).bfloat16().float(), oracle.normal(12, 3, 8, dtype=torch.float32)
    dead = torch.zeros(model.n_sources, 22, dtype=torch.bool)
    dead[0, 5] = True
    losses = []
    for each in (model, twin):
        multi = 1 / 8 if rule.endswith(("topk", "across")) else 0.0
        objective = Objective(LossOptions("all", sparsity=0.1, aux_k=1 / 32, multi_topk=multi), each, 7.0, 10)
        out = objective.forward(each, x, 3)
        assert out.y_hat.dtype == torch.float32
        loss = torch.stack(list(objective(each, out, x, y, dead, 3).values())).sum()
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name.startswith(("decoders", "encoders", "b_dec")):
            other = dict(twin.named_parameters())[name].grad
            assert other is not None
            assert parameter.grad.dtype == parameter.dtype
            assert float((parameter.grad.float() - other).norm()) < 0.3 * float(other.norm()), name


@pytest.mark.parametrize("rule", ["topk", "relu"])
def test_what_several_layers_write_is_summed_in_float32(rule: str) -> None:
    model = oracle.transcoder("clt", rule, 3, 22, 8, dtype=torch.float32).train()
    precision.store(model, Precision.bfloat16)
    written = model.written(model(oracle.normal(12, 3, 8, dtype=torch.float32)).features)
    assert written.dtype == torch.float32
    assert torch.equal(written[:, 0], written[:, 0].bfloat16().float())  # by one layer
    assert (written[:, 2] != written[:, 2].bfloat16().float()).double().mean() > 0.5  # by three


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    def new(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = oracle.transcoder("clt", "topk", L, F, D, dtype=torch.float32, seed=seed).train()
        precision.store(model, Precision.bfloat16)
        return model, optim.build(model.named_parameters(), ADAM8)

    counters = torch.zeros(L, F, dtype=torch.int64)
    straight = new(0)
    train(*straight, range(3))
    ends = [checkpoint.save(tmp_path / "straight", *straight, State(3, counters), {})]  # type: ignore[arg-type]
    first = new(0)
    train(*first, range(1))
    middle = checkpoint.save(tmp_path / "first", *first, State(1, counters), {})  # type: ignore[arg-type]
    resumed = new(5)
    checkpoint.load(middle, *resumed)  # type: ignore[arg-type]
    train(*resumed, range(2))
    ends.append(checkpoint.save(tmp_path / "resumed", *resumed, State(3, counters), {}))  # type: ignore[arg-type]
    one, other = ({path.name: path.read_bytes() for path in end.iterdir()} for end in ends)
    assert one == other


def test_features_begin_again_in_it() -> None:
    model = oracle.transcoder("clt", "relu", L, F, D, dtype=torch.float32).train()
    precision.store(model, Precision.bfloat16)
    optimizer = optim.build(model.named_parameters(), ADAM8)
    train(model, optimizer, range(1))
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[1, 3] = True
    before = model.encoders[1].detach().clone()
    x = oracle.normal(B, L, D, seed=5, dtype=torch.float32)
    resample(model, optimizer, x, x - model(x).y_hat.detach(), dead, torch.Generator().manual_seed(1))
    changed = (model.encoders[1] != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("name", [name for name in sorted(OPTIMISERS) if name != "adam8bit"])
def test_an_optimiser_that_would_lose_small_steps_is_refused(name: str) -> None:
    model = oracle.transcoder("clt", "topk", L, F, D)
    precision.check(Precision.bfloat16, "adam8bit", model)
    precision.check(Precision.float32, name, model)
    with pytest.raises(UserError, match=rf"rounds at random, which optim={name} does not; use optim=adam8bit"):
        precision.check(Precision.bfloat16, name, model)


def test_small_tables_and_two_architectures_are_refused() -> None:
    with pytest.raises(UserError, match=r"divide into blocks of 256 numbers, .* one has 66; change arch.d_f"):
        precision.check(Precision.bfloat16, "adam8bit", oracle.transcoder("clt", "topk"))
    for architecture in precision.LEFT_OUT:
        with pytest.raises(UserError, match=f"cannot be had with arch={architecture}; use float32"):
            precision.check(Precision.bfloat16, "adam8bit", oracle.transcoder(architecture, "topk"))
