"""Commands with the transcoder on disk: the results are those with it in memory, and few rows are read."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipeline
from pipeline.arch.on_disk import OnDisk
from pipeline.config import compose
from pipeline.core.sparse import Pattern
from pipeline.errors import UserError
from pipeline.stages import evaluate, features, generate, graph, intervene, plot, weights
from pipeline.train import artifact
from pipeline.train.row_files import Stored
from tests.train.spread import spread

PROMPT = "prompt=The old river"
PARTS = [(range(9), range(20, 25)), (range(9, 20),), (range(25, 33),)]
"""Of 33 features."""

STAGES: dict[str, tuple[Callable[[Any], Path | None], list[str]]] = {
    "generate": (generate.run, [PROMPT, "generate.n_tokens=4", "to=out/found.json"]),
    "intervene": (intervene.run, [PROMPT, "edits='0/3@4=5,2/5=0.5'", "to=out/found.json"]),
    "features": (features.run, [PROMPT, "to=out/found.json"]),
    "weights": (weights.run, ["feature=1/3", "weights.n_tokens=200", "weights.norm_contexts=2", "to=out/found.csv"]),
    "plot": (plot.run, ["kind=correlation", "to=out/found.html"]),
}


def result(command: str, where: str, *words: str) -> bytes:
    """Of a command on the run relu, with the transcoder there."""
    run, more = STAGES[command]
    shutil.rmtree("out", ignore_errors=True)
    assert run(compose(command, ["run=relu", f"transcoder={where}", *more, *words])) is not None
    [file] = Path("out").iterdir()
    # A picture has a name of its own each time.
    return re.sub(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", b"", file.read_bytes())


@pytest.mark.parametrize("command", sorted(STAGES))
def test_a_command_gives_the_same_from_disk(finished: Path, command: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    memory = result(command, "memory")
    assert not any("where rows are read" in line for line in caplog.messages)
    assert result(command, "disk") == memory
    assert any("stays in runs/relu/final, where rows are read" in line for line in caplog.messages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batchtopk", "relu"])
def test_evaluation_gives_the_same_numbers_from_disk(finished: Path, name: str) -> None:
    """Under the thresholds and the rule of training: features, reconstructions, and what they do to the model."""

    def measured(where: str) -> dict[str, Any]:
        words = [
            f"run={name}",
            f"transcoder={where}",
            "eval.n_contexts=3",
            "eval.bootstrap=10",
            "eval.curve_contexts=1",
        ]
        found: dict[str, Any] = json.loads(evaluate.run(compose("eval", words)).read_text())
        return {key: value for key, value in found.items() if key != "seconds"}

    memory = measured("memory")
    assert measured("disk") == memory
    spread(Path("runs") / name, PARTS)
    assert measured("disk") == memory


class Reads:
    """Which rows were asked for, and which features were active."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, set[int]] = {}
        self.active: dict[int, set[int]] = {}
        pick, layer_features = Stored.pick, OnDisk.layer_features

        def picked(stored: Stored, name: str, axis: int, rows: Tensor | range, at: int | None = None) -> Tensor:
            self.rows.setdefault(name, set()).update(torch.as_tensor(rows).tolist())
            return pick(stored, name, axis, rows, at)

        def found(model: OnDisk, x: Tensor, layer: int) -> tuple[Pattern, Tensor]:
            pattern, values = layer_features(model, x, layer)
            self.active.setdefault(layer, set()).update(pattern.indices.tolist())
            return pattern, values

        monkeypatch.setattr(Stored, "pick", picked)
        monkeypatch.setattr(OnDisk, "layer_features", found)


@pytest.mark.parametrize(
    "more", [[], pytest.param(["graph.heads=2", "validate=true"], marks=pytest.mark.slow)], ids=["plain", "checked"]
)
def test_a_graph_from_disk_is_the_same_and_reads_no_decoder_row_of_a_feature_that_is_not_active(
    finished: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("runs/batchtopk/graphs")

    def made(where: str) -> dict[str, bytes]:
        graph.run(compose("graph", ["run=batchtopk", f"transcoder={where}", "prompt=The old", *more]))
        found = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".json"}
        shutil.rmtree(folder)
        return found

    memory = made("memory")
    assert len(memory) == (5 if more else 3)
    assert "The-old.json" in memory
    reads = Reads(monkeypatch)
    assert made("disk") == memory
    decoders = {int(name.split(".")[1]): rows for name, rows in reads.rows.items() if name != "W_enc"}
    assert decoders.keys() == reads.active.keys() == {0, 1, 2}
    for layer, rows in decoders.items():
        assert rows <= reads.active[layer]
        assert len(rows) < 33
    spread(Path("runs/batchtopk"), PARTS)
    assert made("disk") == memory


def test_the_replacement_in_python_may_read_a_run_of_several_ranks_from_disk(finished: Path) -> None:
    spread(Path("runs/relu"), PARTS)
    expected = artifact.read("runs/relu").transcoder
    model = pipeline.replace("runs/relu", device="cpu", transcoder="disk")
    assert isinstance(model.transcoder, OnDisk)
    memory = pipeline.replace("runs/relu", device="cpu")
    assert type(memory.transcoder) is type(expected)
    assert torch.equal(model.run("The old river").logits, memory.run("The old river").logits)


def test_a_word_that_is_no_place_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="transcoder"):
        compose("graph", ["run=relu", "transcoder=ram", PROMPT])
