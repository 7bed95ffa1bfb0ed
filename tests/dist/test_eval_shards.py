"""`clt eval` where ranks hold parts of one transcoder: the numbers of one process."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions
from pipeline.data import models
from pipeline.data.model_files import BUILTIN
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.dist import pieces
from pipeline.dist.options import DistOptions
from pipeline.errors import UserError
from pipeline.interp import country_swap, interventions, opening, replacement, world_text, world_truth
from pipeline.stages import evaluate, evaluate_ranks
from pipeline.train import artifact
from pipeline.train.options import WeightsIn
from tests import oracle
from tests.dist import processes
from tests.dist.test_eval_ranks import measured, torchrun, unequal
from tests.interp.test_world_truth import knows_capitals

RUN = "runs/made"
WORDS = [f"run={RUN}", "eval.batch_tokens=72", "eval.n_contexts=7", "eval.curve_contexts=3", "eval.bootstrap=20"]
"""Three batches of contexts; fits run over two of rows."""
RELATIVE = 1e-9
COUNTS = ("l0", "dead_fraction", "dense_features", "density_histogram", "threshold_histogram", "decoder_norm_histogram")
"""The same to the bit."""


def made(arch: ArchOptions, rule: ActivationOptions) -> None:
    """A run of another architecture and rule on the cache of a finished one; its weights are random."""
    config = artifact.config_of(artifact.folder("runs/topk"))
    dims = Dims(**config["dims"])
    model = oracle.transcoder(arch, "relu", dims.n_layers, arch.d_features, dims.d_model, torch.float32)
    for parameter in model.parameters():
        parameter.data *= 0.3
    tensors = {name: values.detach() for name, values in model.weights().items()}
    threshold = 0.5 * oracle.normal(model.n_sources, arch.d_features, seed=3).abs()
    tensors |= {"threshold": threshold, "y_mean": oracle.normal(*dims, seed=4)}
    artifact.write(Path(RUN), tensors, config | artifact.describe(arch, dims, rule))


@pytest.fixture
def exactly(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in float64, so that no rounding hides an error, and fewer interventions."""
    lm = opening.base_model(artifact.read("runs/topk"), "cpu")
    lm.weights.double()
    lm.dtype = torch.float64
    read, rows = artifact.read, evaluate.Stored.read

    def read_wide(*args: Any, **more: Any) -> artifact.Trained:
        trained = read(*args, **more)
        trained.transcoder.double()
        return trained

    def rows_wide(self: evaluate.Stored, which: Tensor) -> tuple[Tensor, Tensor]:
        x, y = rows(self, which)
        return x.double(), y.double()

    monkeypatch.setattr(opening, "base_model", lambda trained, device: lm)
    monkeypatch.setattr(artifact, "read", read_wide)
    monkeypatch.setattr(evaluate.Stored, "read", rows_wide)
    monkeypatch.setattr(interventions, "measure", partial(interventions.measure, n=9))


def compared(dist: list[str], n: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """One process and n ranks agree on every number of both files. -> what one process says"""
    words = [*WORDS, *more]
    alone = measured(words)
    sums = dict(np.load(f"{RUN}/eval/contexts.npz"))
    together = processes.run(n, measured, [*words, *dist])[-1]
    gathered = dict(np.load(f"{RUN}/eval/contexts.npz"))
    assert together.pop("seconds") != alone.pop("seconds")
    found = dict(unequal(alone, together))
    assert max(found.values(), default=0.0) < RELATIVE, sorted(found.items(), key=lambda one: -one[1])[:5]
    assert not [path for path in found if set(path.split("/")) & set(COUNTS) and "ci95" not in path]
    assert gathered.keys() == sums.keys()
    for name, values in gathered.items():
        np.testing.assert_allclose(values, sums[name], rtol=RELATIVE, atol=1e-9, err_msg=name)
        if name.split("/")[-1] in ("context_hash", "n_tokens", "l0_sum", "top1_sum"):
            assert (values == sums[name]).all(), name
    return alone


FAST = {"clt, topk": ("clt", "topk"), "crosscoder, batchtopk": ("crosscoder", "batchtopk")}
SLOW = {
    "per_layer, relu": ("per_layer", "relu"),
    "skip, jumprelu": ("skip", "jumprelu"),
    "tied, batchtopk": ("tied", "batchtopk"),
    "matryoshka, topk": ("matryoshka", "topk"),
    "molt, batchtopk_across": ("molt", "batchtopk_across"),
    "sae, topk": ("sae", "topk"),
    **FAST,
}


def of_kind(arch: str, rule: str) -> None:
    options = oracle.activation_options(rule)
    made(oracle.arch_options(arch, d_features=44), replace(options, k=None if options.k is None else 4))


@pytest.mark.parametrize("name", FAST)
def test_ranks_that_share_features_measure_what_one_process_measures(exactly: None, name: str) -> None:
    of_kind(*FAST[name])
    alone = compared(["dist=feature_shard"], 2, ["eval.faithfulness=false"])
    assert alone["exact"] is not None
    live = FAST[name][0] != "crosscoder"
    assert (alone["replacement_curves"]["live"] is not None) == live
    assert alone["replacement"]["basis"] == ("live" if live else "teacher_forced")


GRIDS = {"3 x 1": ["dist=feature_shard"], "2 x 2": ["dist=mesh", "dist.features=2"]}


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SLOW)
def test_every_architecture_is_measured_whatever_the_grid(exactly: None, name: str, grid: str) -> None:
    of_kind(*SLOW[name])
    alone = compared(GRIDS[grid], 3 if grid == "3 x 1" else 4)
    assert (alone["exact"] is None) == (SLOW[name][1] in ("relu", "jumprelu"))
    assert (alone["faithfulness"]["interventions"] is None) == (SLOW[name][0] in ("crosscoder", "sae"))


