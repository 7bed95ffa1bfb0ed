"""Options of a data set that contradict one another."""

import math
import re
from dataclasses import fields
from typing import Any

from pipeline.data.documents import Source
from pipeline.data.options import Content, DatasetKind, DatasetOptions, FilterOptions, SourceOptions
from pipeline.errors import UserError

FILES = {DatasetKind.text, DatasetKind.jsonl, DatasetKind.parquet}
RECORDS = {DatasetKind.jsonl, DatasetKind.parquet, DatasetKind.hub}

APPLIES_TO = {
    "path": FILES | {DatasetKind.hub},
    "subset": {DatasetKind.hub},
    "split": {DatasetKind.hub},
    "revision": {DatasetKind.hub},
    "content": RECORDS,
    "column": RECORDS,
    "split_by": FILES | {DatasetKind.hub},
    "filter": FILES | {DatasetKind.hub, DatasetKind.world},
}
"""Option of a source -> the kinds that know it."""

NAME = r"[A-Za-z_][\w-]*"


def check(options: DatasetOptions) -> None:
    """Raises UserError, before anything is read."""
    if options.context < 2:
        raise UserError(f"dataset.context={options.context}: a context needs at least 2 tokens")
    if options.held_out is not None and options.held_out < 1:
        raise UserError(f"dataset.held_out={options.held_out}: thresholds and metrics need at least 1 context each")
    _check_source(options, "dataset")
    mixture = options.kind is DatasetKind.mixture
    if not mixture and options.sources:
        raise UserError(f"dataset.sources does not apply to dataset={options.name}; drop it or use dataset=mixture")
    if mixture and not options.sources:
        example = "'dataset.sources.books.kind=text' 'dataset.sources.books.path=FILE' 'dataset.sources.books.weight=2'"
        raise UserError(f"dataset={options.name} needs members; name some, for instance: {example}")
    for name, member in options.sources.items():
        _check_member(name, member)
    kinds = {member.kind for member in options.sources.values()} if mixture else {options.kind}
    if options.n_tokens == "all" and kinds == {DatasetKind.world}:
        raise UserError("dataset.n_tokens=all needs a text that ends; give a count such as dataset.n_tokens=400k")


def _check_member(name: str, member: Any) -> None:
    label = f"dataset.sources.{name}"
    if not re.fullmatch(NAME, name, re.ASCII):
        raise UserError(f"{label}: '{name}' is no name; use letters, digits, _ and -, a letter first")
    if member.kind is DatasetKind.mixture:
        raise UserError(f"{label}.kind=mixture: a mixture has no mixtures; name the members of both here")
    if not (member.weight > 0 and math.isfinite(member.weight)):
        raise UserError(f"{label}.weight={member.weight:g}: a weight is a number above 0; drop members of no weight")
    _check_source(member, label)


def _check_source(source: Source, label: str) -> None:
    kind = source.kind
    chosen = f"dataset={source.name}" if isinstance(source, DatasetOptions) else f"{label}.kind={kind}"
    for field in fields(SourceOptions):
        default = field.default if field.name != "filter" else FilterOptions()
        known = APPLIES_TO[field.name]
        if kind not in known and getattr(source, field.name) != default:
            others = ", ".join(sorted(known - {DatasetKind.world}))
            raise UserError(f"{label}.{field.name} does not apply to {chosen}; drop it or use another kind: {others}")
    if source.path is None and kind in APPLIES_TO["path"]:
        what = {
            DatasetKind.text: "FILE, a folder of *.txt or a glob",
            DatasetKind.jsonl: "FILE, a folder of *.jsonl or *.json, or a glob",
            DatasetKind.parquet: "FILE, a folder of *.parquet or a glob",
            DatasetKind.hub: "NAME, the data set's name on the hub such as roneneldan/TinyStories",
        }[kind]
        raise UserError(f"{chosen} needs {label}.path={what}")
    if source.content is not Content.text and source.split_by is not None:
        raise UserError(f"{label}.split_by splits texts, not content={source.content}; drop it")
    _check_filter(source, label)


def _check_filter(source: Source, label: str) -> None:
    rules = source.filter
    if rules.where and source.kind not in RECORDS:
        raise UserError(f"{label}.filter.where needs records with columns, which kind={source.kind} has not; drop it")
    for name, value in rules.where.items():
        if not re.fullmatch(r"\w[\w-]*", name, re.ASCII) or not isinstance(value, str | int | float | bool | None):
            fix = "name a column by letters, digits, _ and -, its value by a text, number, true, false or null"
            raise UserError(f"{label}.filter.where: {name}: {value} is not understood; {fix}")
    of_text = {"min_characters", "max_characters", "keep", "drop"}
    given = sorted(name for name in of_text if getattr(rules, name) is not None)
    if given and source.content is Content.tokens:
        raise UserError(f"{label}.filter.{given[0]} reads text, and content=tokens has none; drop it")
    for name in ("keep", "drop"):
        try:
            re.compile(getattr(rules, name) or "")
        except re.error as error:
            raise UserError(f"{label}.filter.{name} is no regular expression ({error}); mend it") from error
    fewest, most = rules.min_characters, rules.max_characters
    if fewest is not None and most is not None and fewest > most:
        raise UserError(f"{label}.filter: min_characters={fewest} is above max_characters={most}; no document passes")
