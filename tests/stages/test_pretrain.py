"""`clt pretrain` from the settings to the finished directory."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data import models
from pipeline.data.options import Content, DatasetKind, DatasetOptions, ModelOptions
from pipeline.errors import UserError
from pipeline.stages import pretrain as stage
from pipeline.stages.options import PretrainConfig
from pipeline.train import world_report
from pipeline.train.options import LmOptions, OptimOptions
from tests.train.tiny_lm import Stop, stop_at

TINY = LmOptions(
    name="tiny",
    n_layers=2,
    d_model=12,
    n_heads=3,
    d_mlp=20,
    vocab_size=290,
    n_steps=12,
    batch_tokens=40,
    sample_tokens=9,
)
ROOT = Path(__file__).resolve().parents[2]


def world_config(to, **changes):
    dataset = DatasetOptions(name="world", kind=DatasetKind.world, n_tokens="2k", held_out=2)
    return PretrainConfig(lm=replace(TINY, n_steps=4, batch_tokens=64, **changes), dataset=dataset, to=str(to))


def text_config(path, to, **changes):
    dataset = DatasetOptions(name="text", kind=DatasetKind.text, n_tokens="all", path=str(path), context=20)
    return PretrainConfig(lm=replace(TINY, **changes), dataset=dataset, to=str(to))


@pytest.mark.slow
def test_the_world_in_its_own_words_is_reported_on(tmp_path, monkeypatch):
    monkeypatch.setattr(world_report, "N_DOCUMENTS", 600)
    to = stage.run(world_config(tmp_path / "new" / "lm"))
    assert to == tmp_path / "new" / "lm"
    report = json.loads((to / "world.json").read_text())
    assert report["command"].startswith("clt pretrain lm=tiny dataset=world dataset.n_tokens=2k")
    assert report["lm"]["seed"] == 0
    assert report["training"].keys() == {"n_parameters", "n_steps", "n_tokens", "loss", "held_out_loss"}
    # The model has seen 256 tokens: it knows nothing, and the generator's own loss is far below.
    assert report["losses"]["held_out_loss"] > 5 > 1.1 > report["losses"]["floor"] > 0.8
    assert max(score["accuracy"] for score in report["tasks"].values()) < 0.9
    assert report["swap_layer_0_mlp"]["capital"]["n"] == 1560
    assert [path.name for path in to.parent.iterdir()] == ["lm"]


def test_a_model_learns_a_text_and_says_how_well(english, tmp_path, caplog):
    caplog.set_level("INFO")
    config = text_config(english, tmp_path / "lm", n_steps=None, n_tokens="40k", batch_tokens=400, eval_every=60)
    config.lm.optim = OptimOptions(name="adamw", lr=1e-2)
    to = stage.run(config)
    report = json.loads((to / "pretrain.json").read_text())
    held_out, trained = report["held_out"], report["training"]
    assert 1.0 < held_out["loss"] < held_out["unigram_entropy"] - 0.4 < 6
    assert (trained["n_steps"], trained["n_tokens"]) == (100, 40_000)
    # 290 tokens stand for one to four letters each.
    assert held_out["loss"] / 0.693 / 4 < held_out["bits_per_byte"] < held_out["loss"] / 0.693
    assert report["samples"][0]["prompt"] == ""
    assert report["samples"][1]["prompt"] in english.read_text()
    lines = [json.loads(line) for line in (to / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 60, 100]
    assert [line["tokens"] for line in lines] == [20_000, 24_000, 40_000]
    assert lines[0]["held_out_loss"] is None
    assert lines[1]["held_out_loss"] > lines[2]["held_out_loss"] == held_out["loss"]
    assert f"next: clt extract model=local model.path={to} dataset=text" in caplog.text
    assert "dataset.n_tokens=all" in caplog.text  # it has less than a first cache takes
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]

    model = models.load(ModelOptions(name="local", path=str(to)))
    model.check_context(20)
    assert (model.n_layers, model.d_model, model.vocab_size) == (2, 12, 290)
    text = "The quiet river, and  the 猫?\n"
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("step", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stopped_command_ends_at_the_same_bytes(step, english, tmp_path, monkeypatch):
    files = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "pretrain.json")
    straight = stage.run(text_config(english, tmp_path / "a" / "lm", checkpoint_every=5))
    taken = stop_at(step, monkeypatch)
    config = text_config(english, tmp_path / "b" / "lm", checkpoint_every=5)
    with pytest.raises(Stop):
        stage.run(config)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".lm.training"]
    again = stage.run(config)
    assert len(taken) == step + 12 - 5 * (step > 5)
    for name in files:
        assert (again / name).read_bytes() == (straight / name).read_bytes(), name
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["lm"]


def test_the_same_command_finds_the_model_there_and_other_settings_are_refused(english, tmp_path, caplog):
    caplog.set_level("INFO")
    text = tmp_path / "text.txt"
    text.write_bytes(english.read_bytes())
    to = stage.run(text_config(text, tmp_path / "lm"))
    before = {path.name: path.stat().st_mtime_ns for path in to.iterdir()}
    assert stage.run(text_config(text, tmp_path / "lm", checkpoint_every=3)) == to
    assert "already there, nothing to do" in caplog.text
    with pytest.raises(UserError, match=r"lm\.seed=1 \(was 0\); choose another to="):
        stage.run(text_config(text, tmp_path / "lm", seed=1))
    text.write_text(text.read_text() + "\n\nOne more.")
    with pytest.raises(UserError, match="the dataset's files have changed"):
        stage.run(text_config(text, tmp_path / "lm"))
    assert before == {path.name: path.stat().st_mtime_ns for path in to.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "text.txt"]


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Hardly a word.")
    with pytest.raises(UserError, match="give more text"):
        stage.run(text_config(text, tmp_path / "models" / "lm"))
    config = text_config(text, tmp_path / "models" / "lm")
    config.dataset.kind = DatasetKind.jsonl
    for config.dataset.content in (Content.tokens, Content.chat):
        with pytest.raises(UserError, match=r"needs .* tokenizer .*; name one with lm\.tokenizer="):
            stage.run(config)
    with pytest.raises(UserError, match="device 'tpu' is unknown"):
        stage.run(text_config(text, tmp_path / "models" / "lm", device="tpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_tokenizer_of_ones_own_is_used_and_kept(tiny_gpt2, english, tmp_path):
    to = stage.run(text_config(english, tmp_path / "lm", tokenizer=str(tiny_gpt2)))
    model = models.load(ModelOptions(name="local", path=str(to)))
    assert model.vocab_size == 61
    assert (
        model.tokenizer("The cat")["input_ids"]
        == models.load(ModelOptions(name="local", path=str(tiny_gpt2))).tokenizer("The cat")["input_ids"]
    )
    assert not (to / "world.json").exists()


def clt(*words, cwd, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        cwd=cwd,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(pattern, folder, process):
    for _ in range(1200):
        if any(folder.glob(pattern)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError(pattern)


@pytest.mark.slow
def test_a_killed_command_and_an_interrupted_one_go_on_to_the_same_bytes(english, tmp_path):
    words = ["pretrain", "lm=tiny", "lm.n_steps=60", "lm.checkpoint_every=10", "lm.eval_every=20", "dataset=text"]
    words += ["lm.dtype=float32", f"dataset.path={english}", "dataset.context=32"]
    straight = clt(*words, "to=straight", cwd=tmp_path)
    assert straight.wait() == 0, straight.stderr.read()

    killed = clt(*words, "to=lm", cwd=tmp_path)
    wait_for(".lm.training/checkpoints/step_*", tmp_path, killed)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "lm").exists()

    interrupted = clt(*words, "to=lm", cwd=tmp_path)
    wait_for(".lm.training/checkpoints/step_[2-5]0", tmp_path, interrupted)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait() == 130
    assert "the same command goes on" in interrupted.stderr.read()

    last = clt(*words, "to=lm", cwd=tmp_path)
    assert last.wait() == 0
    assert "going on from" in last.stderr.read()
    for name in ("model.safetensors", "pretrain.json", "tokenizer.json"):
        assert (tmp_path / "lm" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "straight"]


@pytest.mark.slow
def test_the_command_that_is_proposed_leads_to_a_measured_transcoder(english, tmp_path):
    words = ["pretrain", "lm=tiny", "lm.n_tokens=60k", "lm.n_steps=null", "lm.dtype=float32"]
    words += ["dataset=text", f"dataset.path={english}"]
    said = []
    for command in (
        words,
        None,
        ["train", "+experiment=topk", "activation.k=4", "arch.d_features=64", "train.n_tokens=20k", "name=run"],
        ["eval", "run=runs/run"],
    ):
        if command is None:
            command = shlex.split(said[-1].rpartition("next: clt ")[2])
        process = clt(*command, cwd=tmp_path)
        said.append(process.communicate()[1])
        assert process.returncode == 0, said[-1]
    metrics = json.loads((tmp_path / "runs" / "run" / "eval" / "metrics.json").read_text())
    assert 0 < metrics["replacement"]["ce_original"] < 5.7  # of 300 tokens alike: log(300)
