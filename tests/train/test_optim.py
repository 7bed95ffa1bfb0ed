"""Every optimiser: what it does in a step, that it goes on exactly, what it forgets, and what is refused."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.arch.base import Transcoder
from pipeline.config import compose
from pipeline.core import deferred
from pipeline.errors import UserError
from pipeline.train import checkpoint, optim
from pipeline.train.checkpoint import State
from pipeline.train.optim import OPTIMISERS
from pipeline.train.optimisers import ScheduleFree, averaged, optimizer_tensors, settle
from pipeline.train.options import OptimOptions
from pipeline.train.resample import resample
from tests import oracle

B, L, F, D = 7, 2, 64, 128
"""A table of more than 4096 numbers, so that its moments have 8 bits."""

NAMES = sorted(OPTIMISERS)


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported before the first test, which would seem slow."""
    import torchao.optim  # noqa: F401


def options(name: str, **changes: object) -> OptimOptions:
    """As its YAML has it, at a rate at which a few steps show."""
    composed = OptimOptions(**OmegaConf.load(Path(__file__).parents[2] / "conf/optim" / f"{name}.yaml"))
    return replace(composed, **{"lr": 0.01} | changes)  # type: ignore[arg-type]


def new(name: str, seed: int = 0, activation: str = "jumprelu", **changes: object) -> tuple[Transcoder, Optimizer]:
    model = oracle.transcoder("clt", activation, L, F, D, dtype=torch.float32, seed=seed).train()
    return model, optim.build(model.named_parameters(), options(name, **changes))


