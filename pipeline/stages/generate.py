"""`clt generate`: a prompt continued by the language model and by its replacement, side by side.

clt generate prompt='The capital of France is'
clt generate run=runs/demo prompt='Once' generate.temperature=1 generate.seed=3 --json out.json
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files import write_report
from pipeline.interp import generation, opening, replacement
from pipeline.interp.generation import Generated, Side
from pipeline.interp.replacement import NOTES, ReplacementModel
from pipeline.plain import to_plain
from pipeline.stages.options import GenerateConfig
from pipeline.train import finished
from pipeline.train import run as runs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WIDTH = 24
"""Characters of a token in the table; longer ones are cut."""

ENDED = {
    "end of text": "ended the text",
    "n_tokens": "stopped at generate.n_tokens={n}",
    "context": "stopped at the last of the model's {context} positions",
}


def run(cfg: GenerateConfig) -> Path | None:
    """Continue a prompt both ways and show it. -> the JSON file, where one was asked for"""
    if cfg.prompt is None:
        raise UserError("there is no prompt; add prompt='some text'")
    generation.check(cfg.generate)
    directory = runs.chosen(cfg.run)
    trained = finished.read(directory, cfg.transcoder, cfg.device)
    opening.check_replaces(trained)
    model = opening.opened(trained, opening.base_model(trained, cfg.device))
    tokens = model.tokens(cfg.prompt)
    for remark in remarks(model, tokens[0].tolist(), trained.config["dataset"]["context"]):
        logger.warning(remark)
    found = generation.generate(model, tokens, cfg.generate)
    for line in shown(found, model, cfg):
        logger.info(line)
    if cfg.to is None:
        return None
    file = Path(cfg.to)
    write_report(file, report(found, model, cfg, directory))
    logger.info("%s", file)
    return file


def remarks(model: ReplacementModel, tokens: list[int], context: int) -> Iterator[str]:
    """What a reader has to know before believing what follows."""
    basis = replacement.basis(model.transcoder)
    if basis in NOTES:
        yield f"replacement is {basis}: {NOTES[basis]}"
    if unknown := sum(token == model.lm.tokenizer.unk_token_id for token in tokens):
        yield f"{unknown} of the prompt's {len(tokens)} tokens are unknown words to the model's tokenizer"
    if len(tokens) > context:
        yield f"the transcoder was trained on contexts of {context} tokens, the prompt has {len(tokens)}"


def shown(found: Generated, model: ReplacementModel, cfg: GenerateConfig) -> Iterator[str]:
    """Both texts, one under the other, then token by token side by side."""
    tokenizer, sides = model.lm.tokenizer, {"original": found.original, "replacement": found.replacement}
    yield f"prompt       {text(tokenizer, [], found.prompt)}"
    for name, side in sides.items():
        yield f"{name:12} {text(tokenizer, found.prompt, side.tokens)}"
    yield ""
    yield f"     {'original':{WIDTH}}      KL  {'replacement':{WIDTH}}      KL"
    for i in range(max(len(side.tokens) for side in sides.values())):
        cells = "  ".join(_cell(tokenizer, side, i) for side in sides.values())
        yield f"{i + 1:4}{'*' if i == found.n_same else ' '}{cells}".rstrip()
    mean = {name: sum(side.kl) / len(side.kl) for name, side in sides.items()}
    yield (
        "KL(original || replacement) in nats, mean: "
        f"{mean['original']:.4f} along the original, {mean['replacement']:.4f} along the replacement"
    )
    whole = all(len(side.tokens) == found.n_same for side in sides.values())
    yield "the same tokens" if whole else f"they part at token {found.n_same + 1}"
    for name, side in sides.items():
        yield f"the {name} {ENDED[side.ended].format(n=cfg.generate.n_tokens, context=model.lm.n_context)}"


def report(found: Generated, model: ReplacementModel, cfg: GenerateConfig, directory: Path) -> dict[str, Any]:
    """The same for programs."""
    tokenizer = model.lm.tokenizer
    return {
        "run": str(directory),
        "basis": str(replacement.basis(model.transcoder)),
        "generate": to_plain(cfg.generate),
        "prompt": {"text": cfg.prompt, "tokens": found.prompt, "token_texts": _each(tokenizer, found.prompt)},
        "n_same": found.n_same,
        **{
            name: {
                "text": text(tokenizer, found.prompt, side.tokens),
                "tokens": side.tokens,
                "token_texts": _each(tokenizer, side.tokens),
                "kl": side.kl,
                "ended": side.ended,
            }
            for name, side in (("original", found.original), ("replacement", found.replacement))
        },
    }


def text(tokenizer: "PreTrainedTokenizerBase", before: list[int], tokens: list[int]) -> str:
    """What tokens add to those before them; a tokenizer may drop a space where a text begins."""
    start, whole = tokenizer.decode(before), tokenizer.decode(before + tokens)
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(tokens)


def _each(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in tokens]


def _cell(tokenizer: "PreTrainedTokenizerBase", side: Side, i: int) -> str:
    if i >= len(side.tokens):
        return " " * (WIDTH + 8)
    token = repr(tokenizer.decode([side.tokens[i]]))[1:-1]
    return f"{token[:WIDTH]:{WIDTH}}{side.kl[i]:8.4f}"
