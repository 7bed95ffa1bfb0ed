"""Training in jobs of submitit's: several tasks as the ranks of one run, and its preemption signal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.stages import sweep
from tests.stages.test_sweep import ROOT, SHORT, start

SLURM = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=4"]


def test_a_dry_run_shows_the_file_that_slurm_would_be_given(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("submitit")
    with caplog.at_level("INFO", "pipeline"):
        words = ["name=mine", "activation.k=3,4", "dry_run=true", *SLURM, "hydra.launcher.partition=gpu"]
        assert start(*words, "dist=mesh", "dist.features=4", "train.batch_tokens=128", "train.device=cuda") == 0
    assert caplog.text.count("8: 4 share the features, 2 the tokens") == 2
    text = next(record.getMessage() for record in caplog.records if "#!/bin/bash" in record.getMessage())
    lines = text.splitlines()
    assert {
        "#SBATCH --array=0-1%2",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --partition=gpu",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --job-name=mine",
        "export SLURM_KILL_BAD_EXIT=1",
        "export SUBMITIT_EXECUTOR=slurm",
    } <= set(lines)
    assert lines[-1].startswith(f"srun --unbuffered --output {cached}/runs/mine/.submitit/")
    assert not Path("runs").exists()


def test_a_dry_run_refuses_tasks_that_would_share_nothing(cached: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("submitit")
    assert start("name=mine", "dry_run=true", *SLURM) == 2
    assert "dist=single is for 1 rank and the launcher starts 8 for a job; add dist=feature_shard" in caplog.text


def tasks() -> list[int]:
    """The processes of submitit's tasks in this directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, here = (place / "cmdline").read_bytes().split(b"\0"), (place / "cwd").resolve()
        except OSError:  # it has just ended, or is somebody else's
            continue
        if b"submitit.core._submit" in words and here == Path.cwd():
            found.append(int(place.name))
    return found


@pytest.mark.slow
def test_tasks_of_a_job_are_ranks_and_a_preempted_job_goes_on_by_itself(cached: Path) -> None:
    pytest.importorskip("submitit")
    words = [*SHORT, "activation.k=4", "train.n_steps=150", "train.checkpoint_every=1000000", "dist=feature_shard"]
    words += ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=5"]
    line = [sys.executable, "-m", "pipeline", "train", "-m", "name=away", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    metrics, deadline = Path("runs/away/0/metrics.jsonl"), time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.05)
    os.kill(tasks()[0], signal.SIGUSR2)  # one of them is told
    _, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert sweep.read(Path("runs/away"))[0].failed is None
    logs = "".join(path.read_text() for path in Path("runs/away/.submitit").rglob("*_log.err"))
    assert "stopped at step" in logs
    assert "continuing from runs/away/0/checkpoints/step_" in logs
    steps = [json.loads(text)["step"] for text in metrics.read_text().splitlines()]
    assert steps == list(range(2, 151, 2))
    assert "stopped at step" in Path("runs/away/0/ranks/rank_1.log").read_text()
    assert Path("runs/away/0/final/config.json").exists()
