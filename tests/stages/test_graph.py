"""`clt graph` on a small run: what it shows, what it writes, what it refuses."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.config import Request, compose, launch
from pipeline.interp.circuits import graph as graphs
from pipeline.interp.circuits import graph_json, graph_scores
from pipeline.interp.circuits.attribution import trace
from pipeline.interp.circuits.graph import Kind
from pipeline.stages import graph

NAME = "The-old-river"


@pytest.fixture(scope="module")
def made(trained_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(trained_runs / "runs" / "batchtopk", place / "runs" / "batchtopk")
    return place


def test_a_prompt_leaves_its_graph_in_every_form_and_says_where(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline"):
        page = graph.run(compose("graph", ["run=batchtopk", "prompt=The old river", "validate=true"]))
    folder = Path("runs/batchtopk/graphs")
    assert page == folder / f"{NAME}.html"
    written = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    ends = ("safetensors", "json", "supernodes.json", "check.json", "html")
    assert written == {*(f"{NAME}.{end}" for end in ends), "graph-metadata.json"}
    model = pipeline.replace("runs/batchtopk", device="cpu")
    expected, found = trace(model, model.tokens("The old river")), graphs.load(folder / f"{NAME}.safetensors")
    torch.testing.assert_close(found.edges, expected.edges)
    assert found.meta["prompt"] == "<bos>The old river"
    assert found.texts[:4] == ["<bos>", "T", "h", "e"]
    assert found.meta["run"] == "runs/batchtopk"
    assert found.meta["settings"]["max_logits"] == 10
    assert json.loads((folder / f"{NAME}.json").read_text())["metadata"]["prompt_tokens"] == found.texts
    lines = [record.getMessage() for record in caplog.records]
    assert f"prompt    <bos>The old river ({len(found.texts)} tokens)" in lines
    explained = next(line for line in lines if line.startswith("explains  "))
    for label, p in zip(found.labels, found.probability[found.of(Kind.logit)].tolist(), strict=True):
        assert f"{label} {p:.1%}" in explained
    assert any(f"{found.n_nodes:,} nodes of {found.n_active:,} active features" in line for line in lines)
    assert any("completeness without leaves" in line for line in lines)
    assert any(line.startswith("seconds   load") and "peak memory" in line and "validate" in line for line in lines)
    assert any("attention, norms and gates held" in line for line in lines)
    assert any(
        line.startswith("next: clt intervene run=runs/batchtopk prompt='The old river' edits=") for line in lines
    )
    for name in written - {"graph-metadata.json"}:
        assert any(line.startswith(str(folder / name)) for line in lines), name


def test_settings_and_the_slug_are_the_users(work: Path) -> None:
    words = ("prompt=It's, ~f=${a}", "graph.difference=[a,b]", "graph.slug=two", "graph.max_feature_nodes=3")
    assert launch("graph", Request(overrides=("run=batchtopk", *words, "graph.dtype=float64"))) == 0
    found = graphs.load(Path("runs/batchtopk/graphs/two.safetensors"))
    assert found.meta["prompt"] == "<bos>It's, <unk>f<unk><unk><unk>a<unk>"
    assert found.labels == ["a - b"]
    assert found.kind.count(Kind.feature) == 3 < found.n_active
    assert found.edges.dtype == torch.float64
    assert not Path("runs/batchtopk/graphs/two.check.json").exists()


def test_edges_between_positions_are_told_head_by_head(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = (
        "run=batchtopk",
        "prompt=The old river",
        "graph.heads=3",
        "graph.circuit_tracer_only=true",
        "graph.scan=me",
    )
    with caplog.at_level(logging.INFO, "pipeline"):
        assert launch("graph", Request(overrides=words)) == 0
    file = Path(f"runs/batchtopk/graphs/{NAME}.heads.json")
    edges = json.loads(file.read_text())
    traced = graphs.load(file.with_name(f"{NAME}.safetensors"))
    number = {node: i for i, node in enumerate(graph_json.node_ids(traced))}
    assert len(edges) == 3
    for edge in edges:
        target, source = number[edge["target"]], number[edge["source"]]
        assert traced.position[target] > traced.position[source]
        assert edge["weight"] == pytest.approx(float(traced.edges[target, source]))
        assert sum(part["part"] for part in edge["parts"]) == pytest.approx(edge["weight"], rel=0.2)
    lines = [record.getMessage() for record in caplog.records]
    first = edges[0]["parts"][0]
    start = f"heads     {edges[0]['source']} -> {edges[0]['target']}"
    assert any(line.startswith(start) and f": {first['path']} {first['part']:.3g}" in line for line in lines)
    assert any(line.startswith(str(file)) for line in lines)
    drawn = json.loads(file.with_name(f"{NAME}.json").read_text())
    known = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    assert {node["feature_type"] for node in drawn["nodes"]} <= known
    assert drawn["metadata"]["scan"] == "me"
    small = graph_scores.reference(traced)
    assert len(drawn["links"]) == int(graph_scores.prune(small).edges.sum())
    assert Kind.bias in traced.kind


def test_a_file_of_prompts_gives_a_graph_of_each(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("prompts.txt").write_text("The old river\n\nThe old: river\nA day\nA day\n")
    assert launch("graph", Request(overrides=("run=batchtopk", "prompts=prompts.txt"))) == 0
    folder = Path("runs/batchtopk/graphs")
    found = {file.stem: graphs.load(file).meta["prompt"] for file in folder.glob("*.safetensors")}
    assert found == {
        NAME: "<bos>The old river",
        f"{NAME}-2": "<bos>The old<unk> river",
        "A-day": "<bos>A day",
    }
    model = pipeline.replace("runs/batchtopk", device="cpu")
    alone = trace(model, model.tokens("A day"))
    torch.testing.assert_close(graphs.load(folder / "A-day.safetensors").edges, alone.edges)
    assert "next: clt circuits graphs=runs/batchtopk/graphs" in caplog.text


def test_features_that_nobody_described_are_seen_in_the_runs_own_text(
    work: Path, trained_runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("run=batchtopk", "prompt=The old river")
    file = Path(f"runs/batchtopk/graphs/{NAME}.json")

    def names() -> dict[str, str]:
        nodes = json.loads(file.read_text())["nodes"]
        return {n["node_id"]: n["clerp"] for n in nodes if n["feature_type"] == "cross layer transcoder"}

    cache = f"cache.dir={trained_runs / 'cache'}"
    assert launch("graph", Request(overrides=(*words, cache, "graph.examples=false"))) == 0
    unseen = names()
    assert launch("graph", Request(overrides=(*words, cache))) == 0
    seen = names()
    assert not Path("runs/batchtopk/features").exists()
    assert launch("features", Request(overrides=("run=batchtopk", cache, "features.related=0"))) == 0
    assert launch("graph", Request(overrides=(*words, "graph.examples=false"))) == 0
    assert names() == seen != unseen

    shutil.rmtree("runs/batchtopk/features")
    assert launch("graph", Request(overrides=(*words, "cache.dir=nowhere"))) == 0
    assert names() == unseen
    assert "features without contexts: the cache nowhere" in caplog.text
    assert launch("graph", Request(overrides=(*words, "cache.dir=nowhere", "graph.examples=true"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no prompt; add prompt="),
        (["prompts=none.txt"], "prompts=none.txt cannot be read"),
        (["prompts=none.txt", "prompt=a"], "leave prompt= and graph.slug= out"),
        (["prompt=a", "graph.nodes=0"], "graph.nodes=0.0 is no share"),
        (["prompt=a", "graph.heads=-1"], "graph.heads=-1 is no number of edges"),
        (["prompt=a", "graph.slug=../a"], "is no name of a file"),
        (["prompt=a", "graph.feature=7"], "names no feature; write LAYER/INDEX@POSITION"),
        (["prompt=a", "graph.targets=[ab]"], '"ab" is 2 tokens'),
        (["prompt=a", "graph.memory_gb=1e-6"], "is too little"),
        (["prompt="], "the prompt is one token"),
        (["prompt=a", "graph.batc=3"], "did you mean batch?"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_and_nothing_is_left(
    work: Path, caplog: pytest.LogCaptureFixture, words: list[str], message: str
) -> None:
    assert launch("graph", Request(overrides=("run=batchtopk", *words))) == 2
    assert message in caplog.records[-1].getMessage()
    assert not Path("runs/batchtopk/graphs").exists()


@pytest.mark.parametrize(
    ("prompt", "name"), [("The capital of France is", "The-capital-of-France-is"), ("", "prompt"), ("x " * 90, None)]
)
def test_a_slug_is_what_a_file_can_be_called(prompt: str, name: str | None) -> None:
    found = graph.slug(prompt)
    assert found == (name or found)
    assert 0 < len(found) <= graph.MOST_LETTERS
