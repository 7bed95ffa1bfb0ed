"""A stopped run that goes on is the run that never stopped, bit for bit; and what is on disk is whole."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.table import ARCHS
from pipeline.core.activations import ACTIVATIONS
from pipeline.core.options import LossOptions
from pipeline.errors import UserError
from pipeline.files import atomic_directory
from pipeline.train import checkpoint, optim
from pipeline.train.checkpoint import State
from pipeline.train.controller import Steering
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions
from pipeline.train.schedule import learning_rate
from tests import oracle
from tests.disk import files_of_at_most

B, L, F, D = 5, 3, 11, 6
N_STEPS = 6
OPTIM = OptimOptions("adam", lr=0.01)
LOSS = LossOptions("all", sparsity=0.3, aux_k=1 / 32)

Run = tuple[Transcoder, torch.optim.Optimizer, State]


def new_run(architecture: str, activation: str, seed: int, dtype: torch.dtype = torch.float32) -> Run:
    torch.manual_seed(seed)
    model = oracle.transcoder(architecture, activation, seed=seed, dtype=dtype).train()
    with torch.no_grad():
        model.b_enc[0, 5] = -100.0  # a feature that stays silent, so that a counter is not 0
    counters = torch.zeros(model.n_sources, F, dtype=torch.int64)
    return model, optim.build(model.parameters(), OPTIM), State(0, counters)


def train(run: Run, steps: int) -> None:
    """Steps that depend on everything a checkpoint must hold: weights, moments, counters, step and random numbers."""
    model, optimizer, state = run
    objective = Objective(LOSS, model, 7.25, N_STEPS)
    for _ in range(steps):
        dtype = model.b_enc.dtype
        x = oracle.normal(B, L, D, seed=100 + state.step, dtype=dtype) + 0.1 * torch.randn(B, L, D)
        y = oracle.normal(B, L, D, seed=200 + state.step, dtype=dtype)
        out = objective.forward(model, x, state.step)
        dead = state.tokens_since_fired >= 2 * B
        terms = objective(model, out, x, y, dead, state.step)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, state.step, N_STEPS)
        optimizer.step()
        features = out.features if isinstance(out.features, Tensor) else out.features.dense()
        state.step += 1
        state.tokens_since_fired += B
        state.tokens_since_fired[(features > 0).any(dim=0)] = 0


def assert_same(one: Run, other: Run) -> None:
    assert one[0].state_dict().keys() == other[0].state_dict().keys()
    for name, tensor in one[0].state_dict().items():
        assert torch.equal(tensor, other[0].state_dict()[name]), name
        assert tensor.dtype == other[0].state_dict()[name].dtype, name
    for name, parameter in one[0].named_parameters():
        twin = dict(other[0].named_parameters())[name]
        assert one[1].state[parameter].keys() == other[1].state[twin].keys(), name
        assert one[1].state[parameter], name
        for what, moment in one[1].state[parameter].items():
            assert torch.equal(moment, other[1].state[twin][what]), (name, what)
            assert moment.dtype == other[1].state[twin][what].dtype, (name, what)
    assert one[2].step == other[2].step
    assert torch.equal(one[2].tokens_since_fired, other[2].tokens_since_fired)
    assert one[2].steering == other[2].steering


@pytest.mark.parametrize(
    ("activation", "architecture"),
    [(a, name) for a in sorted(ACTIVATIONS) for name in sorted(ARCHS) if oracle.allowed(name, a)],
)
def test_six_steps_equal_three_a_checkpoint_and_three_in_fresh_objects(
    tmp_path: Path, architecture: str, activation: str
) -> None:
    straight = new_run(architecture, activation, seed=0)
    train(straight, N_STEPS)
    after_straight = torch.rand(4)

    first = new_run(architecture, activation, seed=0)
    train(first, 3)
    path = checkpoint.save(tmp_path, first[0], first[1], first[2], {})
    model, optimizer, _ = new_run(architecture, activation, seed=99)
    resumed = (model, optimizer, checkpoint.load(path, model, optimizer))
    assert_same(resumed, first)
    train(resumed, 3)
    assert_same(resumed, straight)
    assert torch.equal(torch.rand(4), after_straight)
    assert straight[2].tokens_since_fired.any()
    assert not torch.equal(straight[0].b_enc, first[0].b_enc)


@pytest.mark.parametrize("steering", [None, Steering(-1 / 3, 0.0, math.pi, math.e), Steering(0.0, -1e-17, 1 / 7, 3.0)])
def test_the_controllers_state_survives_to_the_last_bit(tmp_path: Path, steering: Steering | None) -> None:
    model, optimizer, state = new_run("clt", "relu", seed=0)
    state.steering = steering
    path = checkpoint.save(tmp_path, model, optimizer, state, {})
    assert checkpoint.load(path, model, optimizer).steering == steering


def test_what_others_remember_comes_back_by_name_to_the_last_bit(tmp_path: Path) -> None:
    model, optimizer, state = new_run("clt", "topk", seed=0)
    more = {
        "density/share": torch.tensor([1 / 3, math.pi], dtype=torch.float64),
        "density/sparse": torch.tensor([True, False, True]),
        "health/above": torch.tensor(7),
    }
    state.more |= more
    path = checkpoint.save(tmp_path, model, optimizer, state, {})
    loaded = checkpoint.load(path, model, optimizer).more
    assert loaded.keys() == more.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in more.items())
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in more.items())


def test_saving_does_not_disturb_the_run(tmp_path: Path) -> None:
    straight = new_run("clt", "batchtopk", seed=0)
    train(straight, 4)
    saved = new_run("clt", "batchtopk", seed=0)
    for _ in range(4):
        train(saved, 1)
        checkpoint.save(tmp_path, saved[0], saved[1], saved[2], {})
    assert_same(straight, saved)


def test_a_checkpoint_before_the_first_step_can_be_loaded(tmp_path: Path) -> None:
    run = new_run("clt", "topk", seed=0)
    path = checkpoint.save(tmp_path, *run, {})
    model, optimizer, _ = new_run("clt", "topk", seed=1)
    train((model, optimizer, State(0, torch.zeros(L, F, dtype=torch.int64))), 1)
    state = checkpoint.load(path, model, optimizer)
    assert state.step == 0
    assert not optimizer.state  # moments of another run do not stay
    assert torch.equal(model.b_enc, run[0].b_enc)


def test_nothing_is_pickled_and_the_names_tell_the_contents(tmp_path: Path) -> None:
    run = new_run("clt", "topk", seed=0)
    train(run, 2)
    path = checkpoint.save(tmp_path, *run, {"cache": "abc"})
    assert path == tmp_path / "checkpoints" / "step_2"
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.safetensors",
        "state.json",
    }
    assert json.loads((path / "state.json").read_text()) == {"step": 2, "cache": "abc"}
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_the_newest_checkpoint_is_that_of_most_steps(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for name in ("step_9", "step_100", "step_20", ".step_300.tmp", "step_400.old", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.name == "step_100"
    checkpoint.prune(tmp_path, 2)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_100", "step_20", ".step_300.tmp", "step_400.old", "other"}
    checkpoint.prune(tmp_path, 5)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == left


# Atomic directories


def test_a_directory_takes_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "final"
    with atomic_directory(target) as aside:
        (aside / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("error", [ValueError("ours"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_behind_and_what_was_there_untouched(tmp_path: Path, error: BaseException) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "file").write_text("old")

    def write_half(target: Path) -> None:
        with atomic_directory(target) as aside:
            (aside / "file").write_text("half")
            raise error

    for target in (tmp_path / "new", old):
        with pytest.raises(type(error)):
            write_half(target)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (old / "file").read_text() == "old"


def test_a_directory_replaces_one_of_its_name_entirely(tmp_path: Path) -> None:
    target = tmp_path / "final"
    for name in ("first", "second"):
        with atomic_directory(target) as aside:
            (aside / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["second"]


def test_what_a_killed_writer_left_aside_is_no_part_of_the_next(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "final") as aside:
        left_over = aside
    left_over.mkdir()
    (left_over / "half").write_text("half")
    with atomic_directory(tmp_path / "final") as aside:
        (aside / "whole").write_text("whole")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_disk_that_cannot_hold_a_file_is_said_in_a_line(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"could not be written.*free some space"),
        files_of_at_most(100),
        atomic_directory(tmp_path / "final") as aside,
    ):
        (aside / "file").write_text("x" * 1000)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_hold_a_checkpoint_is_said_in_a_line(tmp_path: Path) -> None:
    run = new_run("clt", "topk", seed=0)
    train(run, 1)
    checkpoint.save(tmp_path, *run, {})
    train(run, 1)
    with pytest.raises(UserError, match=r"could not be written.*free some space"), files_of_at_most(3000):
        checkpoint.save(tmp_path, *run, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