def train(model: Transcoder, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = oracle.normal(B, L, D, seed=100 + step, dtype=torch.float32)
        optimizer.zero_grad()
        model(x).y_hat.sub(x).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()


def weights(model: Transcoder) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved(directory: Path, model: Transcoder, optimizer: Optimizer, step: int) -> Path:
    return checkpoint.save(directory, model, optimizer, State(step, torch.zeros(L, F, dtype=torch.int64)), {})


def as_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Going on


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_that_goes_on_writes_the_bytes_of_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    straight = new(name)
    train(*straight, range(4))
    first = new(name)
    train(*first, range(2))
    middle = saved(tmp_path / "first", *first, 2)
    resumed = new(name, seed=9)
    train(*resumed, range(1))  # moments of another run, which must not stay
    checkpoint.load(middle, *resumed)
    train(*resumed, range(2, 4))
    ends = [saved(tmp_path / key, *run, 4) for key, run in (("straight", straight), ("resumed", resumed))]
    assert as_bytes(ends[0]) == as_bytes(ends[1])
    assert as_bytes(ends[0]) != as_bytes(middle)
    # What is in no file is the same as well: one more step.
    train(*straight, range(4, 5))
    train(*resumed, range(4, 5))
    for key, weight in weights(straight[0]).items():
        assert torch.equal(weight, weights(resumed[0])[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_saving_changes_nothing(name: str, tmp_path: Path) -> None:
    straight, observed = new(name), new(name)
    train(*straight, range(3))
    for step in range(3):
        saved(tmp_path, *observed, step)
        train(*observed, range(step, step + 1))
    for key, weight in weights(straight[0]).items():
        assert torch.equal(weight, weights(observed[0])[key]), key


def test_moments_of_eight_bits_lie_in_the_file_as_codes(tmp_path: Path) -> None:
    model, optimizer = new("adam8bit")
    train(model, optimizer, range(2))
    tensors = load_file(saved(tmp_path, model, optimizer, 2) / "optimizer.safetensors")
    assert tensors["exp_avg.codes/encoders.0"].dtype == torch.uint8
    assert tensors["exp_avg_sq.scale/encoders.0"].shape == (F * D // 256,)
    assert tensors["exp_avg/b_enc"].dtype == torch.float32  # too small to be worth it


def test_eight_bits_follow_adam_where_gradients_are_sparse() -> None:
    # Second moments of 0 beside first moments that are not made the loss ten million times larger in these steps.
    losses = {}
    for name in ("adam", "adam8bit"):
        model, optimizer = new(name, activation="topk")
        x = oracle.normal(B, L, D, dtype=torch.float32)
        losses[name] = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(x).y_hat.sub(x).square().sum()
            loss.backward()
            optimizer.step()
            losses[name].append(float(loss.detach()))
    assert losses["adam"][-1] < losses["adam"][0] / 2
    assert losses["adam8bit"] == pytest.approx(losses["adam"], rel=0.02)


# Gradients kept as terms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_kept_as_terms_give_the_same_step(name: str, clip: float | None) -> None:
    plain, kept = new(name, activation="topk", clip=clip), new(name, activation="topk", clip=clip)
    tables = [table for i in range(L) for table in (kept[0].encoders[i], *kept[0].tables(i))]
    for table in tables:
        deferred.want(table)
    train(*plain, range(1))
    train(*kept, range(1))
    assert not any(deferred.terms(table) for table in tables)
    for key, weight in weights(kept[0]).items():
        torch.testing.assert_close(weight, weights(plain[0])[key])
    x = oracle.normal(B, L, D, dtype=torch.float32)
    kept[0](x).y_hat.square().sum().backward()
    assert all(deferred.terms(table) for table in tables)
    kept[1].zero_grad()
    assert not any(deferred.terms(table) for table in tables)


# Schedule-free


def test_schedule_free_signs_by_hand() -> None:
    weight = Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optim.build([weight], options("signsgd", lr=0.5, momentum=0.75))
    x = z = weight.detach().clone()
    for step, grad in enumerate(([3.0, -0.1], [-1.0, -4.0], [2.0, 0.0]), start=1):
        weight.grad = torch.tensor(grad)
        optimizer.step()
        z = z - 0.5 * torch.tensor(grad).sign()
        x = x + (z - x) / step
        torch.testing.assert_close(weight.detach(), 0.75 * x + 0.25 * z)
        with averaged(optimizer):
            torch.testing.assert_close(weight.detach(), x)
    settle(optimizer)
    torch.testing.assert_close(weight.detach(), x)


def test_a_checkpoint_holds_the_averaged_weights_which_training_ends_with(tmp_path: Path) -> None:
    model, optimizer = new("signsgd")
    train(model, optimizer, range(3))
    at_work = weights(model)
    stored = load_file(saved(tmp_path, model, optimizer, 3) / "model.safetensors")
    assert all(torch.equal(weight, at_work[key]) for key, weight in weights(model).items())
    assert not torch.equal(stored["encoders.0"], at_work["encoders.0"])
    settle(optimizer)
    assert all(torch.equal(weight, stored[key]) for key, weight in weights(model).items())
    settle(optimizer)  # again changes nothing
    with averaged(optimizer):
        assert all(torch.equal(weight, stored[key]) for key, weight in weights(model).items())


def test_what_goes_wrong_with_the_averaged_weights_in_place_leaves_the_others_there() -> None:
    model, optimizer = new("signsgd")
    train(model, optimizer, range(2))
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), averaged(optimizer):
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[key]) for key, weight in weights(model).items())
    train(model, optimizer, range(2, 3))


# Muon


def test_muon_moves_encoders_and_decoders_and_adam_the_rest() -> None:
    model, optimizer = new("muon")
    train(model, optimizer, range(1))
    moments = {key.partition("/")[2]: key.partition("/")[0] for key in optimizer_tensors(model, optimizer)}
    muon = {name for name, what in moments.items() if what == "momentum_buffer"}
    assert muon == {"encoders.0", "encoders.1", "decoders.0.0", "decoders.0.1", "decoders.1.0"}
    assert set(moments) - muon == {"b_enc", "b_dec", "activation.log_threshold"} - (
        set() if model.activation.log_threshold.grad is not None else {"activation.log_threshold"}
    )


def test_muons_step_is_a_fifth_of_the_rate_in_rms_whatever_the_gradient() -> None:
    for scale in (1e-3, 1.0, 1e3):
        weight = Parameter(torch.zeros(40, 16))
        optimizer = optim.build([("encoders.0", weight), ("b_dec", Parameter(torch.zeros(2)))], options("muon", lr=0.1))
        weight.grad = scale * oracle.normal(40, 16, dtype=torch.float32)
        optimizer.step()
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.1, rel=0.3)


# Clipping, decay


@pytest.mark.parametrize("name", NAMES)
def test_gradients_longer_than_the_limit_are_scaled_down_together(name: str) -> None:
    entries = {"encoders.0": Parameter(torch.zeros(2, 2)), "b_enc": Parameter(torch.zeros(1, 2))}
    optimizer = optim.build(entries.items(), options(name, clip=1.0))
    for parameter in entries.values():
        parameter.grad = torch.full_like(parameter, 10.0)
    seen: list[float] = []
    original = optimizer._advance  # type: ignore[attr-defined]

    def advance() -> None:
        seen.append(sum(float(p.grad.square().sum()) for p in entries.values() if p.grad is not None) ** 0.5)
        original()

    optimizer._advance = advance  # type: ignore[attr-defined]
    optimizer.step()
    assert seen == pytest.approx([1.0], rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "muon"])
