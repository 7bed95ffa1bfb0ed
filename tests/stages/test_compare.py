"""Experiments side by side: the same parameters, L0 and tokens, a table, and no work done twice."""

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.arch import size
from pipeline.arch.base import Dims
from pipeline.config import Request, compose, launch
from pipeline.data.cache import Cache
from pipeline.data.convert import convert
from pipeline.data.options import Codec
from pipeline.errors import UserError
from pipeline.stages import compare, compare_table, evaluate, train
from pipeline.stages.options import CompareConfig, TrainConfig

DIMS = Dims(3, 20)
SHORT = ["train.batch_tokens=128", "train.n_tokens=640", "arch.d_features=40"]
UNEVEN = ["activation.k=null", "activation.k_per_layer=[1,2,3]"]
WORDS = ["name=all", "compare.experiments=[topk,batchtopk_across]", "compare.seeds=[0,3]", "compare.l0=6", *SHORT]


def composed(*words: str) -> CompareConfig:
    config = compose("compare", words)
    assert isinstance(config, CompareConfig)
    return config


def final(run: str) -> dict[str, Any]:
    return dict(json.loads(Path(f"runs/all/{run}/final/config.json").read_text()))


def test_every_experiment_is_what_train_would_make_of_it_and_the_same_words() -> None:
    config = composed("compare.experiments=[sparse,jumprelu]", "optim.lr=0.25", "train.seed=4", "name=a,b")
    for name, job in config.jobs.items():
        alone = compose("train", [f"+experiment={name}", "optim.lr=0.25", "train.seed=4"])
        assert isinstance(alone, TrainConfig)
        for part in ("arch", "activation", "loss", "optim", "train", "model", "dataset"):
            assert getattr(job, part) == getattr(alone, part)
    assert list(config.jobs) == ["sparse", "jumprelu"]
    assert config.name == "a,b"


def test_an_experiment_that_does_not_exist_is_named_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"experiment=topkk: no such experiment; did you mean topk\?"):
        composed("compare.experiments=[topkk]")


