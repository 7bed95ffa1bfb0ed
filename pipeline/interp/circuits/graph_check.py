"""Does an attribution graph say what happens when a feature is taken away?

Feature s, active with a_s, is set to 0. With frozen gates (the active features stay active and follow their
pre-activations) the graph says what becomes of every later pre-activation and of the outputs, in topological order:

    dh_t = -A[t, s] + sum over features u != s of (A[t, u] / a_u) dh_u

Five experiments in the model, errors constant in all of them:

    direct     attention, norms and all other features held: dh_t = -A[t, s]
    frozen     attention and norms held, gates frozen: dh_t as above, exactly
    gates      attention and norms held, every feature under its own rule
    norms      attention held, norms and gates live
    live       attention live too

What is predicted exactly differs by rounding alone: `error` is the largest difference over the largest effect. The
others are compared by, over all pairs of a source and a later target, and over the outputs alone,

    r2      1 - sum (measured - predicted)^2 / sum measured^2: nothing is fitted
    slope   sum predicted measured / sum measured^2: 1 is the same size
    cosine  of all predicted and all measured effects: 1 whatever the size
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.pattern import Pattern
from pipeline.errors import UserError
from pipeline.interp.circuits import graph_scores, graph_targets, held_prompt
from pipeline.interp.circuits.attribution import in_dtype
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.circuits.graph_targets import Outputs
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering.feature_edits import Edit, Where
from pipeline.interp.steering.intervene import Before, batches, edited, recorded
from pipeline.interp.steering.intervene_options import Hold, InterveneOptions, Model, Response
from pipeline.plain import from_plain
from pipeline.progress import Progress

HELD = InterveneOptions(Model.replacement, attention=Hold.frozen, norms=Hold.frozen)
EXPERIMENTS = {
    "direct": replace(HELD, layers=Response.constrained),
    "frozen": replace(HELD, layers=Response.gates),
    "gates": HELD,
    "norms": InterveneOptions(Model.replacement, attention=Hold.frozen),
    "live": InterveneOptions(Model.replacement),
}


class Effects(NamedTuple):
    """Of m sources on f features and k outputs."""

    features: Tensor
    """[m, f]: changes of pre-activations."""
    outputs: Tensor
    """[m, k]"""


def check(model: ReplacementModel, graph: Graph, n: int = 50, batch_tokens: int = 2048) -> dict[str, Any]:
    """The n features of most influence (all, if they are fewer) ablated one by one. `model` is that of the graph; it
    runs in the graph's dtype. -> what JSON holds: the numbers of each experiment, and of each node.

    Raises UserError for a graph without features and one of another model."""
    model = in_dtype(model, graph.edges.dtype)
    n_features = graph.of(Kind.feature).stop
    if not n_features or n < 1:
        raise UserError("the graph has no feature to ablate, or none is asked for; nothing can be checked")
    if (graph.n_layers, graph.d_features) != (model.lm.n_layers, model.transcoder.d_features):
        raise UserError(f"the graph is of a transcoder of {graph.n_layers} layers; give the run that it was made of")
    influence = graph_scores.influence(graph)
    sources = influence[:n_features].topk(min(n, n_features)).indices
    direct, total = predicted(graph, sources)
    with Progress(len(EXPERIMENTS), "experiment", "validate") as bar:
        measured = {}
        for name, options in EXPERIMENTS.items():
            measured[name] = _measured(model, graph, sources, options, batch_tokens)
            bar.update(1)
    later = _later(graph, sources)
    numbers = {name: _numbers(measured[name], direct if name == "direct" else total, later) for name in EXPERIMENTS}
    return {
        "n": len(sources),
        "n_features": n_features,
        "n_cut": graph.n_active - n_features,
        "dtype": str(graph.edges.dtype).removeprefix("torch."),
        **numbers,
        "nodes": list(_nodes(graph, sources, influence, total, measured, later)),
    }


def predicted(graph: Graph, sources: Tensor) -> tuple[Effects, Effects]:
    """What the graph says of ablating each source, int64 [m]: with all other features held, and with frozen gates."""
    features, outputs = graph.of(Kind.feature), graph.of(Kind.logit)
    among, onto = graph.edges[features, features], graph.edges[outputs, features]
    gains = 1 / graph.activation[features].to(among)
    # Rows by layer, so that what a feature gets comes from rows above its own: the matrix is triangular.
    system = torch.eye(len(among), dtype=among.dtype) - among * gains
    through = torch.linalg.solve_triangular(system, -among[:, sources], upper=False, unitriangular=True)
    total = Effects(through.T, (onto * gains @ through - onto[:, sources]).T)
    return Effects(-among[:, sources].T, -onto[:, sources].T), total


def _measured(
    model: ReplacementModel, graph: Graph, sources: Tensor, options: InterveneOptions, batch_tokens: int
) -> Effects:
    """The changes in the model when each source is set to 0."""
    tokens = graph.tokens[None]
    before, gates = recorded(model, tokens, options)
    outputs = _outputs(model, graph)
    respond = _nodes_of(graph, before) if options.layers == Response.gates else None
    edits = [[Edit(*place, 0.0, 0.0)] for place in _places(graph, sources)]
    found = []
    for some in batches(edits, tokens.shape[1], InterveneOptions(batch_tokens=batch_tokens)):
        x: dict[int, Tensor] = {}
        with _last_read(model) as last:
            # The first row is not edited: what rounding there is it has too.
            watch = x.__setitem__
            edited(model, tokens, before, [[], *some], options, gates, watch, respond, hold_others=True, last=True)
        read = last[0][:, -1] if outputs.layer == model.lm.n_layers else x[outputs.layer][:, outputs.position]
        values = read @ outputs.rows.T + outputs.biases
        h = _pre_activations(model, graph, x)
        found.append(Effects(h[1:] - h[0], values[1:] - values[0]))
    return Effects(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


def _pre_activations(model: ReplacementModel, graph: Graph, x: dict[int, Tensor]) -> Tensor:
    """Of the graph's features, where the transcoder reads x (by layer [n, T, D]). -> [n, f]"""
    parts = []
    nodes = graph.of(Kind.feature)
    for layer, read in sorted(x.items()):
        at = (graph.layer[nodes] == layer).nonzero().squeeze(1).to(read.device)
        ids, position = graph.index[nodes].to(read.device)[at], graph.position[nodes].to(read.device)[at]
        rows, bias = model.transcoder.encoder_rows(layer, ids), model.transcoder.b_enc[layer, ids]
        parts.append((read[:, position] * rows).sum(dim=-1) + bias)
    return torch.cat(parts, dim=1)


