"""A data set as a request names it, and as a command line does.

A request leaves out what stands at its default (but for the options that the first caches listed), so that an option
that is added later makes no old cache a stranger. A default can therefore not be changed without a new cache schema.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from pipeline.data.options import DatasetKind, DatasetOptions, FilterOptions, MemberOptions
from pipeline.plain import to_plain

Json = dict[str, Any]

ALWAYS = ("name", "kind", "n_tokens", "path", "split_by", "context", "held_out", "seed")


def asked(options: DatasetOptions) -> Json:
    """Plain values of the options that say what the text is."""
    plain = to_plain(options)
    return _given(plain, DatasetOptions) | {key: plain[key] for key in ALWAYS}


def words_of(dataset: Json) -> list[str]:
    """Overrides that compose to a data set of `asked`, not quoted for a shell. Options at their default are left out,
    since every conf/dataset/<kind>.yaml is at the default but for the numbers that are always named."""
    words = [f"dataset={dataset['kind']}"]
    given = _given(dataset, DatasetOptions)
    given |= {key: dataset[key] for key in ("n_tokens", "context", "held_out", "seed")}
    if dataset["kind"] == DatasetKind.text and dataset["split_by"] is None:
        given["split_by"] = None
    if given["name"] == dataset["kind"]:
        del given["name"]
    del given["kind"]
    return words + list(_words("dataset", given))


def _words(prefix: str, given: Json) -> Iterator[str]:
    for key, value in given.items():
        if key == "where":
            yield from (f"{prefix}.where.{name}={_literal(child)}" for name, child in value.items())
        elif isinstance(value, dict):
            yield from _words(f"{prefix}.{key}", value)
        else:
            yield f"{prefix}.{key}={'null' if value is None else value}"


def _literal(value: Any) -> str:
    """A value of any type in Hydra's grammar: text in quotes."""
    if isinstance(value, str):
        value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)  # no interpolation
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
        return f"'{escaped}'"
    return json.dumps(value)


def _given(values: Json, kind: type[Any]) -> Json:
    """The values that differ from the defaults of a dataclass, in the dataclass's order; those of nested ones too."""
    found = {}
    for field in fields(kind):
        if field.name not in values:
            continue
        value = values[field.name]
        if field.name == "filter":
            value = _given(value, FilterOptions)
        elif field.name == "sources":
            value = {name: _given(member, MemberOptions) for name, member in value.items()}
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != (default if not hasattr(default, "__dataclass_fields__") else {}):
            found[field.name] = value
    return found
