"""`clt plot`: the numbers in each picture against their definitions, and pages that need nothing else."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pipeline
from pipeline.config import Request, compose, launch
from pipeline.data.cache import Cache
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.interp.dashboards import feature_files
from pipeline.interp.plots import plot_embedding
from pipeline.interp.replacement import ReplacementModel
from pipeline.stages import plot, train
from pipeline.web import plot_tokens
from tests.stages.conftest import SHORT
from tests.web.browser import CHROMIUM

PROMPT = "The old river"


def drawn(*words: str) -> dict[str, Any]:
    """The figure of the page that a command writes."""
    assert launch("plot", Request(overrides=("run=batchtopk", *words, "to=out/it.html"))) == 0
    text = Path("out/it.html").read_text()
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["plot"]


def dense(model: ReplacementModel, prompt: str) -> tuple[Tensor, Tensor]:
    """(tokens [1, T], activations [T, L, F], those at position 0 left out)"""
    tokens = model.tokens(prompt)
    x = torch.stack([layer[0] for layer in model.original(tokens).x], dim=1)
    with torch.no_grad():
        found = model.transcoder(x, need_pre_acts=True).features
    assert isinstance(found, Tensor)
    found[0] = 0
    return tokens, found


@pytest.fixture
def model(finished: Path) -> ReplacementModel:
    return pipeline.replace("runs/batchtopk", device="cpu")


def named(label: str) -> tuple[int, int]:
    layer, feature = re.match(r"(\d+)/(\d+)", label).groups()  # type: ignore[union-attr]
    return int(layer), int(feature)


def test_a_heatmap_holds_the_activations_of_the_text(model: ReplacementModel) -> None:
    figure = drawn("kind=heatmap", f"prompt={PROMPT}", "plot.n=9")
    _, activations = dense(model, PROMPT)
    rows = [named(label) for label in figure["layout"]["yaxis"]["ticktext"]]
    assert len(rows) == len(set(rows)) == 9
    assert rows == sorted(rows, key=lambda row: row[0])
    for (layer, feature), values in zip(rows, figure["data"][0]["z"], strict=True):
        assert [value or 0 for value in values] == pytest.approx(activations[:, layer, feature].tolist(), rel=1e-4)
    strongest = activations * model.transcoder.decoder_norms()
    best = {divmod(int(strongest[t].flatten().argmax()), 33) for t in range(1, len(activations))}
    assert best & set(rows) == best if len(best) <= 9 else set(rows) <= best, "each token's first one comes first"


def test_a_coloured_text_shows_each_token_once_for_each_feature(model: ReplacementModel) -> None:
    figure = drawn("kind=tokens", f"prompt={PROMPT * 3}", "plot.features=[0/3,2/7]")
    tokens, activations = dense(model, PROMPT * 3)
    words = figure["data"][0]["text"]
    assert len(words) == 2 * tokens.shape[1]
    shapes = [shape for shape in figure["layout"]["shapes"] if shape["type"] == "rect"]
    assert len(shapes) == int((activations[:, 0, 3] > 0).sum() + (activations[:, 2, 7] > 0).sum())


def test_a_long_text_goes_on_in_lines_below() -> None:
    tokens = [" word"] * 70
    figure = plot_tokens.coloured(tokens, ["0/1 a", "1/2 b"], [0, 1], [[1.0] * 70, [0.0] * 69 + [2.0]])
    shapes = [shape for shape in figure["layout"]["shapes"] if shape["type"] == "rect"]
    assert len(shapes) == 71
    assert max(shape["x1"] for shape in shapes) <= plot_tokens.LINE_CHARACTERS
    assert min(shape["x0"] for shape in shapes) == plot_tokens.NAME_CHARACTERS + 1
    first = [shape for shape in shapes if shape["y1"] < figure["data"][1]["y"][1] - 0.5]
    assert len(first) == 70, "the second feature's text begins below the first one's"
    assert len({shape["y0"] for shape in first}) == 4


def ablated(model: ReplacementModel, tokens: Tensor, layer: int, feature: int, factor: Tensor) -> Tensor:
    """Logits with (factor - 1) [T] times what a feature writes added to the original's MLP outputs, held constant."""
    original, rows = model.original(tokens), model.transcoder.W_dec[layer][feature]

    def mlp(m: int, resid: Tensor, own: Tensor) -> Tensor:
        change = factor[:, None] * rows[m - layer] if m >= layer else torch.zeros(1)
        return original.mlp_out[m] + change

    return model.lm.logits(tokens, mlp)[0, -1]


