"""Held-out measures in the log of a run."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import compose
from pipeline.data.cache import Cache
from pipeline.errors import UserError
from pipeline.stages import train
from pipeline.train.loop import Trainer

RUN = ["arch.d_features=33", "train.n_steps=20", "train.n_tokens=null", "train.batch_tokens=128", "log.every=3"]
RUN += ["train.checkpoint_every=640", "+experiment=batchtopk", "activation.k=4"]


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def train_as(name: str, *words: str) -> None:
    train.run(compose("train", [*RUN, f"name={name}", *words]))


def test_every_n_steps_a_line_says_what_the_run_does_on_held_out_rows_and_the_weights_are_the_same(
    cached: Path,
) -> None:
    train_as("with", "log.held_out_every=7", "log.held_out_rows=200")
    train_as("without", "log.held_out_every=null")
    found = lines("with")
    assert [line["step"] for line in found] == [3, 6, 7, 9, 12, 14, 15, 18, 20]
    measured = {line["step"]: line for line in found if "held_out/fvu" in line}
    assert list(measured) == [7, 14, 20]
    for line in measured.values():
        assert line["held_out/n_tokens"] == 200
        assert line["held_out/explained_variance"] == 1 - line["held_out/fvu"]
        assert line["held_out/l0"] == pytest.approx(4 * 3)
        assert 0 <= line["held_out/dead_fraction"] < 1
    plain = lines("without")
    assert [line["step"] for line in plain] == [3, 6, 9, 12, 15, 18, 20]
    theirs = {line["step"]: line for line in found}
    for line in plain:
        assert {key: theirs[line["step"]][key] for key in line} == line
    for file in ("transcoder.safetensors", "model.safetensors", "optimizer.safetensors", "state.safetensors"):
        a, b = (next(Path("runs", name).rglob(file)).read_bytes() for name in ("with", "without"))
        assert a == b, file


def test_the_best_checkpoints_are_chosen_by_the_number_in_the_log(cached: Path) -> None:
    train_as("best", "log.held_out_every=5", "train.keep_best=4")
    logged = {line["step"]: line["held_out/fvu"] for line in lines("best") if "held_out/fvu" in line}
    states = [json.loads(path.read_text()) for path in Path("runs/best/checkpoints").glob("*/state.json")]
    assert {state["step"]: state["held_out_fvu"] for state in states} == logged
    assert list(logged) == [5, 10, 15, 20]


def test_no_more_of_the_cache_is_read_than_is_measured_and_that_once(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    rows = Cache.held_out_rows
    monkeypatch.setattr(Cache, "held_out_rows", lambda self, split, n=None: asked.append(n) or rows(self, split, n))
    train_as("read", "log.held_out_every=2", "log.held_out_rows=150")
    assert asked == [150, None, None]  # the others are the thresholds' and the last measure's


def test_it_is_shown_while_the_run_goes_on(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pipeline")
    train_as("shown", "log.held_out_every=7")
    last = next(message for message in caplog.messages if message.startswith("train: 2,560 tok"))
    assert f"held-out {lines('shown')[-1]['held_out/fvu']:.4f}" in last


@pytest.mark.parametrize("words", ["log.held_out_rows=0", "log.held_out_every=0"])
def test_what_cannot_be_measured_is_refused_before_anything_is_written(cached: Path, words: str) -> None:
    with pytest.raises(UserError, match=words.replace(".", r"\.") + " must be"):
        train_as("refused", words)
    assert not Path("runs").exists()


def test_a_run_from_before_there_were_held_out_lines_goes_on_with_them(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def cut(self: Trainer, *args: Any) -> Any:
        if self.state.step == 11:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            train_as("old")
    config = Path("runs/old/config.yaml")
    kept = [line for line in config.read_text().splitlines(keepends=True) if not line.strip().startswith("held_out_")]
    config.write_text("".join(kept))
    train.run(compose("train", ["name=old"]))
    assert "held_out/fvu" in lines("old")[-1]
