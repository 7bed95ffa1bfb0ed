"""`clt eval` on several ranks: the numbers of one process."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import compose
from pipeline.core.metrics import Firing, Reconstruction
from pipeline.core.metrics_predictions import Divergence
from pipeline.data import models
from pipeline.data.model_files import BUILTIN
from pipeline.data.models import LanguageModel
from pipeline.data.options import ModelOptions
from pipeline.dist import pieces
from pipeline.interp import opening, world_truth
from pipeline.stages import evaluate
from pipeline.train import artifact
from tests.dist import processes

ROOT = Path(__file__).parents[2]
RELATIVE = 1e-12
"""Of what ranks add up in float64: intervals and ratios of sums over tokens."""
BATCHES = ["run=runs/topk", "eval.batch_tokens=72"]
"""Seven batches of three contexts; fits run over four of 128 rows, which contexts lie across."""
ADDED = {
    *("fvu", "explained_variance", "explained_variance_centred", "bias", "cosine", "relative_norm"),
    *("ci95", "exact", "faithfulness"),
}
"""Groups with such numbers. All others are the same to the bit."""


def measured(words: list[str]) -> dict[str, Any]:
    file = evaluate.run(compose("eval", words))
    return dict(json.loads(file.read_text()))


def loaded() -> None:
    """What every rank needs is loaded before they are forked."""
    opening.base_model(artifact.read("runs/topk"), "cpu")


def unequal(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Where two trees differ, and by how much of a number."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            yield from unequal(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from unequal(*pair, f"{path}/{i}")
    elif one != other:
        yield path, abs(one - other) / max(abs(one), 1e-3) if isinstance(one, float) else math.inf


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_ranks_measure_what_one_process_measures(finished: Path, n: int) -> None:
    """Nine ranks are more than there are batches."""
    alone = measured(BATCHES)
    sums = dict(np.load("runs/topk/eval/contexts.npz"))
    Path("runs/topk/eval/contexts.npz").unlink()
    (together, *others) = processes.run(n, measured, BATCHES)
    assert all(other == together for other in others)  # every rank finds the file
    assert together.pop("seconds") != alone.pop("seconds")
    found = dict(unequal(alone, together))
    assert {path.split("/")[1] for path in found} <= ADDED
    assert max(found.values(), default=0.0) < RELATIVE
    for part in ("interventions", "decoder_mass/decoders"):
        assert not [path for path in found if f"faithfulness/{part}" in path]
    gathered = dict(np.load("runs/topk/eval/contexts.npz"))
    assert gathered.keys() == sums.keys()
    for name, values in gathered.items():
        np.testing.assert_allclose(values, sums[name], rtol=RELATIVE, atol=1e-12, err_msg=name)
        if name.split("/")[-1] in ("context_hash", "n_tokens", "l0_sum", "kl_sum", "kl_position", "top5_sum"):
            assert (values == sums[name]).all(), name


@pytest.mark.slow
def test_other_text_is_collected_by_all_ranks(finished: Path, english: Path) -> None:
    words = [*BATCHES, "dataset=text", f"dataset.path={english}", "dataset.context=24", "dataset.n_tokens=300"]
    words += ["eval.documents=all", "eval.curves=false", "eval.faithfulness=false", "eval.bootstrap=0"]
    alone = measured(words)
    loaded()
    together = processes.run(2, measured, words)[1]
    del alone["seconds"], together["seconds"]
    assert max(dict(unequal(alone, together)).values(), default=0.0) < RELATIVE
    assert together["split"] == "text/all"


class SaysNothing:
    """The world's model but for its answers."""

    def __init__(self, lm: LanguageModel) -> None:
        self.tokenizer, self.vocab_size = lm.tokenizer, lm.vocab_size

    def logits(self, tokens: Tensor, last: bool) -> Tensor:
        return torch.zeros(len(tokens), 1, self.vocab_size)


