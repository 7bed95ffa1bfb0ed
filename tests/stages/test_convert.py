"""A TopK or BatchTopK run as JumpReLU: the same weights, thresholds that fire as often; and training that goes on."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline
from pipeline.config import compose
from pipeline.core.activations import FixedThreshold, JumpReLU
from pipeline.data.cache import Cache
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.stages import convert, evaluate, train
from pipeline.train import artifact, calibrate

RULES = ["topk", "batchtopk", "batchtopk_across"]
WAYS = ["per_feature", "per_layer"]
TUNE = ["arch.d_features=33", "train.n_steps=2", "train.n_tokens=null", "train.batch_tokens=128"]


def inputs(split: Split) -> Tensor:
    """x [n, L, D] of a held-out split in the model's units."""
    cache = Cache.open(next(Path("cache").iterdir()))
    _, resid_mid, _ = cache.held_out(split)
    return cache.norm(resid_mid.float())


def counts_by_rule(run: str) -> Tensor:
    """How often the training rule fires each feature on the calibration split. [L, F]"""
    exact = artifact.read(run).exact()
    assert exact is not None
    return calibrate.firing_counts(exact, inputs(Split.calibration), batch=128, seed=0)


@pytest.mark.parametrize("rule", RULES)
def test_firing_counts_are_equal_per_feature_before_and_after(finished: Path, rule: str) -> None:
    convert.run(compose("convert", [f"run={rule}", "to=new"]))
    clt, x = pipeline.load("runs/new"), inputs(Split.calibration)
    fires = (clt(x).features > 0).sum(dim=0)
    before = counts_by_rule(f"runs/{rule}")
    # Equal rows (the same first token of a context) have equal pre-activations, which no threshold takes apart.
    ordered = clt.encode(x).sort(dim=0, descending=True).values
    last, next_one = (ordered.gather(0, (before - 1 + j).clamp(min=0)[None])[0] for j in (0, 1))
    tied = (last - next_one).abs() <= 1e-6 * last.abs()
    assert torch.equal(fires[~tied], before[~tied])
    assert (before > 0).all()
    assert (~tied).sum() >= 85
    assert (fires - before).abs().max() <= 3


@pytest.mark.parametrize("rule", RULES)
def test_one_threshold_a_layer_matches_the_layers_count(finished: Path, rule: str) -> None:
    convert.run(compose("convert", [f"run={rule}", "to=new", "convert.thresholds=per_layer"]))
    clt = pipeline.load("runs/new")
    assert isinstance(clt.activation, FixedThreshold)
    theta = clt.activation.threshold
    assert torch.equal(theta, theta[:, :1].expand_as(theta))
    assert theta[:, 0].unique().numel() == 3
    fires = (clt(inputs(Split.calibration)).features > 0).sum(dim=(0, 2))
    assert torch.equal(fires, counts_by_rule(f"runs/{rule}").sum(dim=1))


@pytest.mark.parametrize("way", WAYS)
def test_a_converted_run_has_the_old_weights_and_is_measured_like_any_other(
    finished: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline"):
        target = convert.run(compose("convert", ["run=runs/batchtopk", "to=new", f"convert.thresholds={way}"]))
    assert target == Path("runs/new")
    before, after = pipeline.load("runs/batchtopk"), pipeline.load("runs/new")
    assert all(torch.equal(a, b) for a, b in zip(before.weights().values(), after.weights().values(), strict=True))
    config = json.loads(Path("runs/new/final/config.json").read_text())
    assert config["activation"]["name"] == "jumprelu"
    assert config["converted"]["from"] == "runs/batchtopk"
    assert config["converted"]["activation"]["name"] == "batchtopk"
    metrics = json.loads(evaluate.run(compose("eval", ["run=new"])).read_text())
    assert metrics["exact"] is None
    measured = config["calibration"]["threshold"]
    assert metrics["l0"]["total"] == pytest.approx(measured["l0"], rel=1e-6)
    assert metrics["fvu"]["pooled"] == pytest.approx(measured["fvu"], rel=1e-4)
    # What it says is what it wrote, for both rules.
    [said] = [re.findall(r"L0 (\S+), FVU (\S+)", line) for line in caplog.messages if "held out" in line]
    exact = config["calibration"]["exact"]
    assert said == [(f"{exact['l0']:.2f}", f"{exact['fvu']:.4f}")]
    assert exact["l0"] == pytest.approx(12, rel=0.01)


def test_the_same_conversion_again_costs_nothing_and_another_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = convert.run(compose("convert", ["run=topk"]))
    assert target == Path("runs/topk-jumprelu")
    monkeypatch.setattr(calibrate, "measure", lambda *args: pytest.fail("measured again"))
    assert convert.run(compose("convert", ["run=topk"])) == target
    with pytest.raises(UserError, match=r"convert\.thresholds=per_layer \(was per_feature\).*choose another to="):
        convert.run(compose("convert", ["run=topk", "convert.thresholds=per_layer"]))


def test_a_path_is_taken_as_it_is(finished: Path) -> None:
    assert convert.run(compose("convert", ["run=topk", "to=elsewhere/mine"])) == Path("elsewhere/mine")
    assert pipeline.load("elsewhere/mine").config is not None


def test_a_rule_with_thresholds_of_its_own_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match=r"runs/relu was trained with activation=relu.*only topk"):
        convert.run(compose("convert", ["run=relu", "to=new"]))
    assert not Path("runs/new").exists()


