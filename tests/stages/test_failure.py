"""Ranks that are killed, that stop together, and that go on in another number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.test_killed import ROOT, files

WORDS = ["+experiment=batchtopk", "activation.k=4", "arch.d_features=33", "train.n_tokens=null", "log.report=false"]
WORDS += ["train.batch_tokens=128", "log.every=2", "train.n_steps=60", "dist=feature_shard"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def elastic(how: str, *words: str) -> "tuple[list[object], str]":
    """What `tests/dist/elastic.py` did, and what was said meanwhile."""
    command = [sys.executable, "-m", "tests.dist.elastic", how, "1", *WORDS, *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


@pytest.mark.slow
def test_a_rank_killed_at_ten_random_moments_leaves_the_same_bytes(cached: Path) -> None:
    names, _ = elastic("killed", "train.checkpoint_every=640")
    assert names
    whole = {path: data for path, data in files("whole").items() if "ranks/" not in path}
    for name in names:
        found = {path: data for path, data in files(str(name)).items() if "ranks/" not in path}
        assert found == whole


EIGHT = ["optim=adam8bit", "arch.d_features=768", "optim.lr=5e-4"]
"""Blocks of moments end at every 64th row of 20. At ten times the rate near ties are 1e-2 after 60 steps."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "near"),
    [([], 1e-3), (EIGHT, 1e-3), ([*EIGHT, "train.weights=bfloat16"], 2e-2)],
    ids=["adam", "adam8bit", "bfloat16"],
)
def test_four_ranks_then_two_then_three_follow_the_curve_of_one(cached: Path, more: list[str], near: float) -> None:
    steps, said = elastic("elastic", "train.checkpoint_every=100000", *more)
    first, second = steps
    assert 0 < first < second < 60
    for step in steps:
        assert f"stopped at step {step} of 60" in said
        assert f"continuing from runs/changing/checkpoints/step_{step}" in said
    one, other = (
        [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "changing")
    )
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=near)
        assert b["lr"] == a["lr"]


@pytest.mark.slow
def test_torchrun_says_a_refusal_of_all_ranks_once_and_keeps_logs_of_the_others(cached: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline"]

    def train(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [*torchrun, "train", *WORDS, "name=mine", "train.n_steps=4", *words]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    refused = train("dist=single")
    assert refused.returncode == 1
    assert refused.stderr.count("error: dist=single") == 1
    assert "rank 1: " not in refused.stderr
    assert "traceback : dist=single" in refused.stderr
    assert not Path("runs").exists()
    done = train()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("held out") == 1
    assert [path.name for path in Path("runs/mine/ranks").iterdir()] == ["rank_1.log"]
    assert "INFO kernels" in Path("runs/mine/ranks/rank_1.log").read_text()
