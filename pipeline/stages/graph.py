"""`clt graph`: what made a prompt's next token, as a graph: its numbers, its JSON and a page.

clt graph prompt='The capital of France is'
clt graph run=demo prompt='The capital of France is' graph.difference=[Paris,Berlin]
clt graph run=demo prompts=prompts.txt

runs/NAME/graphs/
    SLUG.safetensors        the whole graph (`interp/circuits/graph.py`)
    SLUG.json               what pruning keeps of it, for circuit-tracer's front end and Neuronpedia
    SLUG.supernodes.json    groups of features, which may be edited
    SLUG.html               a page
    SLUG.check.json         with --validate: predicted effects against measured ones (`interp/circuits/graph_check.py`)
    SLUG.heads.json         with graph.heads: through which attention heads edges go
    graph-metadata.json     the list of the JSON files
"""

import logging
import re
import resource
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import write_aside, write_report
from pipeline.interp import opening
from pipeline.interp.circuits import (
    attribution,
    graph,
    graph_check,
    graph_json,
    graph_scores,
    graph_targets,
    heads,
    supernodes,
    top_paths,
)
from pipeline.interp.circuits.graph import Graph, Kind
from pipeline.interp.circuits.graph_json import Supernode
from pipeline.interp.circuits.graph_plan import Clock
from pipeline.interp.circuits.graph_scores import Pruned
from pipeline.interp.dashboards import feature_files, feature_labels
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.replacement import ReplacementModel
from pipeline.stages import graph_examples
from pipeline.stages.generate import remarks
from pipeline.stages.graph_examples import Place
from pipeline.stages.graph_options import GraphConfig, GraphFileOptions
from pipeline.train import finished
from pipeline.train import run as runs
from pipeline.train.artifact import Trained
from pipeline.web import graph_page

logger = logging.getLogger(__name__)

FOLDER = "graphs"
MOST_LETTERS = 60
"""Of a slug."""


class Shown(NamedTuple):
    """A graph and what was made of it."""

    graph: Graph
    pruned: Pruned
    groups: list[Supernode]
    records: dict[Place, Record]
    """What is known of kept features."""

    @property
    def labels(self) -> dict[Place, str]:
        return {place: str(record["label"]) for place, record in self.records.items() if record.get("label")}


def run(cfg: GraphConfig) -> Path:
    """Trace a prompt, or each of a file, and write its files. -> the page, or the folder of the pages"""
    clock = Clock()
    check(cfg)
    prompts = named(cfg)
    directory = runs.chosen(cfg.run)
    trained = finished.read(directory, cfg.transcoder, cfg.device)
    attribution.check_linear(trained.transcoder)
    opening.check_replaces(trained)
    model = opening.opened(trained, opening.base_model(trained, cfg.device))
    tokens = {name: model.tokens(prompt) for name, prompt in prompts.items()}
    clock("load")
    for name, prompt in prompts.items():
        for remark in remarks(model, tokens[name][0].tolist(), trained.config["dataset"]["context"]):
            logger.warning(remark)
        page = explain(cfg, trained, model, name, prompt, tokens[name], clock)
        clock = Clock()
    if cfg.prompts is None:
        return page
    folder = directory / FOLDER
    logger.info("%d graphs in %s", len(prompts), folder)
    logger.info("next: clt circuits graphs=%s", shlex.quote(str(folder)))
    return folder