# Going on from a finished run


def begun(*words: str) -> tuple[Any, Any]:
    """(transcoder, its inputs' map) as the first step of a run with these words sees them."""
    seen: list[Any] = []

    def stop(self: Any, batches: Any) -> Any:
        seen.append((self.model, self.inputs))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.train.loop.Trainer.fit", stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(compose("train", [*TUNE, *words]))
    return seen[0]


@pytest.mark.parametrize("norm", ["rms", "standard"])
@pytest.mark.parametrize("rule", ["jumprelu", "batchtopk"])
def test_a_run_begins_where_the_finished_one_ended_in_its_own_units(finished: Path, norm: str, rule: str) -> None:
    convert.run(compose("convert", ["run=topk", "to=new"]))
    model, prepare = begun(f"activation={rule}", "train.init_from=new", f"train.norm={norm}", "name=on")
    old, x = pipeline.load("runs/new"), inputs(Split.evaluation)
    assert model.options.d_features == 33
    with torch.no_grad():
        h = model.encode(prepare.scaling.x(x))
        torch.testing.assert_close(h, old.encode(x), rtol=1e-3, atol=1e-4)
        features = torch.rand(x.shape[0], 3, 33)
        decoded = prepare.scaling.y_inverse(model.decode(features, prepare.scaling.x(x)))
        torch.testing.assert_close(decoded, old.decode(features, x), rtol=1e-3, atol=1e-4)
    if rule == "jumprelu":
        assert isinstance(model.activation, JumpReLU)
        assert isinstance(old.activation, FixedThreshold)
        torch.testing.assert_close(model.activation.threshold, old.activation.threshold.clamp(min=1e-4))


def test_thresholds_of_zero_get_a_floor_and_that_is_said(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline"):
        model, _ = begun("activation=jumprelu", "train.init_from=relu", "name=on")
    torch.testing.assert_close(model.activation.threshold, torch.full((3, 33), 1e-4))
    assert "99 of its thresholds are below 0.0001 and begin there" in caplog.text


def test_a_converted_run_is_fine_tuned_and_continued_without_its_source(finished: Path) -> None:
    convert.run(compose("convert", ["run=batchtopk", "to=new"]))
    words = [*TUNE, "activation=jumprelu", "loss=tanh", "train.init_from=new", "train.norm=standard", "name=tuned"]
    train.run(compose("train", words))
    tuned = json.loads(Path("runs/tuned/final/config.json").read_text())
    start = json.loads(Path("runs/new/final/config.json").read_text())
    # Two steps of a warm-up: still the reconstruction that it began with, far from a fresh one.
    before, after = (config["calibration"]["threshold"]["fvu"] for config in (start, tuned))
    assert after == pytest.approx(before, rel=0.15)
    assert tuned["train"]["init_from"] == "new"
    shutil.rmtree("runs/new")
    shutil.rmtree("runs/tuned/final")
    train.run(compose("train", words))
    assert json.loads(Path("runs/tuned/final/config.json").read_text()) == tuned


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arch.d_features=32"], r"another shape: arch.d_features=32 \(there 33\)"),
        (["arch.site=resid_mid"], r"arch.site=resid_mid \(there mlp_in\)"),
        (["arch.init=uniform"], "arch.init has no meaning with train.init_from"),
        (["train.init_from=nowhere"], "nowhere holds no finished transcoder"),
    ],
)
def test_another_shape_is_refused_before_anything_is_written(finished: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.run(compose("train", [*TUNE, "train.init_from=topk", *words, "name=refused"]))
    assert not Path("runs/refused").exists()
