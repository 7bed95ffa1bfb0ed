"""`clt intervene`: features edited on a prompt, and what that changes.

clt intervene run=demo prompt='The capital of France is' edits='0/342@4=0,1/17@last*2'
clt intervene prompt='The capital of France is' swap.features=all swap.at=4 swap.from_prompt='The capital of Japan is'
"""

import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from pipeline.files import write_report
from pipeline.interp import generation, naming, opening
from pipeline.interp.generation import Side
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering import feature_edits, intervene_report, swaps
from pipeline.interp.steering import intervene as passes
from pipeline.interp.steering.feature_edits import Edit
from pipeline.interp.steering.intervene import Intervened
from pipeline.interp.steering.intervene_options import Model, Response
from pipeline.interp.steering.intervene_report import Change
from pipeline.plain import to_plain
from pipeline.stages.generate import remarks, text
from pipeline.stages.intervene_options import InterveneConfig
from pipeline.train import finished
from pipeline.train import run as runs

logger = logging.getLogger(__name__)

WIDTH = 20
"""Characters of a token in the tables; longer ones are cut."""


def run(cfg: InterveneConfig) -> Path | None:
    """Edit features on a prompt and show what changes. -> the JSON file, where one was asked for"""
    check(cfg)
    directory = runs.chosen(cfg.run)
    trained = finished.read(directory, cfg.transcoder, cfg.device)
    opening.check_replaces(trained)
    passes.check(cfg.intervene, trained.transcoder.dims.n_layers)
    model = opening.opened(trained, opening.base_model(trained, cfg.device))
    tokens = model.tokens(cfg.prompt or "")
    edits = edits_of(model, tokens, cfg)
    chosen = [naming.token(model.lm, text, "tokens") for text in (cfg.tokens or "").split(",") if cfg.tokens]
    for remark in remarks(model, tokens[0].tolist(), trained.config["dataset"]["context"]):
        logger.warning(remark)
    found = passes.intervene(model, tokens, [edits], cfg.intervene)
    sides = generation.under(model, tokens, edits, cfg.intervene) if cfg.intervene.n_tokens else None
    for line in shown(found, model, cfg, chosen, sides):
        logger.info(line)
    if cfg.to is not None:
        write_report(Path(cfg.to), report(found, model, cfg, directory, chosen, sides))
        logger.info("%s", cfg.to)
    logger.info("next: clt graph run=%s prompt=%s", directory, shlex.quote(cfg.prompt or ""))
    return None if cfg.to is None else Path(cfg.to)


def check(cfg: InterveneConfig) -> None:
    """Raises UserError for settings that say too little, before anything is loaded."""
    if cfg.prompt is None:
        raise UserError("there is no prompt; add prompt='some text'")
    if cfg.swap.features is None and (cfg.swap.from_prompt is not None or cfg.swap.from_at is not None):
        raise UserError(
            "swap.from_prompt and swap.from_at say where features come from; add swap.features=all, or some"
        )
    if cfg.edits is None and cfg.swap.features is None:
        raise UserError("nothing is edited; add edits='1/342@4=0', or swap.features=all swap.from_prompt='other text'")


def edits_of(model: ReplacementModel, tokens: Tensor, cfg: InterveneConfig) -> list[Edit]:
    """What `edits`, `supernodes` and `swap` ask for, the swap first."""
    n_layers, d_features = model.lm.n_layers, model.transcoder.d_features
    supernodes = feature_edits.read_supernodes(Path(cfg.supernodes), n_layers) if cfg.supernodes else None
    edits = swaps.swap(model, tokens, cfg.swap, cfg.intervene, supernodes) if cfg.swap.features else []
    for piece in feature_edits.read(cfg.edits) if cfg.edits is not None else ():
        edits += feature_edits.parse(piece, tokens.shape[1], n_layers, d_features, supernodes)
    if not edits:
        raise UserError("no feature is edited: the list is empty, or none is active where the swap is made; name some")
    return edits