def test_weight_decay_takes_its_share_of_the_rate(name: str) -> None:
    ends = []
    for decay in (0.0, 0.5):
        weight = Parameter(torch.full((4, 4), 2.0))
        entries = [("encoders.0", weight), ("b_dec", Parameter(torch.zeros(1)))]
        optimizer = optim.build(entries, options(name, lr=0.1, weight_decay=decay))
        weight.grad = oracle.normal(4, 4, dtype=torch.float32)
        optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(ends[0] - ends[1], torch.full((4, 4), 2.0 * 0.1 * 0.5))


# Features that begin again


@pytest.mark.parametrize("name", NAMES)
def test_a_feature_that_begins_again_has_no_past(name: str) -> None:
    model, optimizer = new(name, activation="topk")
    train(model, optimizer, range(3))
    dead = torch.zeros(L, F, dtype=torch.bool)
    dead[0, [3, 40]] = True
    x = oracle.normal(B, L, D, seed=5, dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in flat(model, optimizer).items()}
    resample(model, optimizer, x, x - model(x).y_hat.detach(), dead, torch.Generator().manual_seed(1))
    after = flat(model, optimizer)
    assert any(what.startswith(("exp_avg/", "momentum_buffer/", "z/")) for what in after)
    for key, tensor in after.items():
        what, parameter = key.split("/")
        if parameter == "encoders.0" and tensor.dim() == 2:
            begun = model.encoders[0].detach()[dead[0]] if what == "z" else torch.zeros(2, D)
            smallest = 1e-6 * float(tensor.abs().max()) if name == "adam8bit" else 0.0
            torch.testing.assert_close(tensor[dead[0]], begun, rtol=0, atol=smallest)
            assert torch.equal(tensor[~dead[0]], before[key][~dead[0]]), key
            assert before[key][dead[0]].any(), key
        elif parameter == "encoders.1":
            assert torch.equal(tensor, before[key]), key
    start = model.encoders[0].detach()[dead[0]].clone()
    with averaged(optimizer):
        torch.testing.assert_close(model.encoders[0].detach()[dead[0]], start)
    train(model, optimizer, range(3, 4))
    assert torch.isfinite(model.encoders[0]).all()


def flat(model: Transcoder, optimizer: Optimizer) -> dict[str, Tensor]:
    """The moments as numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{what}/{names[p]}": value.dequantize() if hasattr(value, "codes") else value
        for p, state in optimizer.state.items()
        for what, value in state.items()
    }


# Options


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_composes_and_builds(name: str) -> None:
    composed = compose("train", [f"optim={name}"]).optim
    model = oracle.transcoder("clt", "topk", dtype=torch.float32)
    optimizer = optim.build(model.named_parameters(), composed)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    assert owned == set(model.parameters())
    assert isinstance(optimizer, ScheduleFree) == (name == "signsgd")


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("signsgd", {"beta1": 0.5}, "optim.beta1 has no meaning for optim=signsgd; leave it out"),
        ("signsgd", {"weight_decay": 0.1}, "optim.weight_decay has no meaning for optim=signsgd"),
        ("signsgd", {"decay": 0.3}, r"optim.decay=0.3 has no meaning for optim=signsgd.*use optim.decay=0"),
        ("adam", {"weight_decay": 0.1}, "optim.weight_decay has no meaning for optim=adam;"),
        ("adamw", {"momentum": 0.5}, "optim.momentum has no meaning for optim=adamw"),
        ("muon", {"momentum": 1.0}, "optim.momentum=1.0 must lie between 0 and 1"),
        ("adamw", {"weight_decay": -1.0}, "optim.weight_decay=-1.0 must not be negative"),
        ("adam", {"clip": 0.0}, "optim.clip=0.0 must be above 0; null for no limit"),
    ],
)
def test_settings_without_meaning_are_refused_in_a_line(name: str, changes: dict[str, float], line: str) -> None:
    with pytest.raises(UserError, match=line):
        optim.check(options(name, **changes))


@pytest.mark.parametrize(("name", "library"), [("adam8bit", "torchao"), ("signsgd", "schedulefree")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"optim={name} needs {library}; run: pip install {library}"):
        optim.check(options(name))
    optim.check(options("adam"))
