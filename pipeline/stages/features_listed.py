"""`clt features search=` and `prompt=`: features as lists, from what was described before."""

import logging
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_report
from pipeline.interp import opening
from pipeline.interp.dashboards import feature_files, feature_search
from pipeline.interp.dashboards.feature_text import Words
from pipeline.interp.edits import Sides
from pipeline.interp.original import prompt_tokens
from pipeline.stages.features_options import FeaturesConfig
from pipeline.train import finished

logger = logging.getLogger(__name__)

WIDTH, TEXT = 28, 60
"""Characters of a label and of an example in the lists."""


def found(cfg: FeaturesConfig, text: str, directory: Path) -> Path | None:
    """List the features whose contexts have the text. -> the JSON file that was asked for"""
    matches = feature_search.search(directory, text)
    logger.info("%s features have %r in their contexts, by their share of activation on it", len(matches), text)
    logger.info("%-10s %6s %8s  %-*s %s", "feature", "share", "contexts", WIDTH, "label", "strongest there")
    for match in matches[: cfg.features.shown]:
        name = f"{match.layer}/{match.feature}"
        example = _cut(match.example, TEXT)
        label = f"{_cut(match.label, WIDTH):{WIDTH}}"
        logger.info("%-10s %6.2f %8d  %s %s", name, match.score, match.n_contexts, label, example)
    return _written(cfg, {"search": text, "features": [match._asdict() for match in matches]})


def on_prompt(cfg: FeaturesConfig, prompt: str, directory: Path) -> Path | None:
    """List the features that are active at each token. -> the JSON file that was asked for"""
    trained = finished.read(directory.parent, cfg.transcoder, cfg.device)
    lm = opening.base_model(trained, cfg.device)
    tokens = prompt_tokens(lm, opening.begins_with(trained, lm), prompt)
    if tokens.shape[1] < 2:
        raise UserError("no feature is read at the first token of a context; give a prompt with more")
    active = feature_search.on_tokens(Sides(lm, trained.transcoder.to(lm.device)), tokens, cfg.features.shown)
    if feature_files.about(directory) is None:
        logger.warning("%s holds no described features, so none has a label; run clt features first", directory)
    words, rows = Words(lm.tokenizer), []
    for position, (token, entries) in enumerate(zip(tokens[0].tolist(), active, strict=True)):
        named = [
            entry._asdict() | {"label": feature_files.label(directory, entry.layer, entry.feature)} for entry in entries
        ]
        rows.append({"position": position, "token": words(token), "features": named})
        logger.info("%d %r%s", position, words(token), "" if entries else ": none")
        for entry in named:
            logger.info(
                "    %-10s %9.4g  %s", f"{entry['layer']}/{entry['feature']}", entry["activation"], entry["label"]
            )
    return _written(cfg, {"prompt": prompt, "tokens": rows})


def _written(cfg: FeaturesConfig, report: object) -> Path | None:
    if cfg.to is None:
        return None
    write_report(Path(cfg.to), report)
    logger.info("%s", cfg.to)
    return Path(cfg.to)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
