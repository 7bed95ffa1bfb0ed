"""A training that is killed goes on to the bytes of one that was not, whatever it was doing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

SHORT = ["arch.d_features=33", "train.n_tokens=null", "train.batch_tokens=128", "log.every=3", "train.dead_window=256"]
SHORT += ["log.report=false"]


def killed(how: str, number: int, words: list[str]) -> list[str]:
    """The names of the runs that were killed and went on, beside one named whole."""
    command = [sys.executable, "-m", "tests.stages.killing", how, str(number), *words, *SHORT]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def files(name: str) -> dict[str, bytes]:
    """All that a run leaves, its timings and its own name apart."""
    root = Path("runs") / name
    own = {"timings.jsonl", "config.yaml"}
    found = (path for path in root.rglob("*") if path.is_file() and path.name not in own)
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["+experiment=batchtopk", "activation.k=4", "loss.resample_every=1024", "train.n_steps=240"],
        ["+experiment=jumprelu", "loss.target_l0=9", "train.accumulate=2", "train.keep_best=1", "train.n_steps=120"],
        [
            "+experiment=topk",
            "activation.k=4",
            "train.async_checkpoints=always",
            "train.keep_best=1",
            "train.n_steps=240",
        ],
    ],
    ids=" ".join,
)
def test_killed_at_twenty_random_moments_it_goes_on_to_the_same_bytes(cached: Path, words: list[str]) -> None:
    names = killed("random", 1, [*words, "train.checkpoint_every=1280"])
    assert names
    for name in names:
        assert files(name) == files("whole"), name


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["never", "always"])
def test_killed_before_a_touch_of_a_file_it_goes_on_to_the_same_bytes(cached: Path, beside: str) -> None:
    words = ["+experiment=topk", "activation.k=4", "train.n_steps=5", "train.checkpoint_every=256", "train.keep_best=1"]
    names = killed("everywhere", 5, [*words, f"train.async_checkpoints={beside}"])
    assert len(names) > 10, "checkpoints, their removal, the log and the result are many files"
    for name in names:
        assert files(name) == files("whole"), name