def tasks(lm: Any) -> tuple[dict[str, Any], int]:
    """(what becomes of the answer Paris to everything, how many questions this rank asked)"""
    answer = lm.tokenizer("Paris")["input_ids"][0]
    seen: list[int] = []

    def paris(tokens: Tensor) -> Tensor:
        seen.append(len(tokens))
        logits = torch.zeros(len(tokens), 1, lm.vocab_size)
        logits[..., answer] = 1
        return logits

    with pieces.ranks() as group:
        return world_truth.world_tasks(lm, {"paris": paris}, 400, group), sum(seen)


@pytest.mark.slow
def test_questions_of_the_world_are_divided() -> None:
    lm = SaysNothing(models.load(ModelOptions(name="world", path=BUILTIN)))
    ((alone, n),) = processes.run(1, tasks, lm)
    found = processes.run(3, tasks, lm)
    assert [answers for answers, _ in found] == 3 * [alone]
    assert alone["mean"]["paris"] > 0
    assert sum(one for _, one in found) == n
    assert min(one for _, one in found) > n / 5


def test_halves_of_the_tokens_added_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    y, e = torch.randn(2, 7, 3, 5, generator=generator)
    features = torch.randn(7, 2, 6, generator=generator).relu()
    context = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    parts = []
    for some in (slice(0, 7), slice(0, 3), slice(3, 7)):
        parts.append((Reconstruction(3, 5, 3, origin=y[0]), Firing(2, 6, 3)))
        parts[-1][0].update(y[some] + e[some], y[some], context[some])
        parts[-1][1].update(features[some], context[some])
    (whole, whole_firing), (first, firing), (second, second_firing) = parts
    for here, there in zip(first.added() + firing.added(), second.added() + second_firing.added(), strict=True):
        here += there
    for name, values in whole.sums().items():
        torch.testing.assert_close(first.sums()[name], values, rtol=1e-12, atol=1e-12)
    assert firing.n == whole_firing.n == 7
    assert firing.l0() == whole_firing.l0()
    assert (firing.fires == whole_firing.fires).all()


def test_rows_of_a_measurement_hold_all_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 11, generator=generator)
    scored = torch.ones(3, 4, dtype=torch.bool)
    scored[:, 0], scored[2, 3] = False, False
    result = Divergence()
    result.update(*logits, scored, torch.randint(11, (3, 4), generator=generator), scored.roll(-1, 1) & scored)
    again = Divergence.of_rows(torch.cat([Divergence().rows(4), result.rows(4)]))
    assert again.sums().keys() == result.sums().keys()
    for name, values in result.sums().items():
        assert (again.sums()[name] == values).all(), name
    assert (again.kl, again.kl_median, again.n_next) == (result.kl, result.kl_median, result.n_next)


def torchrun(n: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_torchrun_evaluates_and_the_first_rank_speaks(finished: Path) -> None:
    alone = measured(BATCHES)
    ended = torchrun(3, "-m", "pipeline", "eval", *BATCHES)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("next: clt report") == 1
    together = json.loads(Path("runs/topk/eval/metrics.json").read_text())
    del alone["seconds"], together["seconds"]
    assert max(dict(unequal(alone, together)).values(), default=0.0) < RELATIVE


FAILS = """
import os, sys
from pipeline.config import Request, launch
from pipeline.errors import UserError
from pipeline.interp import curves

def fails(*args):
    raise UserError("the disk is full; free some space")

if os.environ["RANK"] == "1":
    curves.measure = fails
sys.exit(launch("eval", Request(overrides=tuple(sys.argv[1:]))))
"""


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others_and_says_why_once(finished: Path) -> None:
    """One that only it can see, and one that all of them see."""
    Path("fails.py").write_text(FAILS)
    for words, cause in ((["fails.py", *BATCHES], "the disk is full"), (BATCHES[1:], "runs/none holds no finished")):
        words = words if cause.startswith("the") else ["-m", "pipeline", "eval", "run=runs/none", *words]
        begun = time.monotonic()
        ended = torchrun(3, *words)
        assert time.monotonic() - begun < 200  # nobody waits for it
        assert ended.returncode
        said = ended.stderr.split("torch/distributed/elastic")[0]  # what torchrun says then is its own
        assert said.count(cause) == 1, ended.stderr
        assert "Traceback" not in said, ended.stderr
        assert not Path("runs/topk/eval/metrics.json").exists()
