"""Runs that read each batch once, together: the same bytes as alone, whatever becomes of the others."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Request, compose, launch
from pipeline.data.loader import Batch, Loader
from pipeline.errors import UserError
from pipeline.stages import extract, share_pass, train
from pipeline.stages.options import TrainConfig
from pipeline.train import run as runs
from pipeline.train import shared
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.micro import Taken
from tests.stages.test_resume import PowerCut, before_step, run_files

SHORT = ["train.n_steps=12", "train.n_tokens=null", "train.batch_tokens=128", "log.every=3"]
SHORT += ["train.checkpoint_every=512"]
SMALL = ["arch.d_features=33", "activation.k=4"]

TOPK = ["+experiment=topk", *SMALL]
ACROSS = ["+experiment=batchtopk_across", *SMALL, "train.accumulate=4", "optim.lr=3e-3", "train.dead_window=256"]
JUMPRELU = ["+experiment=jumprelu", "arch.d_features=27", "loss.target_l0=9", "train.n_steps=8"]
RANDOM = ["+experiment=topk", "activation.k=4", "arch.d_features=256", "optim=adam8bit", "train.weights=bfloat16"]
EIGHT = [
    TOPK, ACROSS, JUMPRELU, RANDOM,
    ["+experiment=relu", "arch.d_features=33", "arch=per_layer", "train.norm=standard", "loss.sparsity=0.1"],
    ["+experiment=matryoshka", *SMALL, "optim=muon"],
    ["+experiment=batchtopk", *SMALL, "loss.resample_every=256", "train.dead_window=200", "train.keep_best=1",
     "train.finish=best"],
    [*RANDOM, "activation.k=6", "optim.lr=1e-4"],
]  # fmt: skip


class Attempts:
    """Stands in for a sweep: keeps what ended which jobs."""

    def __init__(self) -> None:
        self.failed: dict[int, Exception] = {}

    def __call__(self, jobs: Sequence[int], work: Callable[[], None]) -> bool:
        try:
            work()
        except (UserError, PowerCut, ZeroDivisionError) as error:
            self.failed |= dict.fromkeys(jobs, error)
            return False
        return True


def settings(kind: str, jobs: Sequence[list[str]]) -> dict[int, TrainConfig]:
    found = {}
    for number, words in enumerate(jobs):
        cfg = compose("train", [*SHORT, *words, f"name={kind}/{number}"])
        assert isinstance(cfg, TrainConfig)
        found[number] = cfg
    return found


def together(*jobs: list[str]) -> Attempts:
    attempts = Attempts()
    share_pass.run(settings("together", jobs), attempts)
    return attempts


def alone(*jobs: list[str]) -> None:
    for cfg in settings("alone", jobs).values():
        train.run(cfg)


def assert_same(*numbers: int) -> None:
    for number in numbers:
        one, other = run_files(f"together/{number}"), run_files(f"alone/{number}")
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == []
        assert "final/transcoder.safetensors" in one


def batches_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the batches that training reads from now on, as they are read."""
    read: list[int] = []
    given = Loader.__next__

    def noted(self: Loader) -> Batch:
        if self._batch_tokens == 128:
            read.append(self.position)
        return given(self)

    monkeypatch.setattr(Loader, "__next__", noted)
    return read


