"""A run that several ranks finished: every command does with it what it does with that of one."""

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipeline
from pipeline.config import compose
from pipeline.core.options import ActivationOptions
from pipeline.dist import mesh as meshes
from pipeline.dist.options import DistOptions
from pipeline.dist.shard import shards
from pipeline.interp.circuits import graph as graphs
from pipeline.stages import evaluate, export, features, graph, report, train
from pipeline.stages.options import ReportConfig
from pipeline.train import artifact, run
from pipeline.web import runs as pages
from tests.dist import processes


def rewrite(source: Path, to: Path) -> None:
    """What three ranks would have written."""
    with meshes.started(DistOptions("feature_shard", None, 1), torch.device("cpu")) as mesh:
        whole = artifact.read(source)
        n_sources, arch = whole.transcoder.n_sources, whole.transcoder.options
        shard = shards(arch, ActivationOptions("topk", k=4), n_sources, mesh.features.size)[mesh.features.rank]
        own = artifact.read(source, shard)
        config = {key: value for key, value in own.config.items() if key != "schema"}
        threshold = own.transcoder.activation.threshold
        assert isinstance(threshold, torch.Tensor)
        artifact.save(to, own.transcoder, threshold, own.y_mean, config, own.rank_norms, mesh, shard)


@pytest.fixture
def both(finished: Path) -> Path:
    """Runs `topk` and `many`, the same but for their files."""
    shutil.copytree("runs/topk", "runs/many")
    shutil.rmtree("runs/many/final")
    processes.run(3, rewrite, Path("runs/topk"), Path("runs/many"))
    assert len(list(Path("runs/many/final").glob("transcoder-*-of-00003.safetensors"))) == 3
    return finished


def test_it_is_loaded_counted_and_known_as_finished(both: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, many = pipeline.load("runs/topk"), pipeline.load("runs/many")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name]), name
    assert one.config == many.config
    found = [pages._parameters(Path("runs") / name) for name in ("topk", "many")]
    assert found[0] == found[1] == one.n_parameters
    assert run.newest() == Path("runs/many")


def test_it_is_evaluated_and_reported_alike(both: Path) -> None:
    cheap = ["eval.curves=false", "eval.faithfulness=false", "eval.bootstrap=0"]
    found = [
        json.loads(evaluate.run(compose("eval", [f"run={name}", *cheap])).read_text()) for name in ("topk", "many")
    ]
    assert [one.pop("seconds") > 0 for one in found] == [True, True]
    assert found[0] == found[1]
    config = compose("report", ["topk", "many"])
    assert isinstance(config, ReportConfig)
    lines = list(csv.DictReader(report.run(config).with_suffix(".csv").open()))
    assert len(lines) == 2
    differ = {key for key, value in lines[0].items() if lines[1][key] != value}
    assert differ == {"run", "directory"}


@pytest.mark.parametrize("to", ["circuit-tracer", "huggingface"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_exported_to_the_same_weights(both: Path, to: str, dtype: str) -> None:
    places = [
        export.run(compose("export", [f"run={name}", f"to={to}", f"export.dtype={dtype}"])) for name in ("topk", "many")
    ]
    if to == "huggingface":
        one, many = (pipeline.load(place) for place in places)
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, many.state_dict()[name]), name
        sizes = [sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in places]
        assert sizes[1] < 1.1 * sizes[0] + 5000
        assert export.run(compose("export", ["run=many", f"to={to}", f"export.dtype={dtype}"])) == places[1]
        return
    for file in sorted(places[0].glob("*.safetensors")):
        one, many = load_file(file), load_file(places[1] / file.name)
        assert one.keys() == many.keys()
        assert all(torch.equal(one[name], many[name]) for name in one), file.name


def test_its_graph_and_its_features_are_the_same(both: Path) -> None:
    edges, tables = [], []
    for name in ("topk", "many"):
        page = graph.run(compose("graph", [f"run={name}", "prompt=The old river"]))
        edges.append(graphs.load(page.with_suffix(".safetensors")).edges)
        features.run(compose("features", [f"run={name}", "features.n=4"]))
        tables.append((Path("runs") / name / "features/features.parquet").read_bytes())
    assert torch.equal(*edges)
    assert tables[0] == tables[1]


def test_a_run_begins_from_it(both: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [
        "+experiment=topk",
        "arch.d_features=33",
        "train.n_tokens=null",
        "train.n_steps=2",
        "train.batch_tokens=128",
    ]
    ends = []
    for name in ("topk", "many"):
        with caplog.at_level(logging.INFO):
            place = train.run(compose("train", [*words, f"train.init_from={name}", f"name=from-{name}"]))
        ends.append((place / "final/transcoder.safetensors").read_bytes())
    assert ends[0] == ends[1]


SHORT = ["+experiment=topk", "activation.k=4", "arch.d_features=33", "train.n_tokens=null", "train.n_steps=8"]
SHORT += ["train.batch_tokens=128", "train.checkpoint_every=256", "train.keep_checkpoints=9", "log.every=1"]
SHORT += ["log.report=false", "train.device=cpu"]


def trained(*words: str) -> None:
    train.run(compose("train", [*SHORT, *words]))


def losses(name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["never", "always"])
def test_a_run_goes_on_with_any_number_of_ranks(cached: Path, beside: str) -> None:
    trained("name=one")
    expected, whole = losses("one"), pipeline.load("runs/one")
    words = [f"train.async_checkpoints={beside}", "name=many"]
    processes.run(4, trained, *words, "dist=feature_shard")
    place = Path("runs/many/checkpoints")
    assert {path.name for path in place.iterdir()} == {f"step_{n}" for n in (2, 4, 6, 8)}
    grid = ["dist=mesh", "dist.features=2", "dist.data=2"]
    worlds = [(6, 3, ["dist=feature_shard"]), (4, 2, ["dist=ddp"]), (2, 1, ["dist=single"]), (4, 4, grid)]
    for last, n, dist in worlds:
        for path in place.iterdir():
            if int(path.name.removeprefix("step_")) > last:
                shutil.rmtree(path)
        shutil.rmtree("runs/many/final")
        processes.run(n, trained, *words, *dist)
        assert losses("many") == pytest.approx(expected, rel=1e-5)
        assert len(list(Path("runs/many/final").glob("*.safetensors"))) == n
        torch.testing.assert_close(pipeline.load("runs/many").W_enc, whole.W_enc, rtol=1e-4, atol=1e-5)
