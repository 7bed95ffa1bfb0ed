"""Circuits that recur: features, and edges between features, that the pruned graphs of many prompts share.

A feature is the same one in two graphs by its layer and number, whatever its position. In one graph it counts once:

    activation    the largest of its kept nodes
    influence     its kept nodes' part of all influence, summed
    weight        of an edge between two features: the sum of the kept edges between their nodes

and over the graphs that have it each of them is averaged. Edges into the outputs are counted together, whatever the
token: the output of an edge is the most likely one of its graph, or the first that was asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.interp.circuits import graph_scores
from pipeline.interp.circuits.graph import Graph, Kind

Place = tuple[int, int]
"""(layer, feature)"""


class RecurringFeature(NamedTuple):
    layer: int
    feature: int
    graphs: int
    share: float
    """Of all graphs."""
    activation: float
    influence: float


class RecurringEdge(NamedTuple):
    source: Place
    target: Place | None
    """None: the output."""
    graphs: int
    share: float
    weight: float
    positive: float
    """Of the graphs that have it, the part in which its weight is positive."""


class Recurring(NamedTuple):
    """The most frequent first, among equals those of most influence or weight."""

    n_graphs: int
    features: list[RecurringFeature]
    edges: list[RecurringEdge]


@dataclass
class Counts:
    """What has been seen so far. Memory goes with what the graphs keep, not with their size."""

    n_graphs: int = 0
    features: dict[Place, list[tuple[float, float]]] = field(default_factory=dict)
    """(activation, influence) in each graph that has it."""
    edges: dict[tuple[Place, Place | None], list[float]] = field(default_factory=dict)

    def add(self, graph: Graph, nodes: float = 0.8, edges: float = 0.98) -> None:
        """Count one graph, pruned to these shares."""
        pruned = graph_scores.prune(graph, nodes, edges)
        total = float(pruned.influence.sum()) or 1.0
        kept = pruned.nodes[graph.of(Kind.feature)].nonzero().flatten().tolist()
        places = {i: (int(graph.layer[i]), int(graph.index[i])) for i in kept}
        here: dict[Place, tuple[float, float]] = {}
        for i, place in places.items():
            activation, part = here.get(place, (0.0, 0.0))
            here[place] = (max(activation, float(graph.activation[i])), part + float(pruned.influence[i]) / total)
        between: dict[tuple[Place, Place | None], float] = {}
        output = graph.of(Kind.logit).start
        for target, source in pruned.pairs().tolist():
            if source in places and (target in places or target == output):
                pair = (places[source], places.get(target))
                between[pair] = between.get(pair, 0.0) + float(graph.edges[target, source])
        self.n_graphs += 1
        for place, one in here.items():
            self.features.setdefault(place, []).append(one)
        for pair, weight in between.items():
            self.edges.setdefault(pair, []).append(weight)

    def recurring(self, least: int = 2) -> Recurring:
        """Those in `least` graphs or more."""
        n = max(self.n_graphs, 1)
        features = [
            RecurringFeature(*place, len(seen), len(seen) / n, _mean(a for a, _ in seen), _mean(i for _, i in seen))
            for place, seen in self.features.items()
            if len(seen) >= least
        ]
        edges = [
            RecurringEdge(*pair, len(seen), len(seen) / n, _mean(seen), _mean(float(weight > 0) for weight in seen))
            for pair, seen in self.edges.items()
            if len(seen) >= least
        ]
        features.sort(key=lambda row: (-row.graphs, -row.influence, row.layer, row.feature))
        edges.sort(key=lambda row: (-row.graphs, -abs(row.weight), row.source))
        return Recurring(self.n_graphs, features, edges)


def recurring(graphs: Iterable[Graph], least: int = 2, nodes: float = 0.8, edges: float = 0.98) -> Recurring:
    """What recurs in graphs of one run, read one after the other. UserError for graphs of several runs, whose features
    have nothing to do with each other."""
    counts, run = Counts(), None
    for graph in graphs:
        own = graph.meta["run"]
        if run is not None and own != run:
            raise UserError(f"the graphs are of the runs {run} and {own}, whose features differ; give those of one run")
        run = own
        counts.add(graph, nodes, edges)
    return counts.recurring(least)


def as_plain(found: Recurring) -> dict[str, Any]:
    """As JSON holds it: features are "layer/feature", the output is "output"."""
    return {
        "n_graphs": found.n_graphs,
        "features": [
            {"feature": name((row.layer, row.feature)), **{key: getattr(row, key) for key in row._fields[2:]}}
            for row in found.features
        ],
        "edges": [
            {
                "source": name(row.source),
                "target": name(row.target),
                **{key: getattr(row, key) for key in row._fields[2:]},
            }
            for row in found.edges
        ],
    }


def name(place: Place | None) -> str:
    return "output" if place is None else f"{place[0]}/{place[1]}"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
