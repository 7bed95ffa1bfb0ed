"""What `clt train --dry-run` says of memory against what a run takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import compose
from pipeline.stages import train

MEASURE = """
import resource, sys
from pipeline.config import compose
from pipeline.stages import train
train.run(compose("train", sys.argv[1:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
SHORT = ["arch.init=uniform", "train.n_steps=6", "train.n_tokens=null", "train.batch_tokens=512", "name=measured"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(
    "words",
    [
        ["+experiment=topk", "activation.k=4", "arch.d_features=30000"],
        ["+experiment=batchtopk_across", "activation.k=4", "arch.d_features=12000", "arch=per_layer"],
        ["+experiment=relu", "train.sparse=never", "arch.d_features=12000"],
        ["+experiment=topk", "loss=mse", "activation.k=4", "arch.d_features=60000", "train.batch_tokens=256"],
        ["+experiment=topk", "loss=mse", "activation.k=4", "arch.d_features=60000", "train.kernels=torch"],
        ["+experiment=topk", "loss=mse", "activation.k=4", "arch.d_features=60000", "train.async_checkpoints=always"],
        ["+experiment=jumprelu", "arch.d_features=12000"],
        ["+experiment=topk", "loss=mse", "activation.k=4", "arch.d_features=12000", "optim=muon", "optim.lr=1e-3"],
    ],
    ids=lambda words: "-".join(words).replace("+experiment=", ""),
)
def test_a_run_takes_the_memory_that_the_dry_run_said(
    cached: Path, words: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pipeline")
    words = [*SHORT, *words]
    config = compose("train", words)
    config.dry_run = True
    train.run(config)
    found = re.search(r"about ([\d.]+) (MB|GB) at the peak", caplog.text)
    assert found is not None
    said = float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]
    command = [sys.executable, "-c", MEASURE, *words]
    took = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    assert said == pytest.approx(took, rel=0.15)