@pytest.mark.slow
def test_experiments_are_trained_measured_and_tabled_once(
    cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline.stages.compare"):
        file = compare.run(composed(*WORDS))
    assert file == Path("runs/all/compare.md")
    rows = list(csv.DictReader(Path("runs/all/compare.csv").read_text().splitlines()))
    assert [(row["experiment"], row["seed"]) for row in rows] == [
        ("topk", "0"), ("batchtopk_across", "0"), ("topk", "3"), ("batchtopk_across", "3")
    ]  # fmt: skip
    for row in rows:
        run = f"{row['experiment']}-{row['seed']}"
        metrics = json.loads(Path(f"runs/all/{run}/eval/metrics.json").read_text())
        assert final(run)["activation"]["k"] == 2
        assert final(run)["train"]["seed"] == int(row["seed"])
        assert row["l0_basis"] == "k=2 x 3 layers"
        assert int(row["tokens"]) == 640
        assert float(row["fvu"]) == metrics["fvu"]["pooled"]
        assert float(row["kl"]) == metrics["replacement"]["kl"]
        assert float(row["fvu_own_rule"]) == metrics["exact"]["fvu"]["pooled"]
        own_kl = metrics["exact"]["replacement"]["kl"] if row["experiment"] == "topk" else ""
        assert row["kl_own_rule"] == str(own_kl), "tokens of a batch compete, a prompt has none"
        assert float(row["l0"]) == metrics["l0"]["total"]
        assert float(row["seconds"]) > 0
        assert row["tasks"] == "", "questions are of the built-in world"
    summary = json.loads(Path("runs/all/compare.json").read_text())["summary"]
    values = [float(row["fvu"]) for row in rows if row["experiment"] == "topk"]
    assert summary[0]["fvu"]["mean"] == pytest.approx(sum(values) / 2)
    assert summary[0]["fvu"]["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert file.read_text().splitlines()[2].startswith("| topk | clt | 40 |")
    assert file.read_text().splitlines() == caplog.messages[-4:]

    # Again: nothing is trained or measured. With a result gone, that one alone.
    monkeypatch.setattr(train.Trainer, "fit", lambda *args: pytest.fail("trained again"))
    before = file.read_text()
    measured: list[str] = []
    measure = evaluate.run
    monkeypatch.setattr(evaluate, "run", lambda cfg: [measured.append(cfg.run), measure(cfg)][1])
    compare.run(composed(*WORDS))
    assert (measured, file.read_text()) == ([], before)
    Path("runs/all/topk-3/eval/metrics.json").unlink()
    compare.run(composed(*WORDS))
    assert (measured, file.read_text()) == (["runs/all/topk-3"], before)


def test_other_settings_under_the_same_name_are_refused_by_run(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["name=all", "compare.experiments=[topk]", *SHORT]
    compare.run(composed(*words))
    with pytest.raises(UserError, match="topk-0 failed"):
        compare.run(composed(*words, "optim.lr=0.01"))
    assert "optim.lr=0.01 (was 0.005)" in caplog.text


def test_one_that_fails_does_not_take_the_others_along(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = composed("name=all", "compare.experiments=[topk,batchtopk]", *SHORT)
    cfg.jobs["topk"].optim.lr = 1e30
    with pytest.raises(UserError, match="topk-0 failed, the others are in runs/all"):
        compare.run(cfg)
    assert "no longer finite" in caplog.text
    [row] = csv.DictReader(Path("runs/all/compare.csv").read_text().splitlines())
    assert row["experiment"] == "batchtopk"


def test_the_width_of_each_is_solved_from_the_parameters(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[TrainConfig] = []
    monkeypatch.setattr(train, "run", lambda job: jobs.append(job) or _stop())
    with pytest.raises(UserError, match="failed"):
        compare.run(composed("compare.experiments=[topk,jumprelu]", "compare.parameters=20k", *SHORT[:2]))
    assert len(jobs) == 2
    for job in jobs:
        count = size.n_parameters(job.arch, DIMS, job.activation)
        job.arch.d_features += 1
        assert count <= 20_000 < size.n_parameters(job.arch, DIMS, job.activation)
    assert jobs[0].arch.d_features > jobs[1].arch.d_features, "thresholds are parameters too"


def _stop() -> Path:
    raise UserError("stopped; here")


@pytest.mark.parametrize("rule", ["relu", "jumprelu"])
def test_a_rule_without_k_is_steered(cached: Path, rule: str) -> None:
    job = composed(f"compare.experiments=[{rule}]", "compare.l0=6", *SHORT).jobs[rule]
    compare._match_l0(rule, job, 6, DIMS)
    assert job.loss.target_l0 == 6
    assert compare.basis(job, DIMS) == "target 6 over 3 layers"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to compare"),
        (["compare.experiments=[topk]", "compare.seeds=[]"], "compare.seeds"),
        (["compare.experiments=[topk]", "compare.seeds=[1,1]"], "must be different"),
        (["compare.experiments=[topk]", "compare.l0=7"], "use 6 or 9"),
        (["compare.experiments=[topk]", "compare.l0=6", *UNEVEN], "leave one of them out"),
        (["compare.experiments=[topk]", "activation.k=9", "arch.d_features=8"], "must lie between 1"),
        (["compare.experiments=[topk]", "arch=molt", "arch.init=transposed"], "copies decoder rows"),
        (["compare.experiments=[topk]", "compare.parameters=90"], "the least there is, more than 90"),
        (["compare.experiments=[topk]", "compare.parameters=many"], "'many' is not a count"),
        (["compare.experiments=[topk]", "train.n_tokens=null", "train.n_steps=4"], "give train.n_tokens"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused_before_anything_is_written(
    cached: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare.run(composed(*words))
    assert not Path("runs").exists()


def test_the_command_line_composes_the_experiments_too(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompareConfig] = []
    monkeypatch.setattr(compare, "run", lambda cfg: seen.append(cfg))
    assert launch("compare", Request(("compare.experiments=[topk,sparse]", "optim.lr=0.5"))) == 0
    assert list(seen[0].jobs) == ["topk", "sparse"]
    assert all(job.optim.lr == 0.5 for job in seen[0].jobs.values())
    assert seen[0].jobs["sparse"].arch.d_features == 2048
    assert seen[0].name == "compare-0"


def test_steps_that_were_taken_twice_count_once(tmp_path: Path) -> None:
    steps = [(5, 100.0), (10, 200.0), (5, 300.0), (10, 400.0), (12, 1000.0)]
    text = "".join(json.dumps({"step": step, "step_ms": ms}) + "\n" for step, ms in steps)
    (tmp_path / "timings.jsonl").write_text(text)
    assert compare_table.seconds(tmp_path / "timings.jsonl") == pytest.approx(5 * 0.3 + 5 * 0.4 + 2 * 1.0)


@pytest.mark.slow
def test_the_newest_cache_is_trained_on_in_whatever_form_it_is_stored(
    tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_cache / "cache", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    newest = convert(Cache.open(next(Path("cache").glob("*/zarr.json")).parent), Codec["int8"])
    compare.run(composed("name=all", "compare.experiments=[topk]", *SHORT))
    assert final("topk-0")["cache"]["path"] == str(newest)