def test_an_effect_is_what_an_ablation_takes_from_the_logit(model: ReplacementModel) -> None:
    figure = drawn("kind=ranking", f"prompt={PROMPT}", "plot.by=effect", "plot.token=v", "plot.n=6")
    tokens, activations = dense(model, PROMPT)
    token = model.lm.tokenizer("v", add_special_tokens=False)["input_ids"][0]
    before = model.original(tokens).logits[0, -1]
    labels = figure["layout"]["yaxis"]["ticktext"]
    bars = {place: value for t in figure["data"] for place, value in zip(t["y"], t["x"], strict=True)}
    assert len(bars) == 6
    for place, value in bars.items():
        layer, feature = named(labels[place])
        at = int(labels[place].split("@ ")[1].split()[0])
        factor = torch.zeros(tokens.shape[1])
        factor[at] = -activations[at, layer, feature]
        after = ablated(model, tokens, layer, feature, factor)
        change = (before[token] - before.mean()) - (after[token] - after.mean())
        assert value == pytest.approx(float(change), rel=1e-3, abs=1e-5)
    assert [abs(bars[place]) for place in range(6)] == sorted(map(abs, bars.values()), reverse=True)


def test_importance_is_activation_times_decoder_norm(model: ReplacementModel) -> None:
    figure = drawn("kind=ranking", f"prompt={PROMPT}", "plot.n=7")
    _, activations = dense(model, PROMPT)
    importance = (activations * model.transcoder.decoder_norms()).flatten().sort(descending=True).values[:7]
    values = sorted((value for trace in figure["data"] for value in trace["x"]), reverse=True)
    assert values == pytest.approx(importance.tolist(), rel=1e-4)


def test_probabilities_follow_the_factors(model: ReplacementModel) -> None:
    tokens, activations = dense(model, PROMPT)
    layer, feature = divmod(int((activations[-1] * model.transcoder.decoder_norms()).flatten().argmax()), 33)
    words = ["plot.factors=[2,0,1]", f"plot.features=[{layer}/{feature}]", "plot.token=v"]
    figure = drawn("kind=token_probability", f"prompt={PROMPT}", *words)
    lines = {trace["name"]: trace for trace in figure["data"] if trace.get("name")}
    assert "v" in lines
    for name, trace in lines.items():
        assert trace["x"] == [0, 1, 2]
        ids = model.lm.tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            continue  # a space, or a token that is spelled out
        for factor, probability in zip(trace["x"], trace["y"], strict=True):
            change = (factor - 1) * activations[:, layer, feature]
            wanted = ablated(model, tokens, layer, feature, change).softmax(dim=-1)[ids[0]]
            assert probability == pytest.approx(float(wanted), abs=2e-5)


def test_correlations_are_pearsons(model: ReplacementModel) -> None:
    figure = drawn("kind=correlation", "plot.n=12")
    cache = Cache.open(next(path for path in Path("cache").iterdir() if path.is_dir()))
    _, resid_mid, _ = cache.held_out(Split.evaluation)
    with torch.no_grad():
        found = model.transcoder(cache.norm(resid_mid.float()), need_pre_acts=True).features
    assert isinstance(found, Tensor)
    values = found.double().numpy()
    names = [named(label) for label in figure["layout"]["yaxis2"]["ticktext"]]
    assert [sum(layer == l for l, _ in names) for layer in range(3)] == [4, 4, 4]
    columns = np.stack([values[:, layer, feature] for layer, feature in names])
    assert np.array(figure["data"][1]["z"]) == pytest.approx(np.corrcoef(columns), abs=1e-3)
    often = [[f for f in range(33) if (values[:, layer, f] > 0).sum() >= 10] for layer in range(3)]
    for i, row in enumerate(figure["data"][0]["z"]):
        for j, value in enumerate(row):
            pairs = np.corrcoef(values[:, i, often[i]].T, values[:, j, often[j]].T)[: len(often[i]), len(often[i]) :]
            if i == j:
                np.fill_diagonal(pairs, -1)
            assert value == pytest.approx(pairs.max(axis=1).mean(), abs=1e-3)


