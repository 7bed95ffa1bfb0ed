"""Runs that are killed, that go on, and that say how."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Request, compose, launch
from pipeline.core import products
from pipeline.errors import UserError
from pipeline.files import take_lock
from pipeline.stages import train
from pipeline.train import checkpoint
from pipeline.train import run as runs
from pipeline.train.loop import Trainer

SHORT = ["arch.d_features=33", "train.n_steps=20", "train.n_tokens=null", "train.batch_tokens=128", "log.every=3"]
SHORT += ["train.checkpoint_every=640", "log.report=false"]
TOPK = ["+experiment=topk", "activation.k=4", *SHORT]


class PowerCut(Exception):
    """What a test stops a run by: nothing is saved."""


def run_files(name: str) -> dict[str, bytes]:
    """Everything that has to repeat: not the timings."""
    root = Path("runs") / name
    files = (path for path in root.rglob("*") if path.is_file() and path.name not in {"timings.jsonl", "config.yaml"})
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def before_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Trainer], None]) -> None:
    """Do something before each step."""
    step = Trainer.step

    def acting(self: Trainer, *args: Any) -> Any:
        act(self)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", acting)


def cut_before(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The power goes once before each of these steps."""
    left = list(steps)

    def act(trainer: Trainer) -> None:
        if trainer.state.step in left:
            left.remove(trainer.state.step)
            raise PowerCut

    before_step(monkeypatch, act)


def lose(path: Path) -> None:
    path.unlink()


