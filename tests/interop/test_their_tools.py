"""The real circuit-tracer and SAELens on our exports, and our graphs beside theirs: `make interop`.

CLT_INTEROP is the interpreter of an environment with constraints-interop.txt; it gets its work as files
(`theirs.py`) and has nothing of ours.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.interp.circuits import attribution, graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import document
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.train import artifact
from tests.interop import compare
from tests.interop.cases import CLTS, OTHERS, SILENT, SKIPS, SMALL, SPARSE, Case, make

pytestmark = pytest.mark.interop

ROOT = Path(__file__).resolve().parents[2]
TRACED = [*CLTS, *OTHERS, *SKIPS]
TOLERANCE = 1e-5
"""Of edges, relative to the largest one; of scores."""


def theirs(jobs: list[dict[str, Any]], file: Path) -> subprocess.CompletedProcess[str]:
    python = os.environ.get("CLT_INTEROP", str(ROOT / ".venv-interop/bin/python"))
    assert Path(python).exists(), f"no {python}: make interop makes the environment"
    file.write_text(json.dumps(jobs))
    # Without our own packages, whose directory a parent process may have put on the path.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(ROOT / "tests/interop/theirs.py"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def inputs() -> Tensor:
    """x [B, L, D]"""
    return torch.randn(9, SMALL.n_layers, SMALL.d_model, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, and what the other side made of them."""
    folder = tmp_path_factory.mktemp("interop")
    jobs = []
    for case in (*TRACED, SILENT, SPARSE):
        place = make(case, folder)
        np.save(place / "inputs.npy", inputs().numpy())
        jobs += [{"do": "trace", "place": str(place)}]
        jobs += [{"do": "outputs", "place": str(place)}] if case in TRACED else []
        jobs += [{"do": "saelens", "place": str(place)}] if (place / "saelens").exists() else []
    done = theirs(jobs, folder / "jobs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Callable[[Case], Graph]:
    graphs: dict[Case, Graph] = {}

    def graph(case: Case) -> Graph:
        if str(case) not in graphs:
            graphs[str(case)] = compare.ours(folder / str(case))  # type: ignore[index]
        return graphs[str(case)]  # type: ignore[index]

    return graph


@pytest.mark.parametrize("case", TRACED, ids=str)
def test_feature_error_token_and_logit_edges_equal_circuit_tracers(
    folder: Path, ours: Callable[[Case], Graph], case: Case
) -> None:
    graph, reference = ours(case), compare.read(folder / str(case))
    at = compare.places(graph, reference)
    n = len(reference.features)
    assert graph.kind.count(Kind.feature) == n > 100
    torch.testing.assert_close(graph.activation[:n], reference.activations[at[:n]], rtol=1e-5, atol=1e-5)
    logits = graph.of(Kind.logit)
    assert sorted(graph.index[logits].tolist()) == sorted(reference.logits)
    k = at[logits] - (len(reference.edges) - len(reference.logits))
    torch.testing.assert_close(graph.probability[logits].float(), reference.probabilities[k], rtol=1e-5, atol=1e-6)
    expected = reference.edges[at][:, at]
    difference = (graph.edges - expected).abs()
    if case in SKIPS:
        # Position 0 keeps the MLP's own output here, one node a layer; there its skip path goes on to the token.
        difference[:, graph.kind.index(Kind.token)] = 0
    assert difference.max() <= TOLERANCE * expected.abs().max()
    assert int((expected != 0).sum()) > 1000
    left_out = torch.ones(len(reference.edges), dtype=torch.bool)
    left_out[at] = False
    assert not reference.edges[:, left_out].any()  # errors at position 0, which are 0 there


@pytest.mark.parametrize("case", [case for case in TRACED if case not in SKIPS], ids=str)
def test_scores_and_pruning_equal_circuit_tracers(folder: Path, ours: Callable[[Case], Graph], case: Case) -> None:
    graph, reference = ours(case), compare.read(folder / str(case))
    found = graph_scores.scores(graph)
    assert found.replacement == pytest.approx(reference.replacement, abs=TOLERANCE)
    assert found.completeness == pytest.approx(reference.completeness, abs=TOLERANCE)
    pruned, at = graph_scores.prune(graph), compare.places(graph, reference)
    assert torch.equal(pruned.nodes, reference.kept_nodes[at])
    assert torch.equal(pruned.edges, reference.kept_edges[at][:, at])


@pytest.mark.parametrize("tool", ["outputs", "saelens"])
@pytest.mark.parametrize("case", TRACED, ids=str)
def test_their_features_and_outputs_are_the_runs(folder: Path, case: Case, tool: str) -> None:
    place = folder / str(case)
    if tool == "saelens" and not (place / "saelens").exists():
        assert case.arch.name not in ("per_layer", "skip")
        return
    expected = artifact.read(place / "run").transcoder(inputs())
    with np.load(place / f"{tool}.npz") as found:
        torch.testing.assert_close(torch.from_numpy(found["features"]), expected.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(found["y_hat"]), expected.y_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("case", [CLTS[0], SKIPS[1]], ids=str)
def test_graph_files_are_valid_and_readable_for_their_front_end(folder: Path, case: Case, whole: bool) -> None:
    graph = attribution.trace(*compare.opened(folder / str(case)), GraphOptions())
    graph = graph if whole else graph_scores.reference(graph)
    file = folder / f"{case}-{whole}.json"
    file.write_text(json.dumps(document(graph, graph_scores.prune(graph), "a-slug")))
    done = theirs([{"do": "graph_json", "place": str(file)}], folder / "json.json")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("case", "n_features"), [(SILENT, 0), (SPARSE, 2)], ids=["none", "none at the last position"])
def test_a_prompt_with_few_features_is_traced_here_and_raises_there(folder: Path, case: Case, n_features: int) -> None:
    graph = attribution.trace(*compare.opened(folder / str(case)), GraphOptions())
    features = graph.of(Kind.feature)
    assert graph.kind.count(Kind.feature) == n_features
    assert not (graph.position[features] == len(graph.texts) - 1).any()
    assert float(graph.imbalance().max()) <= 1e-5
    assert (folder / str(case) / "failed.txt").exists()