@pytest.mark.slow
def test_another_text_is_measured_too(exactly: None, english: Path) -> None:
    of_kind("clt", "topk")
    text = ["dataset=text", f"dataset.path={english}", "dataset.context=24", "dataset.n_tokens=300"]
    more = [*text, "eval.documents=all", "eval.curves=false", "eval.faithfulness=false"]
    words = [*WORDS, *more]
    alone = measured(words)
    together = processes.run(4, measured, [*words, "dist=mesh", "dist.features=2"])[2]
    assert together["split"] == "text/all"
    del alone["seconds"], together["seconds"]
    assert max(dict(unequal(alone, together)).values(), default=0.0) < RELATIVE


def world_of(run: Path, lm: LanguageModel) -> tuple[Any, Any]:
    """What is measured of the built-in world; nothing on other ranks than the first ones of the text."""
    with pieces.grid(DistOptions("feature_shard", features=None), torch.device("cpu")) as mesh:
        trained, place = evaluate_ranks.read(run, WeightsIn.memory, "cpu", mesh)
        evaluate_ranks.opened(trained, place, torch.device("cpu"))
        rules = {"threshold": partial(replacement.replacement(lm, trained.transcoder).logits, last=True)}
        values, ci95 = world_truth.measure(lm, trained.transcoder, 500, resamples=20)
        return {**values, "tasks": world_truth.world_tasks(lm, rules, 500, mesh.data)}, ci95


@pytest.mark.slow
def test_facts_of_the_world_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_text, "N_DOCUMENTS", 2000)
    monkeypatch.setattr(country_swap, "N_PAIRS", 30)
    lm = models.load(ModelOptions(name="world", path=BUILTIN))
    model = knows_capitals(lm)
    threshold = model.activation.threshold
    assert isinstance(threshold, Tensor)
    tensors = {**model.weights(), "threshold": threshold, "y_mean": torch.zeros(lm.n_layers, lm.d_model)}
    rule = ActivationOptions("relu")
    artifact.write(tmp_path, tensors, artifact.describe(model.options, model.dims, rule))
    alone = world_of(tmp_path, lm)
    assert alone[0]["country_swap"]["capital"]["all_features"]["follows"] > 0.9
    assert alone[0]["purity"]["mean"] > 0
    found = processes.run(3, world_of, tmp_path, lm)
    for one in found:
        assert max(dict(unequal(alone[0], one[0])).values(), default=0.0) < 1e-5
        assert not dict(unequal(alone[1], one[1]))


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["dist=single"], "dist=single is for 1 ranks"),
        (["dist=mesh", "dist.features=5"], "dist.features=5 does not divide the 2 ranks; start a multiple of 5"),
        (["dist.world=8"], "dist.world=8 is for plans of training; leave it out, or use clt plan"),
        (["dist=feature_shard", "transcoder=disk"], "for 2 ranks to share; use dist=ddp, or transcoder=memory"),
        (["dist=feature_shard", "run=runs/none"], "runs/none holds no finished transcoder"),
    ],
)
def test_ranks_that_make_no_grid_are_refused(finished: Path, words: list[str], cause: str) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as error:
            measured(["run=runs/topk", *words])
        return str(error.value)

    for said in processes.run(2, refused):
        assert cause in said
    assert not Path("runs/topk/eval").exists()


FAILS = """
import os, sys
from pipeline.config import Request, launch
from pipeline.dist.joined import Joined
from pipeline.errors import UserError

decode = Joined.decode

def fails(*args):
    if os.environ["RANK"] == "1":
        raise UserError("the disk is full; free some space")
    return decode(*args)

Joined.decode = fails
sys.exit(launch("eval", Request(overrides=tuple(sys.argv[1:]))))
"""


@pytest.mark.slow
def test_torchrun_shares_features_and_a_failure_of_one_rank_ends_all(finished: Path) -> None:
    words = ["run=runs/topk", "eval.batch_tokens=72", "eval.faithfulness=false", "dist=feature_shard"]
    ended = torchrun(2, "-m", "pipeline", "eval", *words)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("next: clt report") == 1
    file = Path("runs/topk/eval/metrics.json")
    together = json.loads(file.read_text())
    alone = measured(words[:3])
    for rule in (together, alone):
        assert rule["exact"]["l0"]["total"] > 0
    assert together["l0"] == alone["l0"]
    assert together["fvu"]["pooled"] == pytest.approx(alone["fvu"]["pooled"], rel=1e-5)
    file.unlink()
    Path("fails.py").write_text(FAILS)
    ended = torchrun(3, "fails.py", *words)
    assert ended.returncode
    said = ended.stderr.split("torch/distributed/elastic")[0]  # what torchrun says then is its own
    assert said.count("the disk is full") == 1, ended.stderr
    assert "Traceback" not in said, ended.stderr
    assert not file.exists()
