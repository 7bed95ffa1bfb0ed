"""An attribution graph as one HTML page: it holds all that it needs and opens without a network.

page(graph, graph_scores.prune(graph), supernodes, partial(feature_files.read, runs / "demo" / "features"))
"""

import datetime
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

import pipeline
from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode
from pipeline.web.graph_data import FeatureData, payload

SPECIAL = re.compile(r"<\|?[\w ]+\|?>")
SCRIPTS = tuple(
    f"graph{part}.js" for part in ("_prune", "_layout", "_draw", "_panel", "_state", "", "_side", "_controls")
)


def page(
    graph: Graph,
    pruned: graph_scores.Pruned | None = None,
    supernodes: Iterable[Supernode] = (),
    features: FeatureData | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    slug: str = "graph",
) -> str:
    """-> the text of the page.

    pruned: gives the shares at which its sliders stand at first; without it those of `prune`. supernodes: groups that
    are drawn as one node. features: what is known of a feature, None where nothing is. labels: of features by (layer,
    index); others are named by their top contexts. slug: names the file of groups that the page saves.
    """
    data = payload(graph, pruned or graph_scores.prune(graph), supernodes, features, labels or {})
    data |= {"slug": slug, "scores": _scores(graph), "settings": _settings(graph)}
    probability = graph.probability[graph.of(Kind.logit)].tolist()
    outputs = sorted(zip(graph.labels, probability, strict=True), key=lambda output: -output[1])
    return _template().render(
        title=_title(graph),
        data=data,
        outputs=outputs,
        scripts=SCRIPTS,
        facts=_facts(graph),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=pipeline.__version__,
    )


def _title(graph: Graph) -> str:
    """The prompt, without the special token that begins it."""
    prompt = str(graph.meta.get("prompt") or "".join(graph.texts))
    begun = SPECIAL.match(prompt)
    return (prompt[begun.end() :].strip() if begun else prompt) or prompt


def _facts(graph: Graph) -> dict[str, str]:
    found = {"run": graph.meta.get("run"), "model": graph.meta.get("model")}
    return {name: str(value) for name, value in found.items() if value}


def _scores(graph: Graph) -> list[tuple[str, float | None, str]]:
    told = graph.meta.get("scores") or graph_scores.report(graph)
    scores, theirs = (graph_scores.Scores(**told[nodes]) for nodes in ("all_nodes", "circuit_tracer"))
    return [
        ("replacement", scores.replacement, "Influence of tokens, of that of tokens and errors together"),
        ("completeness", scores.completeness, "Share of the inputs that are no errors, weighted by influence"),
        ("without leaves", scores.completeness_without_leaves, "Completeness over the nodes that have inputs"),
        ("replacement, circuit-tracer's nodes", theirs.replacement, "Of features, errors, tokens and logits alone"),
        ("completeness, circuit-tracer's nodes", theirs.completeness, "Of features, errors, tokens and logits alone"),
    ]


def _settings(graph: Graph) -> list[tuple[str, str]]:
    told = {key: value for key, value in graph.meta.items() if key not in ("labels", "scores", "settings")}
    return [(key, _shown(value)) for key, value in _flat(told | (graph.meta.get("settings") or {}))]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("graph.html.j2")
