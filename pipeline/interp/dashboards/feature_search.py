"""Features found by the text of their contexts, and those that are active on a prompt.

A search goes through the examples in contexts.parquet. The text is looked for, without regard to case, in each
example's tokens put together; the activation on the tokens that it lies on counts for it:

    score = activation on matching tokens / activation on all tokens of the examples
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.errors import UserError
from pipeline.interp.dashboards.feature_files import Record
from pipeline.interp.edits import Sides, chosen, features_of

AROUND = 6
"""Tokens of an example that are shown before a match, and from it on."""


class Match(NamedTuple):
    """A feature whose contexts have the text."""

    layer: int
    feature: int
    label: str
    score: float
    n_contexts: int
    """Examples that have it, whether the feature is active there or not."""
    act_max: float
    example: str
    """Of the example with the highest activation on the text."""


def search(directory: Path, text: str) -> list[Match]:
    """The best first: by score, then by the number of contexts. Raises UserError for an empty text, and where no
    features were described."""
    if not text:
        raise UserError("search= has no text; write search=France")
    tables = [directory / name for name in ("contexts.parquet", "features.parquet")]
    if not all(table.exists() for table in tables):
        raise UserError(f"{directory} holds no described features; run clt features run={directory.parent} first")
    sums = _sums(tables[0], text.lower())
    found = []
    from pyarrow import parquet  # type: ignore[import-untyped]

    columns = ["layer", "feature", "label", "act_max"]
    for row in parquet.read_table(tables[1], columns=columns).to_pylist():
        one = sums.get((row["layer"], row["feature"]))
        if one is not None and one["contexts"]:
            score = one["matching"] / one["all"] if one["all"] else 0.0
            here = (row["layer"], row["feature"], row["label"])
            found.append(Match(*here, score, one["contexts"], row["act_max"], one["text"]))
    return sorted(found, key=lambda match: (-match.score, -match.n_contexts, match.layer, match.feature))


def _sums(table: Path, text: str) -> dict[tuple[int, int], dict[str, Any]]:
    """By (layer, feature): activation in all, on the text, examples that have it, the best one."""
    from pyarrow import parquet

    sums: dict[tuple[int, int], dict[str, Any]] = {}
    with parquet.ParquetFile(table) as file:
        for batch in file.iter_batches(columns=["layer", "feature", "repeated", "tokens", "activations"]):
            for row in batch.to_pylist():
                if not row["repeated"]:
                    start = {"all": 0.0, "matching": 0.0, "contexts": 0, "best": -1.0, "text": ""}
                    _count(sums.setdefault((row["layer"], row["feature"]), start), row, text)
    return sums


def _count(sums: dict[str, Any], row: Record, text: str) -> None:
    sums["all"] += sum(row["activations"])
    hit = covered(row["tokens"], text)
    if not hit:
        return
    matching = sum(row["activations"][i] for i in hit)
    sums["contexts"] += 1
    sums["matching"] += matching
    if matching > sums["best"]:
        shown = row["tokens"][max(0, min(hit) - AROUND) : min(hit) + AROUND]
        sums |= {"best": matching, "text": "".join(shown).strip()}


def covered(tokens: list[str], text: str) -> set[int]:
    """The tokens that an occurrence of the text, which is lower case, lies on, in their texts put together."""
    lower = [token.lower() for token in tokens]
    whole = "".join(lower)
    at = whole.find(text)
    if at < 0:
        return set()
    owner = [i for i, token in enumerate(lower) for _ in token]
    hit: set[int] = set()
    while at >= 0:
        hit |= set(owner[at : at + len(text)])
        at = whole.find(text, at + 1)
    # A space that begins a token is no part of a word that ends in front of it.
    return {i for i in hit if lower[i].strip() or not text.strip()}


class ActiveOnToken(NamedTuple):
    layer: int
    feature: int
    activation: float


@torch.inference_mode()
def on_tokens(sides: Sides, tokens: torch.Tensor, k: int) -> list[list[ActiveOnToken]]:
    """The k most active features at each token of int64 [1, T], on the original model's activations; none at position
    0, where no feature is read."""
    features = features_of(sides.transcoder, sides.state(tokens).x[0])
    found: list[list[ActiveOnToken]] = [[] for _ in range(tokens.shape[1])]
    for source in range(sides.transcoder.n_sources):
        pattern, values = chosen(features, source)
        entries = (pattern.tokens.tolist(), pattern.indices.tolist(), values.tolist())
        for token, feature, value in zip(*entries, strict=True):
            if token > 0:
                found[token].append(ActiveOnToken(source, feature, value))
    return [sorted(one, key=lambda entry: (-entry.activation, entry.layer, entry.feature))[:k] for one in found]