def _outputs(model: ReplacementModel, graph: Graph) -> Outputs:
    """How the graph's outputs are read."""
    options = from_plain(GraphOptions, graph.meta["settings"])
    found = graph_targets.outputs(model, held_prompt.recorded(model, graph.tokens[None]), options)
    if found.labels != graph.labels:
        raise UserError("the model gives other likely tokens than the graph has; make the graph again with clt graph")
    return found


def _places(graph: Graph, nodes: Tensor) -> Iterator[tuple[int, int, Where]]:
    for node in nodes.tolist():
        yield int(graph.layer[node]), int(graph.index[node]), Where((int(graph.position[node]),))


def _nodes_of(graph: Graph, before: Before) -> list[Tensor]:
    """Which of the features before are nodes of the graph, by layer: those that a limit cut stay as they are."""
    nodes = graph.of(Kind.feature)
    found = []
    for layer, (pattern, _) in enumerate(before.features):
        of_layer = graph.layer[nodes] == layer
        keys = graph.position[nodes][of_layer] * graph.d_features + graph.index[nodes][of_layer]
        found.append(torch.isin(_keys(pattern), keys.to(pattern.indices.device)))
    return found


def _keys(pattern: Pattern) -> Tensor:
    return pattern.tokens * pattern.n_features + pattern.indices


class _last_read:
    """What the unembedding reads, [n, T, D], comes into the list."""

    def __init__(self, model: ReplacementModel) -> None:
        self.head = model.lm.weights.get_output_embeddings()

    def __enter__(self) -> list[Tensor]:
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])

        self.handle = self.head.register_forward_pre_hook(keep)
        return found

    def __exit__(self, *args: object) -> None:
        self.handle.remove()


