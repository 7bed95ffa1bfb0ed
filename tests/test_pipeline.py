"""The whole pipeline on a tiny random GPT-2 and a local text: extract, train, eval, and what goes wrong on the way."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from pipeline.config import Request, compose, launch
from pipeline.core.metrics import as_plain
from pipeline.data.models import load
from pipeline.data.options import ModelOptions
from pipeline.errors import UserError
from pipeline.interp import contexts
from pipeline.stages import evaluate, extract, train

SHORT = ["arch.d_features=33", "train.n_steps=20", "train.n_tokens=null", "train.batch_tokens=128", "log.every=5"]
SHORT += ["train.checkpoint_every=640"]
TRAIN = ["+experiment=batchtopk", "activation.k=4", *SHORT]


@pytest.fixture(scope="module")
def source(tiny_gpt2: Path, english: Path) -> list[str]:
    return [
        "model=local",
        f"model.path={tiny_gpt2}",
        "dataset=text",
        f"dataset.path={english}",
        "dataset.context=24",
        "dataset.n_tokens=3k",
        "dataset.held_out=20",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, source: list[str]) -> Path:
    """A working directory with a cache and a finished and measured run `a`."""
    place = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        extract.run(compose("extract", source))
        train.run(compose("train", [*TRAIN, "name=a"]))
        evaluate.run(compose("eval", []))
    return place


def test_the_metrics_have_the_documented_keys_and_make_sense(work: Path) -> None:
    metrics = json.loads(Path("runs/a/eval/metrics.json").read_text())
    assert metrics["split"] == "evaluation"
    assert metrics["n_tokens"] == 20 * 23
    for key in ("l0", "dead_fraction"):
        assert len(metrics[key]["per_layer"]) == 3
        assert metrics[key]["total"] >= 0
    assert metrics["l0"]["total"] == pytest.approx(sum(metrics["l0"]["per_layer"]))
    for rule in (metrics, metrics["exact"]):
        assert rule["fvu"]["pooled"] + rule["explained_variance"]["pooled"] == pytest.approx(1)
        assert 0 < rule["fvu"]["pooled"] < 1
    assert metrics["exact"]["l0"]["total"] == pytest.approx(4 * 3, rel=0.01)
    replacement = metrics["replacement"]
    assert 0 < replacement["kl"] < replacement["kl_mean_ablation"]
    assert 0 < replacement["top1"] <= 1
    assert replacement["kl_recovered_mean_ablation"] == pytest.approx(
        1 - replacement["kl"] / replacement["kl_mean_ablation"]
    )
    assert metrics["exact"]["replacement"] is None, "BatchTopK looks at other tokens: it cannot run live"
    assert "other tokens" in metrics["exact"]["no_replacement"]


OF_A_RULE = {
    *("l0", "dead_fraction", "fvu", "explained_variance", "explained_variance_centred", "cosine", "bias"),
    *("relative_norm", "density_histogram", "dense_features", "replacement", "worst_contexts", "ci95"),
}
OF_A_RUN = {
    *("schema", "n_tokens", "n_contexts", "split", "seconds", "decoder_norm_histogram", "threshold_histogram"),
    *("replacement_curves", "faithfulness", "tasks", "world", "exact"),
}


def test_every_key_is_there_and_intervals_hold_what_they_are_of(work: Path) -> None:
    metrics = json.loads(Path("runs/a/eval/metrics.json").read_text())
    assert metrics.keys() == OF_A_RULE | OF_A_RUN
    assert metrics["exact"].keys() == OF_A_RULE | {"no_replacement"}
    assert (metrics["schema"], metrics["n_contexts"], metrics["tasks"], metrics["world"]) == (2, 20, None, None)
    for rule in (metrics, metrics["exact"]):
        for group, name in (("l0", "total"), ("fvu", "pooled"), ("cosine", "pooled"), ("relative_norm", "pooled")):
            low, high = rule["ci95"][group][name]
            assert low < rule[group][name] < high
        assert "dead_fraction" not in rule["ci95"]
        assert len(rule["ci95"]["l0"]["per_layer"]) == 3
    for name in ("kl", "top1", "top5", "ce_original", "delta_ce", "kl_recovered_zero_ablation"):
        low, high = metrics["ci95"]["replacement"][name]
        assert low <= metrics["replacement"][name] <= high
    assert len(metrics["replacement"]["kl_by_position"]) == len(metrics["ci95"]["replacement"]["kl_by_position"]) == 23
    assert metrics["bias"]["pooled"] > 0
    worst = metrics["worst_contexts"]
    assert len(worst) == 10
    assert [context["kl"] for context in worst] == sorted((context["kl"] for context in worst), reverse=True)
    assert {len(context["tokens"]) for context in worst} == {len(context["kl_per_token"]) for context in worst} == {24}


def test_the_sums_of_the_contexts_give_the_numbers(work: Path) -> None:
    metrics = json.loads(Path("runs/a/eval/metrics.json").read_text())
    measured = contexts.read(Path("runs/a/eval/contexts.npz"))
    assert len(measured.context_hash) == len(set(measured.context_hash.tolist())) == 20
    for rule, numbers in (("threshold", metrics), ("exact", metrics["exact"])):
        found = as_plain(contexts.numbers(contexts.totals(measured.sums), rule))
        assert found["fvu"] == numbers["fvu"]
        assert found["l0"]["per_layer"] == numbers["l0"]["per_layer"]
    found = as_plain(contexts.numbers(contexts.totals(measured.sums), "threshold"))["replacement"]
    assert {key: metrics["replacement"][key] for key in found} == found


def test_without_resamples_there_are_no_intervals(work: Path) -> None:
    words = ["run=runs/a", "eval.bootstrap=0", "eval.n_contexts=2", "eval.curves=false", "eval.faithfulness=false"]
    metrics = json.loads(evaluate.run(compose("eval", words)).read_text())
    assert (
        metrics["ci95"] is metrics["exact"]["ci95"] is metrics["faithfulness"] is metrics["replacement_curves"] is None
    )
    assert metrics["n_tokens"] == 2 * 23
    with pytest.raises(UserError, match=r"eval.bootstrap=-1 is no number of resamples; give 2000"):
        evaluate.run(compose("eval", ["run=runs/a", "eval.bootstrap=-1"]))


def test_the_log_has_the_promised_keys_and_its_loss_is_the_sum_of_its_terms(work: Path) -> None:
    lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    for line in lines:
        assert {"step", "tokens", "loss", "loss/reconstruction", "fvu", "l0", "dead_fraction", "lr"} <= line.keys()
        terms = [value for key, value in line.items() if key.startswith("loss/")]
        assert line["loss"] == pytest.approx(sum(terms), rel=1e-6)
        assert line["tokens"] == 128 * line["step"]


def test_a_loaded_run_reconstructs_the_models_own_mlp_outputs(work: Path, tiny_gpt2: Path) -> None:
    """From tokens through plain Hugging Face hooks, not through the cache: units, site and folding at once."""
    from transformers import GPT2LMHeadModel

    clt = pipeline.load("runs/a")
    hf = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    x: list[torch.Tensor] = []
    y: list[torch.Tensor] = []
    for block in hf.transformer.h:
        block.mlp.register_forward_pre_hook(lambda module, args: x.append(args[0]))
        block.mlp.register_forward_hook(lambda module, args, out: y.append(out))
    cache = next(Path("cache").iterdir())
    import zarr

    tokens = torch.from_numpy(zarr.open_array(cache / "evaluation" / "tokens", mode="r")[:]).long()
    with torch.no_grad():
        hf(tokens)
        stacked = [torch.stack([layer[:, 1:].flatten(0, 1) for layer in layers], dim=1) for layers in (x, y)]
        out = clt(stacked[0])
    error = (out.y_hat - stacked[1]).double().square().sum()
    spread = (stacked[1] - stacked[1].mean(dim=0)).double().square().sum()
    measured = json.loads(Path("runs/a/eval/metrics.json").read_text())["fvu"]["pooled"]
    # The cache holds bfloat16, so a feature near its threshold may fall on the other side.
    assert float(error / spread) == pytest.approx(measured, rel=0.02)


def test_the_same_extraction_again_does_not_load_the_model(
    work: Path, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.models.load", lambda options: pytest.fail("the model was loaded"))
    before = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*")}
    extract.run(compose("extract", source))
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*")} == before


def test_a_sweep_shares_the_cache_and_never_loads_the_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.models.load", lambda options: pytest.fail("the model was loaded"))
    words = (*TRAIN, "train.n_steps=3", "activation.k=2,3", "train.seed=0,1", "name=sweep")
    assert launch("train", Request(overrides=words, multirun=True)) == 0
    runs = [json.loads((Path("runs/sweep") / str(n) / "final/config.json").read_text()) for n in range(4)]
    assert [run["activation"]["k"] for run in runs] == [2, 2, 3, 3]
    assert len(list(Path("cache").iterdir())) == 1


def run_files(name: str) -> dict[str, bytes]:
    """Everything that has to repeat: not the timings."""
    root = Path("runs") / name
    files = (path for path in root.rglob("*") if path.is_file() and path.name not in {"timings.jsonl", "config.yaml"})
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_seed_gives_the_same_bytes_twice_and_another_seed_others(work: Path) -> None:
    train.run(compose("train", [*TRAIN, "name=b"]))
    first, second = run_files("a"), run_files("b")
    first = {name: data for name, data in first.items() if not name.startswith("eval/")}
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert not different
    train.run(compose("train", [*TRAIN, "name=c", "train.seed=1"]))
    assert run_files("c")["final/transcoder.safetensors"] != first["final/transcoder.safetensors"]


ANNEALED = ["activation.k=4", "activation.k_start=20", "activation.k_anneal=0.8", "activation.rank=norm"]
RESAMPLED = ["loss.resample_every=384", "loss.resample_until=0.9", "train.dead_window=256"]
CONTROLLED = ["loss.target_l0=9", "loss.sparsity_form=l1"]
L0_TARGET = ["loss=l0", "loss.target_l0=9", "loss.schedule.l0.shape=delayed", "loss.schedule.l0.delay=0.2"]


@pytest.mark.parametrize(
    "words",
    [
        ["+experiment=topk"],
        ["+experiment=batchtopk"],
        ["+experiment=sparse"],
        ["+experiment=jumprelu"],
        ["+experiment=relu"],
        ["+experiment=topk", *ANNEALED, *RESAMPLED],
        ["+experiment=batchtopk", *ANNEALED, "loss=multi_topk", "loss.layer_weighting=inverse_variance"],
        ["+experiment=batchtopk_across", *ANNEALED, *RESAMPLED],
        ["+experiment=topk", "activation=groupmax", "activation.k_per_layer=[3,11,1]", "activation.k=null"],
        ["+experiment=jumprelu", *CONTROLLED, *RESAMPLED],
        ["+experiment=jumprelu", *L0_TARGET],
        ["+experiment=relu", *CONTROLLED],
    ],
    ids=" ".join,
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    work: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped in mid-epoch, between two lines of the log, by Ctrl-C."""
    from pipeline.train.loop import Trainer

    words = [*words, *SHORT]
    caplog.set_level("INFO", logger="pipeline")
    train.run(compose("train", [*words, "name=whole"]))
    restarts = [line for line in caplog.messages if "begin again" in line]
    assert bool(restarts) == ("train.dead_window=256" in words)

    step = Trainer.step

    def interrupted(self: Trainer, *args: Any) -> Any:
        if self.state.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    config = compose("train", [*words, "name=stopped"])
    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(config)
    monkeypatch.setattr(Trainer, "step", step)
    with Path("runs/stopped/metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "tok')  # a line that a crash cut short
    assert Path("runs/stopped/checkpoints/step_8").exists()
    assert not Path("runs/stopped/final").exists()
    train.run(compose("train", [*words, "name=stopped"]))
    assert run_files("stopped") == run_files("whole")


def test_the_log_says_what_lambda_and_k_were_in_force(work: Path) -> None:
    train.run(compose("train", ["+experiment=topk", *ANNEALED, *SHORT, "log.every=1", "name=k"]))
    lines = [json.loads(line) for line in Path("runs/k/metrics.jsonl").read_text().splitlines()]
    assert [line["k"] for line in lines] == [20 - step for step in range(16)] + [4] * 4
    assert all(line["l0"] <= 3 * line["k"] for line in lines)
    words = ["+experiment=jumprelu", "loss.target_l0=9", "loss.sparsity=0.05"]
    train.run(compose("train", [*words, *SHORT, "log.every=1", "name=lambda"]))
    lines = [json.loads(line) for line in Path("runs/lambda/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lambda"] == pytest.approx(0.05 / 50)
    assert "l0_aim" not in lines[0], "no batch was seen"
    assert lines[1]["l0_aim"] < lines[0]["l0"]
    assert all(line["l0_aim"] >= following["l0_aim"] for line, following in itertools.pairwise(lines[1:]))
    assert [line["l0_aim"] for line in lines[11:]] == pytest.approx([9] * 9)


def test_the_log_says_which_share_of_the_layers_ran_sparse(work: Path) -> None:
    words = ["+experiment=relu", "loss.target_l0=null", *SHORT, "log.every=1"]
    for setting, shares in (("always", {1.0}), ("never", {None}), ("auto", {0.0, 0.5, 1.0})):
        train.run(compose("train", [*words, f"train.sparse={setting}", f"name={setting}"]))
        lines = [json.loads(line) for line in Path(f"runs/{setting}/metrics.jsonl").read_text().splitlines()]
        assert {line.get("sparse_layers") for line in lines} <= shares
        assert len(lines) == 20


@pytest.mark.slow
def test_a_training_killed_at_any_instant_goes_on_to_the_same_bytes(work: Path) -> None:
    words = [*TRAIN, "train.n_steps=400"]
    train.run(compose("train", [*words, "name=whole"]))
    command = [sys.executable, "-m", "pipeline", "train", *words, "name=killed"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for attempt in range(4):
        process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
        steps = 60 * (attempt + 1)
        while process.poll() is None and last_step("killed") < steps:
            time.sleep(0.01)
        process.kill()
        process.wait()
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert run_files("killed") == run_files("whole")


def last_step(name: str) -> int:
    found = [int(path.name.removeprefix("step_")) for path in Path(f"runs/{name}/checkpoints").glob("step_*")]
    return max(found, default=0)


def test_a_finished_run_says_so_and_other_settings_are_refused(work: Path, source: list[str]) -> None:
    before = run_files("a")
    train.run(compose("train", [*TRAIN, "name=a"]))
    assert run_files("a") == before
    # Named in full and in another spelling, it is the same run.
    train.run(compose("train", [*source, "dataset.n_tokens=3000", *TRAIN, "name=a"]))
    assert run_files("a") == before
    with pytest.raises(UserError, match=r"activation\.k=5 \(was 4\)"):
        train.run(compose("train", [*TRAIN, "activation.k=5", "name=a"]))


def test_both_sites_come_from_one_cache(work: Path) -> None:
    train.run(compose("train", [*TRAIN, "arch.site=resid_mid", "name=resid"]))
    evaluate.run(compose("eval", ["run=runs/resid"]))
    metrics = json.loads(Path("runs/resid/eval/metrics.json").read_text())
    assert 0 < metrics["replacement"]["kl"] < metrics["replacement"]["kl_mean_ablation"]


def test_another_text_is_measured_without_the_cache(work: Path, tmp_path: Path, english: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(english.read_text().replace("river", "forest"))
    shutil.rmtree("cache")
    words = ["run=runs/a", "dataset=text", f"dataset.path={other}", "dataset.context=24", "dataset.held_out=15"]
    file = evaluate.run(compose("eval", words))
    metrics = json.loads(file.read_text())
    assert file == Path("runs/a/eval/metrics-text.json")
    assert metrics["n_tokens"] == 15 * 23
    assert 0 < metrics["fvu"]["pooled"] < 1


def test_an_evaluation_whose_cache_is_gone_names_the_command_that_makes_it(work: Path) -> None:
    shutil.rmtree("cache")
    with pytest.raises(UserError, match="clt extract model=local"):
        evaluate.run(compose("eval", ["run=runs/a"]))


def test_training_without_a_cache_names_the_command_that_makes_it(
    tmp_path: Path, source: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="clt extract"):
        train.run(compose("train", [*TRAIN, "name=a"]))
    with pytest.raises(UserError, match="clt extract model=local"):
        train.run(compose("train", [*source, *TRAIN, "name=a"]))
    assert not list(tmp_path.iterdir()), "a refused start leaves nothing"


def test_other_weights_than_the_run_was_trained_on_are_refused(
    work: Path, tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.data.models.load",
        lambda options, load=load: _changed(load(ModelOptions(name="local", path=str(tiny_gpt2)))),
    )
    with pytest.raises(UserError, match="other weights"):
        evaluate.run(compose("eval", ["run=runs/a"]))


def _changed(lm: Any) -> Any:
    lm.weights_hash = lambda: "0" * 64
    return lm


def test_a_flipped_bit_stops_training_with_the_file_and_the_fix(work: Path) -> None:
    cache = next(Path("cache").iterdir())
    chunk = next(path for path in (cache / "mlp_out").rglob("*") if path.is_file() and path.name != "zarr.json")
    data = bytearray(chunk.read_bytes())
    data[1000] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=r"mlp_out.*clt extract"):
        train.run(compose("train", [*TRAIN, "name=flipped"]))
    assert not Path("runs/flipped/final").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["activation.k=34"], "between 1 and arch.d_features=33"),
        (["train.batch_tokens=4000"], "between 1 and the cache's 3000 rows"),
        (["train.n_tokens=1k"], "once"),
        (["activation.threshold=0.1"], "no meaning for activation=batchtopk"),
        (["loss.pre_act=1", "loss.pre_act_form=january"], "needs thresholds"),
        (["arch.d_features=5000"], "draws 5000 different rows"),
        (["optim.lr=-1"], "must be above 0"),
        (["train.seed=-1"], "must not be negative"),
        (["train.batch_tokens=1"], "leaves nothing to compete with; use activation=topk"),
        (["loss.target_l0=30"], "use activation.k"),
        (["activation.k_per_layer=[1,2]", "activation.k=null"], "has 2 numbers for 3 layers"),
        (["activation.k_start=3", "activation.k_anneal=0.5"], "k_start=3 must lie between"),
        (["loss.resample_every=2k"], "never comes in the 1,280 tokens"),
        (["loss.resample_every=640", "train.dead_window=2000"], "no feature counts as dead before"),
        (["loss.schedule.aux_k.shape=delayed", "loss.schedule.aux_k.delay=1"], "would never begin"),
        (["loss.aux_k=-1"], "loss.aux_k=-1.0 must not be negative"),
        (["activation=groupmax"], "equal groups of arch.d_features=33"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    work: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train.run(compose("train", [*TRAIN, *words, "name=refused"]))
    assert not Path("runs/refused").exists()


def test_a_loss_that_diverges_stops_the_run_and_says_why(work: Path) -> None:
    with pytest.raises(UserError, match="no longer finite at step"):
        train.run(compose("train", [*TRAIN, "optim.lr=1e30", "name=wild"]))
    assert not Path("runs/wild/final").exists()