def shown(
    found: Intervened, model: ReplacementModel, cfg: InterveneConfig, chosen: list[int], sides: tuple[Side, Side] | None
) -> Iterator[str]:
    """The edits, the next token, each position, and the features that follow."""
    tokens, top = found.tokens[0].tolist(), cfg.intervene.top
    texts = [_quoted(model, token) for token in tokens]
    yield "prompt       " + " ".join(f"{i}:{text}" for i, text in enumerate(texts))
    made = intervene_report.made(found, 0)
    yield f"edited       {len(made)} activations: {_how(cfg)}"
    yield from _rows(sorted(made, key=lambda one: -abs(one.after - one.before)), texts, top)
    yield ""
    yield f"{'next token':{WIDTH}}  before   after     logit"
    for one in intervene_report.tokens(found, 0, top, chosen):
        (a, b), (p, q) = one["logit"], one["probability"]
        yield f"{_quoted(model, one['token']):{WIDTH}}{p:8.4f}{q:8.4f}{b - a:+10.3f}"
    divergence = intervene_report.kl(found)[0].tolist()
    yield f"KL(before || after) in nats: {divergence[-1]:.4f} at the last position"
    yield "  at each: " + " ".join(f"{i}:{value:.3f}" for i, value in enumerate(divergence) if value >= 5e-4)
    yield ""
    changes = intervene_report.features(found, 0)
    counts = {kind: sum(change.kind == kind for change in changes) for kind in ("appears", "vanishes", "changes")}
    held = "" if cfg.intervene.layers == Response.open else " (as the stream is read; held features stay)"
    yield "other features{}: {appears} appear, {vanishes} vanish, {changes} change".format(held, **counts)
    yield from _rows(changes, texts, top)
    for name, side in zip(("before", "after"), sides or (), strict=False):
        mean = sum(side.kl) / len(side.kl)
        yield f"{name:12} {text(model.lm.tokenizer, tokens, side.tokens)}   (KL {mean:.4f} a token, {side.ended})"


def report(
    found: Intervened,
    model: ReplacementModel,
    cfg: InterveneConfig,
    directory: Path,
    chosen: list[int],
    sides: tuple[Side, Side] | None,
) -> dict[str, Any]:
    """The same for programs, with every feature that changes."""
    tokenizer, tokens = model.lm.tokenizer, found.tokens[0].tolist()
    return {
        "run": str(directory),
        "prompt": {"text": cfg.prompt, "tokens": tokens, "token_texts": [tokenizer.decode([one]) for one in tokens]},
        "intervene": to_plain(cfg.intervene),
        "edits": cfg.edits,
        "swap": to_plain(cfg.swap),
        "edited": [change._asdict() for change in intervene_report.made(found, 0)],
        "next_token": [
            {"text": tokenizer.decode([one["token"]]), **one}
            for one in intervene_report.tokens(found, 0, cfg.intervene.top, chosen)
        ],
        "kl": intervene_report.kl(found)[0].tolist(),
        "features": [{**change._asdict(), "kind": change.kind} for change in intervene_report.features(found, 0)],
        "generated": sides
        and {
            name: {"text": text(tokenizer, tokens, side.tokens), **side._asdict()}
            for name, side in zip(("before", "after"), sides, strict=True)
        },
    }


def _rows(changes: list[Change], texts: list[str], top: int) -> Iterator[str]:
    for layer, feature, position, before, after in changes[:top]:
        name = f"{layer}/{feature}@{position}"
        yield f"  {name:16}{texts[position][:WIDTH]:{WIDTH}} {before:8.3f} -> {after:.3f}"
    if len(changes) > top:
        yield f"  and {len(changes) - top} more"


def _how(cfg: InterveneConfig) -> str:
    """on the original model, later features respond"""
    options = cfg.intervene
    errors = (
        "" if options.model == Model.original else ", its errors kept" if options.keep_error else ", without errors"
    )
    response = {
        Response.open: "later layers respond",
        Response.constrained: "other features hold their values",
        Response.gates: "active features follow behind open gates",
    }[options.layers]
    until = "" if options.until is None else f" up to layer {options.until}"
    held = [name for name in ("attention", "norms") if getattr(options, name) == "frozen"]
    frozen = f"; {' and '.join(held)} frozen" if held else ""
    return f"on the {options.model}{errors}; {response}{until}{frozen}"


def _quoted(model: ReplacementModel, token: int) -> str:
    shown = repr(model.lm.tokenizer.decode([token]))[1:-1]
    return shown if len(shown) <= WIDTH else shown[: WIDTH - 3] + "..."
