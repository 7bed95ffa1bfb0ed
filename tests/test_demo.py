"""The recipes that the README quotes, on the built-in world: at full size, so slow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    clt(place, "extract", "model=world")
    return place


def clt(place: Path, *words: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "pipeline", *words]
    subprocess.run(command, cwd=place, env={**environment, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)


def measured(place: Path, experiment: str) -> dict[str, Any]:
    clt(place, "train", f"+experiment={experiment}", f"name={experiment}")
    clt(place, "eval", f"run=runs/{experiment}")
    return json.loads((place / "runs" / experiment / "eval/metrics.json").read_text())


def test_the_demo_is_as_good_as_promised(work: Path) -> None:
    metrics = measured(work, "batchtopk_across")
    assert metrics["explained_variance"]["pooled"] >= 0.97
    assert metrics["l0"]["total"] <= 64
    assert metrics["dead_fraction"]["total"] <= 0.05
    replacement = metrics["replacement"]
    assert replacement["kl"] <= 0.02
    assert replacement["top1"] >= 0.92
    assert replacement["kl_mean_ablation"] >= 5, "what is replaced matters"
    assert replacement["top1_mean_ablation"] <= 0.2
    # The transcoder keeps what the model knows.
    tasks = metrics["tasks"]["mean"]
    assert tasks["threshold"] >= tasks["original"] - 0.05
    # Answers follow a country's features; those were chosen on text without the questions.
    for relation in ("capital", "language"):
        assert metrics["world"]["country_swap"][relation]["features"]["follows"] >= 0.95


def test_its_graphs_say_what_ablations_do(work: Path) -> None:
    run = work / "runs/batchtopk_across"
    if not (run / "final").is_dir():
        clt(work, "train", "+experiment=batchtopk_across", "name=batchtopk_across")
    clt(work, "graph", f"run={run}", "prompt=The capital of France is", "--validate")
    found = json.loads((run / "graphs/The-capital-of-France-is.check.json").read_text())
    for kind in ("features", "outputs"):
        assert found["direct"][kind]["error"] <= 1e-5
        assert found["frozen"][kind]["error"] <= 1e-5
        assert found["gates"][kind]["r2"] >= 0.9


def test_few_features_are_enough(work: Path) -> None:
    metrics = measured(work, "sparse")
    assert metrics["l0"]["total"] <= 24
    assert metrics["replacement"]["kl"] <= 0.05