@pytest.mark.parametrize(
    "jobs", [[TOPK, ACROSS], pytest.param(EIGHT, marks=pytest.mark.slow)], ids=lambda jobs: str(len(jobs))
)
def test_runs_that_share_a_pass_end_with_the_bytes_of_separate_ones(
    cached: Path, jobs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(*jobs)
    read = batches_read(monkeypatch)
    assert together(*jobs).failed == {}
    assert_same(*range(len(jobs)))
    assert read == list(range(12)), "each batch was read once"


@pytest.mark.slow
def test_targets_are_recomputed_once_for_all(
    tiny_gpt2: Path, english: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["model=local", f"model.path={tiny_gpt2}", "model.dtype=float32", "dataset=text", f"dataset.path={english}"]
    words += ["dataset.context=24", "dataset.n_tokens=1k", "dataset.held_out=20", "cache.targets=recompute"]
    extract.run(compose("extract", words))
    jobs = [[*TOPK, "train.n_steps=3"], [*TOPK, "optim.lr=1e-3", "train.n_steps=3"], [*ACROSS, "train.n_steps=3"]]
    alone(*jobs)
    asked: list[int] = []
    given = shared.Targets.__call__

    def counted(self: shared.Targets, rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return given(self, rows)

    monkeypatch.setattr(shared.Targets, "__call__", counted)
    assert together(*jobs).failed == {}
    assert_same(0, 1, 2)
    assert asked.count(128) == 3, "the first two have the same units"
    assert asked.count(32) >= 3 * 4  # and what AuxK reads of a whole batch


def test_a_batch_is_prepared_once_for_all_runs_of_the_same_units(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [*TOPK, "train.n_steps=3", "log.held_out_every=null"]
    other = [[*few, "arch.site=resid_mid"], [*few, "train.norm=standard"], [*few, "train.accumulate=2"]]
    jobs = [few, [*few, "optim.lr=1e-3"], *other, [*few, "optim.lr=3e-3"]]
    alone(*jobs)
    prepared: list[int] = []
    given = Inputs.raw

    def counted(self: Inputs, resid_mid: torch.Tensor, mlp_out: torch.Tensor | None) -> Any:
        prepared.append(len(resid_mid))
        return given(self, resid_mid, mlp_out)

    monkeypatch.setattr(Inputs, "raw", counted)
    assert together(*jobs).failed == {}
    assert_same(*range(len(jobs)))
    assert prepared.count(128) == 3 * 3, "three of the runs have the same units"
    assert prepared.count(64) >= 2 * 3, "parts of a batch are not kept"


def test_a_run_that_writes_over_what_others_read_is_found_out(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Taken.add

    def spoils(self: Taken, out: Any, x: torch.Tensor, y: torch.Tensor) -> None:
        given(self, out, x, y)
        y += 1

    monkeypatch.setattr(Taken, "add", spoils)
    with pytest.raises(AssertionError, match="changed the batch"):
        together(TOPK, TOPK)


def test_what_a_run_does_with_its_targets_is_not_seen_by_the_next() -> None:
    calls: list[int] = []

    def double(rows: torch.Tensor) -> torch.Tensor:
        calls.append(len(rows))
        return 2 * rows

    targets, batch = shared.Targets(double), torch.arange(12.0).view(6, 2)
    for _ in range(2):
        found = targets(batch[2:5])
        assert torch.equal(found, 2 * batch[2:5])
        found.zero_()
    assert torch.equal(targets(batch[2:4]), 2 * batch[2:4])
    assert calls == [3, 2]
    targets.forget()
    batch += 1  # the next one, at the same place
    assert torch.equal(targets(batch[2:5]), 2 * batch[2:5])


def test_a_run_that_draws_random_numbers_draws_those_that_it_draws_alone(cached: Path) -> None:
    jobs = [[*RANDOM, "train.n_steps=3"], [*RANDOM, "train.n_steps=4", "optim.lr=1e-2"]]
    alone(*jobs)
    assert together(*jobs).failed == {}
    assert_same(0, 1)


def test_what_is_written_says_nothing_of_the_others(cached: Path) -> None:
    jobs = [[*TOPK, "train.share_pass=true"], [*TOPK, "optim.lr=1e-3", "train.share_pass=true"]]
    together(*jobs)
    alone(*[words[:-1] for words in jobs])
    for number in (0, 1):
        one, other = (Path(f"runs/{kind}/{number}/config.yaml").read_text() for kind in ("together", "alone"))
        assert one.replace("together", "alone") == other


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, step: int, error: Exception) -> None:
    def act(trainer: Trainer) -> None:
        if trainer.directory == Path("runs", name) and trainer.state.step == step:
            raise error

    before_step(monkeypatch, act)


@pytest.mark.parametrize("error", [UserError("the loss is no longer finite; lower it"), ZeroDivisionError("ours")])
def test_a_run_that_fails_leaves_the_others(cached: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [TOPK, [*TOPK, "optim.lr=1e-3"], [*TOPK, "activation.k=500"]]
    with monkeypatch.context() as patch:
        fail_at(patch, "together/1", 6, error)
        attempts = together(*jobs)
    assert attempts.failed.keys() == {1, 2}
    assert attempts.failed[1] is error
    assert "activation.k=500 must lie between" in str(attempts.failed[2])
    alone(TOPK, jobs[1])
    assert_same(0)
    assert not Path("runs/together/2").exists()
    assert not Path("runs/together/1/lock").exists()
    read = batches_read(monkeypatch)
    assert together(TOPK, jobs[1]).failed == {}
    assert_same(0, 1)
    assert read == list(range(4, 12)), "from the checkpoint of the one that is left"


def test_runs_at_different_steps_join_where_they_stand(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [TOPK, JUMPRELU, [*TOPK, "optim.lr=1e-3"]]
    alone(*jobs)
    with monkeypatch.context() as patch:
        fail_at(patch, "together/0", 9, PowerCut())
        assert together(TOPK).failed.keys() == {0}
    read = batches_read(monkeypatch)
    assert together(*jobs).failed == {}
    assert_same(0, 1, 2)
    assert read == list(range(12))


def test_batches_that_nobody_is_left_for_are_not_read(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [TOPK, [*TOPK, "optim.lr=1e-3"]]
    alone(TOPK)
    with monkeypatch.context() as patch:
        fail_at(patch, "together/0", 9, PowerCut())
        together(TOPK)
    fail_at(monkeypatch, "together/1", 2, PowerCut())
    read = batches_read(monkeypatch)
    assert together(*jobs).failed.keys() == {1}
    assert read == [0, 1, 2, 8, 9, 10, 11]
    assert_same(0)


def test_finished_runs_are_said_to_be_finished(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    together(TOPK, JUMPRELU)
    before = run_files("together")
    caplog.set_level("INFO", logger="pipeline")
    assert together(TOPK, JUMPRELU).failed == {}
    assert [line for line in caplog.messages if "is finished already" in line] == [
        f"runs/together/{n} is finished already\nnext: clt eval run=runs/together/{n}" for n in (0, 1)
    ]
    assert run_files("together") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_every_run_and_the_same_command_goes_on(
    cached: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("train.share_pass=true", "name=together", *TOPK, "activation.k=4,5", *SHORT)
    with monkeypatch.context() as patch:
        before_step(patch, lambda trainer: os.kill(os.getpid(), number) if trainer.state.step == 5 else None)
        assert launch("train", Request(overrides=words, multirun=True)) == 130
    err = capsys.readouterr().err
    for job in (0, 1):
        assert f"stopped at step 6 of 12; clt train name=together/{job} continues" in err
        assert Path(f"runs/together/{job}/checkpoints/step_6").exists()
    assert "error: interrupted; go on with clt train -m train.share_pass=true name=together" in err
    assert launch("train", Request(overrides=words, multirun=True)) == 0
    alone(TOPK, [*TOPK, "activation.k=5"])
    assert_same(0, 1)


def test_a_batch_that_cannot_be_read_fails_those_who_wait_for_it(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Loader.__next__

    def damaged(self: Loader) -> Batch:
        if self.position == 9 and self._batch_tokens == 128:
            raise UserError("shard 3 is damaged; clt cache verify")
        return given(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "__next__", damaged)
        attempts = together(TOPK, JUMPRELU, [*TOPK, "optim.lr=1e-3"])
    assert attempts.failed.keys() == {0, 2}, "the one of 8 steps was done"
    assert runs.finished(Path("runs/together/1"))
    alone(TOPK)
    together(TOPK)
    assert_same(0)


@pytest.mark.slow
def test_jobs_that_read_other_batches_are_trained_by_themselves(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pipeline")
    few = [*TOPK, "train.n_steps=2"]
    jobs = [few, [*few, "train.seed=1"], JUMPRELU, [*few, "train.kernels=torch"], [*few, "train.batch_tokens=64"]]
    assert together(*jobs).failed == {}
    said = [line for line in caplog.messages if line.startswith("job")]
    assert said[0].startswith("jobs 0, 2 share a pass over cache/")
    assert [line[:25] for line in said[1:]] == [f"job {n} is trained alone: n" for n in (1, 3, 4)]
    assert "train.seed=1" in said[1]
    alone(*jobs)
    assert_same(*range(5))


def test_a_trainer_that_changes_the_batch_is_found_out(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def careless(self: Trainer, batch: Batch, rate: float) -> Any:
        batch.resid_mid.mul_(2)
        return step(self, batch, rate)

    monkeypatch.setattr(Trainer, "step", careless)
    with pytest.raises(AssertionError, match="has changed the batch"):
        together(TOPK, JUMPRELU)


@pytest.mark.parametrize("words", [TOPK, ACROSS, JUMPRELU], ids=lambda words: words[0])
def test_no_trainer_changes_the_batch(cached: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to be seen by torch's count, say by a compiled kernel."""
    advance = Trainer.advance

    def watched(self: Trainer, batch: Batch, waited: float) -> Any:
        before = [None if tensor is None else tensor.clone() for tensor in batch]
        fields = advance(self, batch, waited)
        for old, new in zip(before, batch, strict=True):
            assert (old is None and new is None) or (old is not None and new is not None and torch.equal(old, new))
        return fields

    monkeypatch.setattr(Trainer, "advance", watched)
    assert together([*words, "train.n_steps=3"], [*TOPK, "train.n_steps=3"]).failed == {}


def test_a_dry_run_sums_the_memory_and_writes_nothing(cached: Path, capsys: pytest.CaptureFixture) -> None:
    words = ("train.share_pass=true", "dry_run=true", *TOPK, "activation.k=4,5,6", *SHORT)
    assert launch("train", Request(overrides=words, multirun=True)) == 0
    err = capsys.readouterr().err
    assert err.count("nothing was written") == 3
    assert "3 runs at once: weights, gradients and optimisers" in err
    assert not Path("runs").exists()


def test_one_run_has_nobody_to_share_with(cached: Path) -> None:
    with pytest.raises(UserError, match="add -m and values to sweep over, or leave it out"):
        train.run(compose("train", [*TOPK, *SHORT, "name=one", "train.share_pass=true"]))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_time_is_counted_of_a_runs_own_steps(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # every look at it takes a second
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    together([*TOPK, "log.every=1"], *[[*TOPK, f"optim.lr={lr}"] for lr in ("1e-3", "2e-3", "3e-3")])
    lines = [json.loads(line) for line in Path("runs/together/0/timings.jsonl").read_text().splitlines()]
    assert {line["step_ms"] for line in lines[1:]} == {lines[1]["step_ms"]}
    assert lines[1]["step_ms"] < 5000