def test_a_map_shows_every_feature_in_each_projection(model: ReplacementModel) -> None:
    pytest.importorskip("sklearn")
    figure = drawn("kind=embedding", "plot.perplexity=5")
    points = [trace for trace in figure["data"] if "markers" in trace["mode"]]
    maps = {trace["xaxis"] for trace in points}
    assert len(maps) >= 2
    for one in maps:
        assert sum(len(trace["x"]) for trace in points if trace["xaxis"] == one) == 99
    first = np.array([[x, y] for t in points if t["xaxis"] == "x" for x, y in zip(t["x"], t["y"], strict=True)])
    rows = torch.cat(
        [torch.cat([torch.zeros(33, l, 20), W], 1).flatten(1) for l, W in enumerate(model.transcoder.W_dec)]
    )
    unit = torch.nn.functional.normalize(rows, dim=1)
    principal = torch.linalg.svd(unit - unit.mean(dim=0)).Vh[:2]
    expected = ((unit - unit.mean(dim=0)) @ principal.T).abs().numpy()
    assert np.abs(first) == pytest.approx(expected, abs=2e-3)


def test_labels_on_a_map_do_not_run_into_one_another() -> None:
    points = np.random.default_rng(0).normal(size=(300, 2))
    texts = ["a word"] * 300
    chosen = plot_embedding.legible(points, texts, 40)
    assert 10 < len(set(chosen)) == len(chosen) <= 40
    unit = (points - points.min(axis=0)) / np.ptp(points, axis=0)
    for n, i in enumerate(chosen):
        for j in chosen[:n]:
            dx, dy = np.abs(unit[i] - unit[j])
            assert dx > 6 * plot_embedding.LETTER or dy > plot_embedding.LINE
    assert plot_embedding.legible(points[:0], [], 5) == []


def test_labels_and_contexts_come_from_described_features(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "pipeline")
    drawn("kind=heatmap", f"prompt={PROMPT}")
    assert "none has a label; run clt features first" in caplog.text
    caplog.clear()
    assert launch("features", Request(overrides=("run=batchtopk",))) == 0
    figure = drawn("kind=heatmap", f"prompt={PROMPT}")
    assert not caplog.text
    labels = figure["layout"]["yaxis"]["ticktext"]
    unknown = [label for label in labels if not re.match(r"\d/\d+ \S", label)]
    found = [feature_files.read(Path("runs/batchtopk/features"), *named(label)) for label in unknown]
    assert all(record is not None and not record["n_active"] for record in found), "never active on the text described"
    assert len(unknown) < len(labels) / 2
    page = Path("out/it.html").read_text()
    assert "strongest context" in page
    assert "default-src 'none'" in page
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', markup), "the page loads nothing"


def test_an_architecture_without_directions_has_all_but_a_map(cached: Path) -> None:
    words = [word for word in SHORT if not word.startswith("arch.d_features")]
    train.run(compose("train", ["+experiment=batchtopk", "activation.k=4", "arch=molt", "name=it", *words]))
    assert plot.run(compose("plot", ["run=it", "kind=heatmap", "prompt=The"])).name == "heatmap-the.html"
    with pytest.raises(UserError, match="features write no fixed direction, so there is no map"):
        plot.run(compose("plot", ["run=it", "kind=embedding"]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome")
def test_an_image_lies_beside_the_page(finished: Path) -> None:
    page = plot.run(compose("plot", ["run=batchtopk", f"prompt={PROMPT}", "plot.png=true"]))
    assert page == Path("runs/batchtopk/plots/heatmap-the-old-river.html")
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(page.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["kind=heatmap"], r"kind=heatmap is of a text; add prompt='some text'"),
        (["prompt="], r"give a prompt with more"),
        (["prompt=a", "plot.n=0"], r"plot.n=0 shows nothing"),
        (["prompt=a", "plot.features=[3/1]"], r"plot.features: there is no feature 3/1; layers are 0 to 2"),
        (["prompt=a", "to=it.png"], r"to=it.png must end in .html, such as to=it.html"),
        (["kind=ranking", "prompt=a", "plot.by=effect", "plot.token=river"], r'plot.token: "river" is 5 tokens'),
        (["kind=embedding", "plot.features=[0/1,0/2]"], r"a map of 2 features shows nothing"),
        (["kind=embedding", "plot.perplexity=99"], r"plot.perplexity=99 must be at least 1 and below"),
        (["kind=token_probability", "prompt=a", "plot.factors=[1]"], r"plot.factors needs two different numbers"),
    ],
)
def test_what_means_nothing_is_refused_and_leaves_nothing(words: list[str], why: str, finished: Path) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=why):
        plot.run(compose("plot", ["run=batchtopk", *words]))
    assert sorted(Path().rglob("*")) == before
