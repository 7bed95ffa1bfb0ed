"""Supernodes: features of a pruned graph that do the same, grouped, named and drawn as one node.

Two feature nodes are alike to the mean of what there is of

    edges      the mean of two cosines, over the edges that pruning kept: of their inputs (rows of A) and of their
               outputs (columns of the signed A, each row divided by the sum of its sizes)
    decoders   the cosine of what they write to the layers that both write

and not at all where their positions are further apart than `near`. Groups are merged from single nodes, the two that
are most alike on average first, down to a likeness of `alike` (average linkage).

Groups are saved beside their graph, SLUG.supernodes.json, and meant to be edited: labels, members, new groups of errors
or tokens. A file that was edited since it was written is kept, another is written anew.

The grouped graph keeps every sum. With S the members of a source and T those of a target,

    edges[T, S] = sum over t in T of share_t sum over s in S of A[t, s]      value[T] = sum over t of share_t value[t]

share_t being a feature's part of the activation of its group (of a logit, of its probability). Then each row sums to
the group's value, as the nodes' own rows do; effects among members are the edge of a group to itself.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.errors import UserError
from pipeline.files import write_aside
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode, node_ids
from pipeline.interp.circuits.graph_scores import Pruned
from pipeline.interp.edits import decoder_rows

ALIKE = 0.5
NEAR = 1
"""Positions. Tokenizers cut words, and what is known of a word is found at its last pieces."""

MOST = 400
"""Feature nodes that are compared; beyond that the most influential. Merging takes the cube of their number."""

TopTokens = Callable[[int, int], Sequence[str]]
"""(layer, feature) -> tokens that say what it is about, the best first; none where nothing is known."""

Promoted = Callable[[Sequence[int]], Sequence[str]]
"""Feature nodes of a graph -> the tokens that they make likely, the most likely first."""


class Grouped(NamedTuple):
    """A graph of m nodes: groups, and nodes in no group."""

    names: list[str]
    """Of each: the group's label, or the node's node_id."""
    members: list[list[int]]
    """The nodes of the graph that each stands for."""
    edges: Tensor
    """float64 [m, m]: edges[target, source]."""
    value: Tensor
    """float64 [m]: of targets; NaN else."""
    left_out: Tensor
    """float64 [m]: the effects on each of what is not shown, value - edges.sum(1) but for rounding; 0 else."""


def find(
    graph: Graph, pruned: Pruned, transcoder: Transcoder | None = None, alike: float = ALIKE, near: int = NEAR
) -> list[list[int]]:
    """Groups of two or more of the features that pruning kept. Without a transcoder edges alone decide. -> node
    numbers, the most influential group first"""
    features = pruned.nodes[graph.of(Kind.feature)].nonzero().flatten()
    features = features[pruned.cumulative[features].argsort(stable=True)[:MOST]]
    if len(features) < 2:
        return []
    likeness = of_edges(graph, pruned, features)
    if transcoder is not None:
        likeness = (likeness + of_decoders(graph, transcoder, features)) / 2
    position = graph.position[features]
    likeness[(position[:, None] - position).abs() > near] = -torch.inf
    groups = [[int(features[i]) for i in group] for group in merged(likeness, alike) if len(group) > 1]
    return sorted(groups, key=lambda group: float(pruned.cumulative[group].min()))


def of_edges(graph: Graph, pruned: Pruned, features: Tensor) -> Tensor:
    """How alike the inputs and outputs of features [k] are, from -1 to 1. -> float64 [k, k]"""
    kept = torch.where(pruned.edges, graph.edges.double(), 0.0)
    outputs = (kept / kept.abs().sum(dim=1, keepdim=True).clamp(min=1e-10))[:, features].T
    return (_cosines(kept[features]) + _cosines(outputs)) / 2


def of_decoders(graph: Graph, transcoder: Transcoder, features: Tensor) -> Tensor:
    """Cosines of what features [k] write to the layers that both of two write, 0 where there is none. -> float64
    [k, k]"""
    n_layers, d_model = transcoder.dims
    rows = torch.zeros(len(features), n_layers, d_model, dtype=torch.float64)
    writes = torch.zeros(len(features), n_layers, dtype=torch.float64)
    for i, feature in enumerate(features.tolist()):
        layer = int(graph.layer[feature])
        rows[i] = decoder_rows(transcoder, layer, graph.index[feature][None])[0].double().cpu()
        writes[i, list(transcoder.targets(layer))] = 1
    products = torch.einsum("imd,jmd->ij", rows, rows)
    shared = torch.einsum("im,jm->ij", rows.square().sum(dim=2), writes)  # |row i|^2 over what j writes too
    return products / (shared * shared.T).sqrt().clamp(min=1e-30)


def merged(likeness: Tensor, least: float) -> list[list[int]]:
    """Average linkage: from single items, the two groups that are most alike on average are joined until none are as
    alike as `least`. likeness [k, k], -inf for what may not be together"""
    groups = [[i] for i in range(len(likeness))]
    between = likeness.double().clone().fill_diagonal_(-torch.inf)
    while len(groups) > 1:
        at = int(between.argmax())
        a, b = sorted(divmod(at, len(groups)))
        if between[a, b] < least:
            break
        n_a, n_b = len(groups[a]), len(groups[b])
        joined = (n_a * between[a] + n_b * between[b]) / (n_a + n_b)
        groups[a] += groups.pop(b)
        between[a], between[:, a] = joined, joined
        between[a, a] = -torch.inf
        rest = [i for i in range(len(between)) if i != b]
        between = between[rest][:, rest]
    return groups


def labelled(
    graph: Graph,
    groups: Iterable[Sequence[int]],
    top_tokens: TopTokens,
    promoted: Promoted | None = None,
    n_tokens: int = 3,
) -> list[Supernode]:
    """Supernodes with readable labels, each its own: the tokens that the members' top tokens name most often, weighted
    by activation; without any, the tokens that the members stand at. In brackets what they promote together, where no
    top tokens are known, and of groups at the last position that reach the upper half of the layers: features there
    are active at whatever stands there, and what they are about is what they say."""
    ids, found = node_ids(graph), []
    for group in groups:
        votes: dict[str, float] = {}
        for i in group:
            names = top_tokens(int(graph.layer[i]), int(graph.index[i]))
            for rank, token in enumerate(dict.fromkeys(token.strip() for token in names)):
                votes[token] = votes.get(token, 0.0) + float(graph.activation[i]) / (1 + rank)
        places = dict.fromkeys(graph.texts[int(graph.position[i])].strip() for i in group)
        best = [token for token in sorted(votes, key=lambda token: -votes[token]) if token]
        label = ", ".join(best[:n_tokens]) or "at " + ", ".join(places)
        if promoted is not None and (not votes or _is_last(graph, group)):
            label += f" ({', '.join([token.strip() for token in promoted(group)][:n_tokens])})"
        found.append(Supernode(label, tuple(ids[i] for i in group)))
    return _distinct(found, set(ids))


def promoted_by(
    graph: Graph,
    transcoder: Transcoder,
    unembed: Callable[[Tensor], Tensor],
    token: Callable[[int], str],
    n_tokens: int = 3,
) -> Promoted:
    """What features promote together: the top tokens of all that they write to all layers, activations included,
    through `unembed`, [D] -> logits [V]. token: the text of an id."""

    def top(group: Sequence[int]) -> list[str]:
        total = torch.zeros(transcoder.dims.d_model, device=transcoder.b_dec.device)
        for i in group:
            layer, ids = int(graph.layer[i]), graph.index[i][None].to(total.device)
            for target in transcoder.targets(layer):
                total += float(graph.activation[i]) * transcoder.table(layer, target, ids)[0]
        return [token(int(i)) for i in unembed(total).topk(n_tokens).indices]

    return top


def grouped(graph: Graph, supernodes: Sequence[Supernode], pruned: Pruned | None = None) -> Grouped:
    """The graph with groups as nodes, in their order, and then what is in none. pruned: show what it keeps alone; what
    it does not is `left_out`. UserError for groups that are none of this graph."""
    members = members_of(graph, supernodes)
    shown = torch.ones(graph.n_nodes, dtype=torch.bool) if pruned is None else pruned.nodes
    members = [[i for i in group if shown[i]] for group in members]
    names = [supernode.label for supernode, group in zip(supernodes, members, strict=True) if group]
    members = [group for group in members if group]
    taken, ids = {i for group in members for i in group}, node_ids(graph)
    single = [i for i in shown.nonzero().flatten().tolist() if i not in taken]
    members += [[i] for i in single]
    spread = torch.zeros(len(members), graph.n_nodes, dtype=torch.float64)
    gather = torch.zeros(graph.n_nodes, len(members), dtype=torch.float64)
    for row, group in enumerate(members):
        spread[row, group] = _parts(graph, group)
        gather[group, row] = 1
    edges = graph.edges.double()
    kept = edges if pruned is None else torch.where(pruned.edges, edges, 0.0)
    is_target = torch.tensor([graph.kind[group[0]] in (Kind.feature, Kind.logit) for group in members])
    value = torch.where(is_target, spread @ graph.value.double().nan_to_num(0.0), torch.nan)
    left_out = spread @ (edges - kept).sum(dim=1)
    return Grouped(names + [ids[i] for i in single], members, spread @ kept @ gather, value, left_out)


def members_of(graph: Graph, supernodes: Sequence[Supernode]) -> list[list[int]]:
    """The nodes of each group. UserError for ids that the graph does not have, a node in two groups, and nodes of
    several kinds in one, which have no value in common."""
    number = {node_id: i for i, node_id in enumerate(node_ids(graph))}
    seen: dict[str, str] = {}
    found = []
    for label, nodes in supernodes:
        for node in nodes:
            if node not in number:
                raise UserError(f"supernode {label!r}: the graph has no node {node}; take it out, or remove the file")
            if node in seen:
                raise UserError(f"node {node} is in the supernodes {seen[node]!r} and {label!r}; leave it in one")
            seen[node] = label
        group = [number[node] for node in nodes]
        kinds = sorted({graph.kind[i] for i in group})
        if len(kinds) > 1:
            raise UserError(f"supernode {label!r} groups nodes of several kinds ({', '.join(kinds)}); make one of each")
        found.append(group)
    return found


def file_of(directory: Path, slug: str) -> Path:
    return directory / f"{slug}.supernodes.json"


def kept_or_made(file: Path, graph: Graph, make: Callable[[], list[Supernode]]) -> list[Supernode]:
    """The groups of a file that someone edited, checked; else those that `make` gives, written to it."""
    if file.exists():
        supernodes, edited = load(file)
        if edited:
            members_of(graph, supernodes)
            return supernodes
    supernodes = make()
    save(file, supernodes)
    return supernodes


def save(file: Path, supernodes: Sequence[Supernode]) -> None:
    """Write groups as a file that can be edited, at once."""
    groups = [{"label": supernode.label, "nodes": list(supernode.nodes)} for supernode in supernodes]
    found = {"supernodes": groups, "unedited": _digest(groups)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def load(file: Path) -> tuple[list[Supernode], bool]:
    """The groups of a file, and whether it was edited since it was written. UserError for what is no such file."""
    form = '{"supernodes": [{"label": "...", "nodes": ["..."]}]}'
    try:
        found = json.loads(file.read_text())
        groups = found["supernodes"]
        supernodes = [Supernode(group["label"], tuple(group["nodes"])) for group in groups]
        text = [part for label, nodes in supernodes for part in (label, *nodes)]
        if not all(isinstance(part, str) and part for part in text) or not all(nodes for _, nodes in supernodes):
            raise TypeError("labels and nodes are texts, and no group is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not read as {form} ({error}); mend it or remove it") from error
    labels = [supernode.label for supernode in supernodes]
    if twice := [label for label, n in Counter(labels).items() if n > 1]:
        raise UserError(f"{file}: two supernodes are called {twice[0]!r}; rename one")
    return supernodes, found.get("unedited") != _digest(groups)


def _parts(graph: Graph, group: list[int]) -> Tensor:
    """What part of its group each member is, by activation or probability; equal ones where that is 0. [k]"""
    size = (graph.probability if graph.kind[group[0]] == Kind.logit else graph.activation)[group].double()
    return size / size.sum() if size.sum() > 0 else torch.full_like(size, 1 / len(group))


def _is_last(graph: Graph, group: Sequence[int]) -> bool:
    """Whether a group is at the last position, with members in the upper half of the layers."""
    at = torch.tensor(list(group))
    return bool((graph.position[at] == len(graph.texts) - 1).all()) and 2 * int(graph.layer[at].max()) >= graph.n_layers


def _cosines(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return unit @ unit.T


def _distinct(supernodes: list[Supernode], taken: set[str]) -> list[Supernode]:
    found: list[Supernode] = []
    for label, nodes in supernodes:
        name, count = label, 1
        while name in taken:
            count += 1
            name = f"{label} ({count})"
        taken = taken | {name}
        found.append(Supernode(name, nodes))
    return found


def _digest(groups: object) -> str:
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]