def named(cfg: GraphConfig) -> dict[str, str]:
    """The prompts by the names of their files. Raises UserError where there is none."""
    if cfg.prompts is None:
        if cfg.prompt is None:
            raise UserError("there is no prompt; add prompt='some text'")
        return {cfg.graph.slug or slug(cfg.prompt): cfg.prompt}
    if cfg.prompt is not None or cfg.graph.slug is not None:
        raise UserError("prompts= holds the prompts, which name their files; leave prompt= and graph.slug= out")
    try:
        lines = Path(cfg.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={cfg.prompts} cannot be read ({error}); name a text file, a prompt a line") from error
    found: dict[str, str] = {}
    for prompt in dict.fromkeys(line for line in lines if line.strip()):
        name, n = slug(prompt), 1
        while (numbered := name if n == 1 else f"{name}-{n}") in found:
            n += 1
        found[numbered] = prompt
    if not found:
        raise UserError(f"prompts={cfg.prompts} holds no prompt; write one on each line")
    return found


def explain(
    cfg: GraphConfig, trained: Trained, model: ReplacementModel, name: str, prompt: str, tokens: Tensor, clock: Clock
) -> Path:
    """One prompt's graph. tokens int64 [1, T]. -> the page"""
    directory = trained.path
    folder = directory / FOLDER
    traced = attribution.trace(model, tokens, cfg.graph)
    traced.meta |= {"run": str(directory)}
    clock("trace")
    shown = prepared(traced, model, trained, folder / name, cfg)
    page = write(shown, directory, folder, name, cfg.graph)
    clock("files")
    seconds = {"load": clock.seconds.get("load", 0.0), **traced.meta["seconds"], "files": clock.seconds["files"]}
    for line in lines(shown):
        logger.info(line)
    if cfg.graph.heads:
        edges = heads.report(model, traced, heads.moving(traced, shown.pruned, cfg.graph.heads))
        clock("heads")
        seconds["heads"] = clock.seconds["heads"]
        write_report(folder / f"{name}.heads.json", edges)
        for line in crossings(edges):
            logger.info(line)
    if cfg.validate:
        found = graph_check.check(model, traced)
        clock("validate")
        seconds["validate"] = clock.seconds["validate"]
        write_report(folder / f"{name}.check.json", found)
        for line in graph_check.table(found, traced.texts, traced.labels):
            logger.info(line)
    for line in [*costs(seconds), *files(folder, name, shown, cfg, prompt)]:
        logger.info(line)
    return page


def check(cfg: GraphConfig) -> None:
    """Raises UserError for settings that mean nothing, before anything is loaded."""
    graph_targets.check(cfg.graph)
    for key in ("nodes", "edges"):
        if not 0 < (value := getattr(cfg.graph, key)) <= 1:
            raise UserError(f"graph.{key}={value} is no share; give one above 0 and at most 1")
    if cfg.graph.heads < 0:
        raise UserError(f"graph.heads={cfg.graph.heads} is no number of edges; give 0 or more")
    if cfg.graph.slug is not None and not re.fullmatch(r"[\w][\w.-]*", cfg.graph.slug):
        raise UserError(f"graph.slug={cfg.graph.slug} is no name of a file; use letters, digits, - and _")


def slug(prompt: str) -> str:
    """The-capital-of-France-is"""
    return re.sub(r"[^\w]+", "-", prompt).strip("-")[:MOST_LETTERS].strip("-") or "prompt"


def prepared(traced: Graph, model: ReplacementModel, trained: Trained, file: Path, cfg: GraphConfig) -> Shown:
    """Pruned, with labels and groups: those of a file that was edited, where there is one."""
    pruned = graph_scores.prune(traced, cfg.graph.nodes, cfg.graph.edges)
    traced.meta["scores"] = graph_scores.report(traced)
    kept = pruned.nodes[traced.of(Kind.feature)].nonzero().flatten().tolist()
    places = {(int(traced.layer[i]), int(traced.index[i])) for i in kept}
    known = graph_examples.records(cfg, trained, model, places)

    def top_tokens(layer: int, index: int) -> list[str]:
        return feature_labels.top_tokens_of(known.get((layer, index)))

    def make() -> list[Supernode]:
        lm = model.lm
        promoted = supernodes.promoted_by(
            traced, model.transcoder, lambda row: lm.read_out(row[None])[0], lambda token: lm.tokenizer.decode([token])
        )
        groups = supernodes.find(traced, pruned, model.transcoder)
        return supernodes.labelled(traced, groups, top_tokens, promoted)

    groups = supernodes.kept_or_made(supernodes.file_of(file.parent, file.name), traced, make)
    return Shown(traced, pruned, groups, known)


def write(shown: Shown, run: Path, folder: Path, name: str, options: GraphFileOptions) -> Path:
    """-> the page"""
    graph.save(shown.graph, folder / f"{name}.safetensors")
    drawn, pruned = shown.graph, shown.pruned
    if options.circuit_tracer_only:
        drawn = graph_scores.reference(drawn)
        pruned = graph_scores.prune(drawn, options.nodes, options.edges)
    graph_json.write(folder, graph_json.document(drawn, pruned, name, options.scan, shown.labels, shown.groups))

    def read(layer: int, index: int) -> Record | None:
        return shown.records.get((layer, index)) or feature_files.read(run / "features", layer, index)

    text = graph_page.page(shown.graph, shown.pruned, shown.groups, read, shown.labels, name)
    page = folder / f"{name}.html"
    write_aside(page, text.encode())
    return page


def lines(shown: Shown) -> Iterator[str]:
    """What was found."""
    traced, pruned = shown.graph, shown.pruned
    yield f"prompt    {traced.meta['prompt']} ({len(traced.texts)} tokens)"
    outputs = zip(traced.labels, traced.probability[traced.of(Kind.logit)].tolist(), strict=True)
    single = traced.meta["settings"]["difference"] or traced.meta["settings"]["feature"]
    yield "explains  " + ", ".join(label if single else f"{label} {p:.1%}" for label, p in outputs)
    n_kept = int(pruned.nodes[traced.of(Kind.feature)].sum())
    yield (
        f"graph     {traced.n_nodes:,} nodes of {traced.n_active:,} active features; kept: {int(pruned.nodes.sum()):,} "
        f"nodes ({n_kept:,} features), {int(pruned.edges.sum()):,} edges, {len(shown.groups)} groups"
    )
    for title, found in (("scores", "all_nodes"), ("", "circuit_tracer")):
        scores = traced.meta["scores"][found]
        told = ", ".join(f"{key.replace('_', ' ')} {_share(value)}" for key, value in scores.items())
        yield f"{title:10}{told} ({'all nodes' if title else 'the nodes of circuit-tracer'})"
    for i, path in enumerate(top_paths.strongest(traced)):
        yield f"{'' if i else 'paths':10}{' -> '.join(node(shown, n) for n in path.nodes)}  ({path.strength:.2%})"


def crossings(edges: list[dict[str, Any]]) -> Iterator[str]:
    """Through which heads edges go."""
    for i, edge in enumerate(edges):
        parts = ", ".join(f"{part['path']} {part['part']:.3g}" for part in edge["parts"])
        yield f"{'' if i else 'heads':10}{edge['source']} -> {edge['target']}  {edge['weight']:.3g}: {parts}"


def costs(seconds: dict[str, float]) -> Iterator[str]:
    import torch

    # Kilobytes on Linux, bytes on a Mac.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peak += f" and {on_device / 1e9:.2f} GB on the GPU" if on_device else ""
    parts = ", ".join(f"{part} {value:.2f}" for part, value in seconds.items())
    yield f"seconds   {parts}; peak memory {peak}"


def files(folder: Path, name: str, shown: Shown, cfg: GraphConfig, prompt: str) -> Iterator[str]:
    """Where everything is, and what comes next."""
    ends = {"safetensors": "the whole graph", "json": "pruned", "supernodes.json": "groups, to edit"}
    ends |= {"heads.json": "edges by attention head"} if cfg.graph.heads else {}
    ends |= {"check.json": "predicted and measured"} if cfg.validate else {}
    for end, what in ends.items():
        yield f"{folder / name}.{end}  {what}"
    yield f"{folder / name}.html  open it in a browser"
    features = [path.nodes[-2] for path in top_paths.strongest(shown.graph, 1)]
    if features:
        edit = f"{_place(shown.graph, features[0])}=0"
        run = shlex.quote(str(folder.parent))
        yield f"next: clt intervene run={run} prompt={shlex.quote(prompt)} edits={edit}"


def node(shown: Shown, i: int) -> str:
    """A node of a path in words."""
    traced = shown.graph
    if traced.kind[i] == Kind.logit:
        return traced.labels[i - traced.of(Kind.logit).start]
    at = traced.texts[int(traced.position[i])].strip()
    if traced.kind[i] == Kind.token:
        return f'"{at}"'
    label = shown.labels.get((int(traced.layer[i]), int(traced.index[i])))
    return f'{_place(traced, i)} "{at}"' + (f" [{label}]" if label else "")


def _place(traced: Graph, i: int) -> str:
    """LAYER/INDEX@POSITION"""
    return f"{int(traced.layer[i])}/{int(traced.index[i])}@{int(traced.position[i])}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