def halve(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: 2 * len(text) // 3])


def add(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"step": 21}\n{"step": 2')


def slow(*words: str) -> Any:
    return pytest.param(list(words), marks=pytest.mark.slow)


MISHAPS = [lose, halve, add]


@pytest.mark.parametrize(
    "words",
    [
        ["+experiment=topk", "activation.k=4", "train.accumulate=4", "train.dead_window=256"],
        slow("+experiment=batchtopk", "activation.k=4", "train.dead_window=256"),
        slow("+experiment=jumprelu", "loss.target_l0=9", "train.accumulate=2"),
        slow("+experiment=sparse", "train.keep_best=1", "train.finish=best"),
    ],
    ids=" ".join,
)
def test_a_run_whose_power_is_cut_goes_on_to_the_same_bytes(
    cached: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(compose("train", [*words, *SHORT, "name=whole"]))
    drawn = random.Random(" ".join(words))
    steps = [drawn.randrange(5), *drawn.sample(range(5, 20), 2)]
    cut_before(monkeypatch, *steps)
    command = [*words, *SHORT, "name=cut"]
    for mishap in MISHAPS:
        with pytest.raises(PowerCut):
            train.run(compose("train", command))
        metrics = Path("runs/cut/metrics.jsonl")
        if metrics.exists():
            mishap(metrics)
        command = ["name=cut"]  # its own settings from now on
    train.run(compose("train", command))
    assert run_files("cut") == run_files("whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_run_says_how_to_go_on(
    cached: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    before_step(monkeypatch, lambda trainer: os.kill(os.getpid(), number) if trainer.state.step == 6 else None)
    handler = signal.getsignal(number)
    assert launch("train", Request(overrides=(*TOPK, "name=asked"))) == 130
    assert Path("runs/asked/checkpoints/step_7").exists()
    assert "stopped at step 7 of 20; clt train name=asked continues" in caplog.messages
    assert signal.getsignal(number) is handler
    assert not Path("runs/asked/lock").exists()


def stopped(name: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    config = compose("train", [*TOPK, *words, f"name={name}"])
    with monkeypatch.context() as patch:
        cut_before(patch, 7)
        with pytest.raises(PowerCut):
            train.run(config)


def test_a_run_that_goes_on_with_other_kernels_says_so(
    cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(products, "_native", lambda: pytest.fail("asked for"))
    stopped("here", monkeypatch, "train.kernels=torch")
    state = checkpoint.newest(Path("runs/here"))
    assert state is not None
    about = json.loads((state / "state.json").read_text())
    assert about["kernels"] == "torch"
    (state / "state.json").write_text(json.dumps(about | {"kernels": "compiled"}))
    train.run(compose("train", ["name=here"]))
    assert "made with train.kernels=compiled and goes on with torch" in caplog.text


def test_resume_without_a_name_continues_the_newest_unfinished_run_with_its_own_settings(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no unfinished run under runs/"):
        compose("train", ["resume=true"])
    stopped("sweep/3", monkeypatch)
    stopped("other", monkeypatch)
    os.utime("runs/other/metrics.jsonl", (1, 1))
    os.utime("runs/other/checkpoints", (1, 1))
    os.utime("runs/other/config.yaml", (1, 1))
    with pytest.raises(UserError, match=r"leave out optim\.lr, or name the run"):
        compose("train", ["resume=true", "optim.lr=1"])
    config = compose("train", ["resume=true", "train.keep_checkpoints=2"])
    assert config.name == "sweep/3"
    assert config.activation.k == 4
    assert config.train.keep_checkpoints == 2
    train.run(config)
    assert runs.finished(Path("runs/sweep/3"))
    assert len(list(Path("runs/sweep/3/checkpoints").iterdir())) == 2
    assert compose("train", ["resume=true"]).name == "other"


def test_a_name_alone_never_stands_for_other_settings(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped("mine", monkeypatch)
    assert compose("train", ["name=mine"]).activation.k == 4
    assert compose("train", ["name=another"]).activation.k != 4
    with pytest.raises(UserError, match=r"activation\.k=5 \(was 4\)"):
        train.run(compose("train", [*TOPK, "activation.k=5", "name=mine"]))
    with pytest.raises(UserError, match=r"made with other settings: activation\."):
        train.run(compose("train", ["+experiment=relu", "name=mine"]))


def test_resume_insists_on_a_run_or_on_none(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no runs/mine to continue"):
        train.run(compose("train", [*TOPK, "name=mine", "resume=true"]))
    assert not Path("runs").exists()
    stopped("mine", monkeypatch)
    with pytest.raises(UserError, match="runs/mine exists already"):
        train.run(compose("train", [*TOPK, "name=mine", "resume=false"]))
    train.run(compose("train", [*TOPK, "name=mine", "resume=true"]))
    assert runs.finished(Path("runs/mine"))


def test_one_process_at_a_time(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped("mine", monkeypatch)
    config = compose("train", ["name=mine"])
    lock = take_lock(Path("runs/mine"), "x")
    with pytest.raises(UserError, match=rf"another process \({os.getpid()}\) is making runs/mine; wait"):
        train.run(config)
    os.close(lock)  # as being killed does
    train.run(config)
    assert not Path("runs/mine/lock").exists()


def test_what_a_killed_start_leaves_is_no_obstacle(cached: Path) -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml.aside").write_text("act")
    train.run(compose("train", [*TOPK, "name=mine"]))
    assert runs.finished(Path("runs/mine"))


def test_half_a_checkpoint_is_cleared_away(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped("mine", monkeypatch)
    half = Path("runs/mine/checkpoints/.step_6.tmp")
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    train.run(compose("train", ["name=mine"]))
    assert [path.name for path in Path("runs/mine/checkpoints").iterdir()] == ["step_20"]


def throw(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.b_dec += 100.0


def test_a_kill_between_saving_and_removing_leaves_no_checkpoint_too_many(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*args: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "prune", lambda directory, *keep: cut() if directory_has(directory, 20) else None)
        with pytest.raises(PowerCut):
            train.run(compose("train", [*TOPK, "name=mine"]))
    assert len(list(Path("runs/mine/checkpoints").iterdir())) == 4
    train.run(compose("train", ["name=mine"]))
    assert [path.name for path in Path("runs/mine/checkpoints").iterdir()] == ["step_20"]


def directory_has(directory: Path, step: int) -> bool:
    return (directory / "checkpoints" / f"step_{step}").exists()


def scores(name: str) -> dict[str, float]:
    found = Path(f"runs/{name}/checkpoints").glob("step_*")
    return {path.name: json.loads((path / "state.json").read_text())["held_out_fvu"] for path in found}


def test_the_best_checkpoint_stays_and_may_become_the_result(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_step(monkeypatch, lambda trainer: throw(trainer) if trainer.state.step == 17 else None)  # the last is worst
    train.run(compose("train", [*TOPK, "name=all", "train.keep_best=9"]))
    train.run(compose("train", [*TOPK, "name=plain"]))
    all_scores = scores("all")
    assert sorted(all_scores) == ["step_10", "step_15", "step_20", "step_5"]
    best = min(all_scores, key=lambda name: all_scores[name])
    assert best != "step_20"
    train.run(compose("train", [*TOPK, "name=best", "train.keep_best=1", "train.finish=best"]))
    assert scores("best") == {name: all_scores[name] for name in (best, "step_20")}
    files, plain = run_files("best"), run_files("plain")
    for name in ("metrics.jsonl", "checkpoints/step_20/model.safetensors", "checkpoints/step_20/state.safetensors"):
        assert files[name] == plain[name], "scoring changes nothing"
    assert files["final/transcoder.safetensors"] != plain["final/transcoder.safetensors"]
    config = json.loads(files["final/config.json"])
    steps = int(best.removeprefix("step_"))
    assert config["metrics"]["step"] == steps - steps % 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.accumulate=3"], r"train\.accumulate=3 must be 1 or more and divide train\.batch_tokens=128"),
        (["train.accumulate=0"], r"train\.accumulate=0 must be 1 or more"),
        (["train.keep_best=-1"], "must not be negative"),
        (["train.finish=best"], r"add train\.keep_best=1"),
        (["train.diverged=0.5"], "must be above 1"),
        (["activation=batchtopk", "train.accumulate=128"], "leaves nothing to compete with"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    cached: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train.run(compose("train", [*TOPK, *words, "name=refused"]))
    assert not Path("runs").exists()


def poison_weights(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.encoders[1][0, 0] = torch.nan


def poison_moments(trainer: Trainer) -> None:
    trainer.optimizer.state[trainer.model.encoders[1]]["exp_avg"][0, 0] = torch.inf


def poison_loss(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.b_dec[0, 0] = torch.nan


def poison_gradient(trainer: Trainer) -> None:
    trainer.model.b_dec.register_hook(lambda grad: grad * torch.inf)


@pytest.mark.parametrize(
    ("poison", "step", "message"),
    [
        (poison_moments, 9, r"weights or moments \(.*\) is no longer finite at step 10"),
        (poison_loss, 7, r"the loss \(reconstruction, aux_k\) is no longer finite at step 7"),
        (poison_gradient, 8, r"the gradient \(gradient of b_dec\) is no longer finite at step 8"),
    ],
)
def test_what_is_not_finite_stops_the_run_before_it_is_saved(
    cached: Path, poison: Callable[[Trainer], None], step: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, lambda trainer: poison(trainer) if trainer.state.step == step else None)
    fix = r"; lower optim\.lr.*last good checkpoint: runs/bad/checkpoints/step_5"
    with pytest.raises(UserError, match=message + fix):
        train.run(compose("train", [*TOPK, "name=bad"]))
    assert [path.name for path in Path("runs/bad/checkpoints").iterdir()] == ["step_5"]
    assert not Path("runs/bad/final").exists()


def test_a_run_that_diverges_stops_with_the_checkpoint_from_before(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.health.STEPS", 6)

    before_step(monkeypatch, lambda trainer: throw(trainer) if trainer.state.step == 8 else None)
    message = r"\(reconstruction\) has diverged at step 14: .*last good checkpoint: runs/wild/checkpoints/step_5\)"
    with pytest.raises(UserError, match=message):
        train.run(compose("train", [*TOPK, "name=wild"]))
    assert {path.name for path in Path("runs/wild/checkpoints").iterdir()} == {"step_5", "step_10"}
    train.run(compose("train", ["name=wild", "train.diverged=null"]))
    assert runs.finished(Path("runs/wild"))
    assert checkpoint.newest(Path("runs/wild")) == Path("runs/wild/checkpoints/step_20")
