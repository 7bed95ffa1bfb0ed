"""Every architecture through the commands on a tiny random GPT-2: trained, stopped and continued, loaded, measured."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from pipeline.arch.table import ARCHS
from pipeline.config import Request, compose, launch
from pipeline.core.metrics import Reconstruction
from pipeline.data import caches
from pipeline.data.cache import Cache
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.stages import evaluate, extract, train
from pipeline.train import artifact, inputs
from pipeline.train.loop import Trainer

SHORT = ["+experiment=batchtopk", "activation.k=4", "arch.d_features=33", "train.n_steps=20", "train.n_tokens=null"]
SHORT += ["train.batch_tokens=128", "log.every=5", "train.checkpoint_every=640"]

VARIANTS = {
    **{name: [f"arch={name}"] for name in sorted(ARCHS)},
    "molt": ["arch=molt", "arch.ranks=[6,4,2]"],
    "matryoshka": ["arch=matryoshka", "arch.random_prefixes=3"],
    "tied to target": ["arch=tied", "arch.tie=target", "arch.offset=true"],
    "sae of mlp_out": ["arch=sae", "arch.site=mlp_out"],
    "crosscoder of mlp_out": ["arch=crosscoder", "arch.target=site", "arch.site=mlp_out"],
    "crosscoder of resid_mid": ["arch=crosscoder", "arch.target=site", "arch.site=resid_mid"],
}

BASIS = {
    "sae": None,
    "sae of mlp_out": "runs the MLP",
    "crosscoder": "teacher_forced",
    "crosscoder of mlp_out": "teacher_forced",
    "crosscoder of resid_mid": None,
}
"""Of the replacement; the others are live."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, english: Path) -> Path:
    """A working directory with a cache."""
    place = tmp_path_factory.mktemp("archs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        text = ["dataset=text", f"dataset.path={english}", "dataset.context=24", "dataset.n_tokens=3k"]
        extract.run(compose("extract", ["model=local", f"model.path={tiny_gpt2}", *text, "dataset.held_out=20"]))
    return place


def found() -> Cache:
    cache = caches.newest(Path("cache"))
    assert cache is not None
    return cache


def final(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(f"runs/{name}/final").iterdir()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_trained_continued_loaded_and_measured(
    work: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SHORT, *VARIANTS[variant]]
    train.run(compose("train", [*words, "name=whole"]))

    # Stopped by Ctrl-C and continued, it ends in the same bytes.
    step = Trainer.step

    def interrupted(self: Trainer, *args: Any) -> Any:
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(compose("train", [*words, "name=stopped"]))
    monkeypatch.setattr(Trainer, "step", step)
    train.run(compose("train", [*words, "name=stopped"]))
    assert final("stopped") == final("whole")

    # Its FVU on the held-out rows at its own sites is the one that is reported.
    metrics = json.loads(evaluate.run(compose("eval", ["run=runs/whole"])).read_text())
    model, cache = pipeline.load("runs/whole"), found()
    _, resid_mid, mlp_out = cache.held_out(Split.evaluation)
    options = model.options
    x, y = inputs.pair(options.site, options.target, cache.norm, resid_mid.float(), mlp_out.float())
    error = Reconstruction(*model.dims)
    error.update(model(x).y_hat, y)
    assert metrics["fvu"]["pooled"] == pytest.approx(error.fvu()["pooled"], rel=1e-5)
    assert 0 < metrics["fvu"]["pooled"] < 1
    assert metrics["exact"]["l0"]["total"] == pytest.approx(4 * model.n_sources, rel=0.01)
    assert len(metrics["l0"]["per_layer"]) == model.n_sources

    basis = BASIS.get(variant, "live")
    if basis is None:
        assert metrics["replacement"] is None
        assert f"reconstructs {options.site}, not the MLPs' outputs" in metrics["no_replacement"]
    else:
        assert metrics["replacement"]["basis"] == basis
        assert ("not comparable" in metrics["replacement"].get("note", "")) == (basis != "live")
        assert 0 < metrics["replacement"]["kl"] < metrics["replacement"]["kl_mean_ablation"]
    # Ablation is of the MLPs, whatever is reconstructed.
    expected = cache.stats("mlp_out")[0].float()
    assert torch.equal(artifact.read("runs/whole").y_mean, expected)


def test_the_log_measures_the_variance_of_what_is_reconstructed(work: Path) -> None:
    words = [*SHORT, "arch=sae", "arch.site=resid_mid", "name=sae", "train.n_steps=1", "log.every=1", "optim.lr=1e-9"]
    train.run(compose("train", words))
    line = json.loads(Path("runs/sae/metrics.jsonl").read_text().splitlines()[0])
    cache = found()
    V = inputs.variance(inputs.Statistics(*cache.stats("resid_mid")), _maps(cache))
    assert line["loss/reconstruction"] > 0
    # Both are the same error, over the variance and in the transcoder's units: layers of one scale would give V.
    _, std, rms = cache.stats("resid_mid")
    assert pytest.approx(float((std / rms[:, None]).square().sum())) == V
    assert 0.2 < line["fvu"] / (line["loss/reconstruction"] / V) < 5


def _maps(cache: Cache) -> Any:
    statistics = inputs.Statistics(*cache.stats("resid_mid"))
    return inputs.scaling(inputs.Norm.rms, statistics, statistics)


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


@pytest.mark.parametrize("words", [["arch=clt"], ["arch=tied", "arch.d_features=1000000"], ["arch=crosscoder"]])
def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(
    work: Path, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = files()
    caplog.set_level("INFO")
    train.run(compose("train", [*SHORT, "arch.init=uniform", *words, "dry_run=true"]))
    assert files() == before
    said = caplog.text
    for label in ("parameters", "FLOPs a token", "FLOPs a step", "weights", "optimiser", "peak", "passes", "disk"):
        assert label in said
    assert "0.85 passes" in said  # 20 steps of 128 tokens, 3,000 rows


def test_a_dry_run_refuses_what_a_run_would_refuse(work: Path) -> None:
    for words in (["arch.max_reach=-1"], ["optim.lr=-1"], ["activation.k=99"], ["loss.sparsity=-1"]):
        with pytest.raises(UserError):
            train.run(compose("train", [*SHORT, *words, "dry_run=true"]))


def test_a_dry_run_does_not_make_another_run_of_it(work: Path) -> None:
    config = compose("train", [*SHORT, "train.n_steps=2", "name=a"])
    train.run(config)
    before = final("a")
    file = Path("runs/a/config.yaml")
    file.write_text(file.read_text().replace("dry_run: false", "dry_run: true"))
    train.run(compose("train", [*SHORT, "train.n_steps=2", "name=a"]))
    assert final("a") == before


def test_a_silly_combination_is_one_line_and_leaves_nothing(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = files()
    words = ("+experiment=batchtopk_across", "arch=crosscoder", "name=no")
    assert launch("train", Request(overrides=words)) == 2
    assert "use activation=batchtopk" in capfd.readouterr().err
    assert files() == before