def _later(graph: Graph, sources: Tensor) -> Tensor:
    """Which features can feel a source: of a higher layer, at its position or behind it. bool [m, f]"""
    nodes = graph.of(Kind.feature)
    layer, position = graph.layer[nodes], graph.position[nodes]
    return (layer > layer[sources][:, None]) & (position >= position[sources][:, None])


def _numbers(measured: Effects, expected: Effects, later: Tensor) -> dict[str, Any]:
    return {
        "features": _compared(measured.features[later], expected.features[later]),
        "outputs": _compared(measured.outputs.flatten(), expected.outputs.flatten()),
    }


def _compared(measured: Tensor, expected: Tensor) -> dict[str, Any]:
    """None where nothing is changed at all."""
    measured, expected = measured.double(), expected.double()
    if not len(measured) or not measured.any():
        return {"n": len(measured), "r2": None, "slope": None, "cosine": None, "error": None}
    total, both = measured.square().sum(), (measured * expected).sum()
    return {
        "n": len(measured),
        "r2": float(1 - (measured - expected).square().sum() / total),
        "slope": float(both / total),
        "cosine": float(both / (total * expected.square().sum()).sqrt().clamp(min=1e-300)),
        "error": float((measured - expected).abs().max() / measured.abs().max()),
    }


def _nodes(
    graph: Graph, sources: Tensor, influence: Tensor, total: Effects, measured: dict[str, Effects], later: Tensor
) -> Iterator[dict[str, Any]]:
    """Of each source, by falling influence: what happens to the first output, and how well features follow."""
    for i, node in enumerate(sources.tolist()):
        yield {
            "node": node,
            "layer": int(graph.layer[node]),
            "feature": int(graph.index[node]),
            "position": int(graph.position[node]),
            "activation": float(graph.activation[node]),
            "influence": float(influence[node]),
            "predicted": float(total.outputs[i, 0]),
            **{name: float(measured[name].outputs[i, 0]) for name in ("frozen", "gates", "norms", "live")},
            "r2": _compared(measured["gates"].features[i, later[i]], total.features[i, later[i]])["r2"],
        }


def table(found: dict[str, Any], texts: Sequence[str], labels: Sequence[str], top: int = 10) -> Iterator[str]:
    """The check for people. texts: of each token; labels: of each output."""
    cut = f"; {found['n_cut']} features that a limit cut stay as they are" if found["n_cut"] else ""
    yield f"{found['n']} of {found['n_features']} features ablated, one at a time, errors held{cut}"
    yield f"{'':44}{'features':36}outputs"
    yield f"{'predicted effect against measured':42}" + "   ".join(["     R2   slope  cosine    error"] * 2)
    lines = {
        "direct": "all other features held (direct effect)",
        "frozen": "attention, norms and gates held",
        "gates": "attention and norms held, gates live",
        "norms": "attention held, norms and gates live",
        "live": "everything live",
    }
    for name, line in lines.items():
        cells = (found[name][kind] for kind in ("features", "outputs"))
        yield f"  {line:41}" + "   ".join(_cell(one) for one in cells)
    yield f"change of {labels[0]!r} when a feature is set to 0:"
    yield "  feature         at                    influence  predicted    gates     live  R2 of features"
    for node in found["nodes"][:top]:
        name = f"{node['layer']}/{node['feature']}"
        at = f"{node['position']} {texts[node['position']]!r}"
        r2 = "" if node["r2"] is None else f"{node['r2']:10.3f}"
        yield (
            f"  {name:15} {at:20.20} {node['influence']:10.4f} {node['predicted']:+10.3f} {node['gates']:+8.3f} "
            f"{node['live']:+8.3f}{r2}"
        )


def _cell(one: dict[str, Any]) -> str:
    if one["r2"] is None:
        return f"{'no effect':>32}"
    return f"{one['r2']:7.3f} {one['slope']:7.3f} {one['cosine']:7.3f} {one['error']:8.1e}"
