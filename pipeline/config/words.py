"""What happens to the words of a command line before Hydra reads them (`prepare`), in five steps:

1. Values of text keys (a prompt, a name, a path) are quoted: commas, quotes, `=`, `~`, spaces and `1e3` survive.
2. `experiment=X` becomes `+experiment=X`, since no defaults list names an experiment.
3. `model=X` without `dataset=` takes the model's default dataset.
4. `clt train` that names neither a model nor a dataset trains on the newest complete cache.
5. `clt report` takes words that are no settings for runs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from pipeline.config.table import CONF, STAGES
from pipeline.errors import UserError

TEXT_KEYS = {
    "name", "run", "to", "path", "prompt", "prompts", "edits", "supernodes", "tokens", "swap.features",
    "swap.from_prompt", "search", "feature", "graphs", "features.ids", "graph.feature", "graph.slug", "graph.scan",
    "plot.features", "plot.token", "export.model_name", "export.licence", "read.revision",
    "model.path", "model.revision", "model.offload_dir", "lm.tokenizer", "cache.dir", "cache.path", "cache.local_dir",
    "plan.rates", "plan.links", "train.init_from", "report.baseline", "log.project", "log.entity", "log.group",
    "dataset.name", "dataset.path", "dataset.subset", "dataset.split", "dataset.revision", "dataset.column",
    "dataset.filter.keep", "dataset.filter.drop",
}  # fmt: skip
"""Keys whose values reach the stage as they were typed. The price: they cannot be swept over with commas. A member of a
mixture (dataset.sources.NAME) has the same ones as the data set."""


def prepare(
    stage: str, overrides: Iterable[str], config_dir: Path | None = None, config_name: str | None = None
) -> list[str]:
    """The overrides as Hydra is to see them: the five things in this file's docstring."""
    _check_no_shadowing(config_dir)
    words = [re.sub(r"^experiment=", "+experiment=", word) for word in overrides]
    words = _with_runs(words) if stage == "report" else words
    keys = {field.name for field in fields(STAGES[stage].schema)}
    if {"model", "dataset"} <= keys:
        words += _default_dataset(words, config_dir)
    if "newest_cache" in keys and config_name is None:
        named = named_in(words, "model") | named_in(words, "dataset") | named_in(words, "newest_cache")
        for body in experiment_bodies(words, config_dir):
            named |= body.keys() & {"model", "dataset", "newest_cache"}
        words += [] if named else ["newest_cache=true"]
    return [_in_dictionary(_verbatim(word)) for word in words]


def _with_runs(words: Sequence[str]) -> list[str]:
    """Words that are no settings name runs: they become `runs=[...]`, verbatim."""
    named = [word for word in words if Path(word).is_dir() or not re.match(r"[+~]*[\w.]+=|~", word)]
    quoted = ",".join(QuotedString(_uninterpolated(word), Quote.single).with_quotes() for word in named)
    return [*(word for word in words if word not in named), *([f"runs=[{quoted}]"] if named else [])]


def _uninterpolated(text: str) -> str:
    """OmegaConf takes ${ for an interpolation unless a backslash stands before it, and halves the backslashes there."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _verbatim(word: str) -> str:
    """Quote the value of a text key; and of a group, where Hydra chokes on `arch=null` or `arch=3`."""
    match = re.fullmatch(r"(\+{0,2}([\w.-]+)=)(.*)", word, re.DOTALL)
    unlikely_file = match and re.fullmatch(r"null|true|false|[-+.\d].*", match[3], re.IGNORECASE)
    key = match and re.sub(r"^dataset\.sources\.[\w-]+\.", "dataset.", match[2])
    if match is None or not (key in TEXT_KEYS or (unlikely_file and (CONF / match[2]).is_dir())):
        if not re.match(r"[+~]*\w", word):
            raise UserError(f"{word}: not of the form key=value (such as optim.lr=1e-3)")
        return word
    return str(match[1] + QuotedString(_uninterpolated(match[3]), Quote.single).with_quotes())


def _in_dictionary(word: str) -> str:
    """The members of a mixture and the columns of a filter are no fixed keys, and Hydra refuses new ones without a
    plus, or (members) in any case: `dataset.sources.a.weight=2` becomes `++dataset.sources={a: {weight: 2}}`, which
    it merges."""
    key, equals, value = word.lstrip("+").partition("=")
    if not equals or word.startswith("~"):
        return word
    if key.startswith("dataset.filter.where.") or key in {"dataset.filter.where", "dataset.sources"}:
        return f"++{key}={value}"
    path = key.removeprefix("dataset.sources.").split(".")
    if not key.startswith("dataset.sources.") or not all(path):
        return word
    swept = value.split(",") if re.fullmatch(r"[\w.+-]+(,[\w.+-]+)+", value) else [value]
    before, after = "".join(f"{{{name}: " for name in path), "}" * len(path)
    return "++dataset.sources=" + ",".join(before + choice + after for choice in swept)


def _default_dataset(words: list[str], config_dir: Path | None) -> list[str]:
    """[dataset=X] when a model is chosen, on the command line or by the experiment, and no dataset is."""
    models = choices_of(words, "model")
    datasets = choices_of(words, "dataset")
    for body in experiment_bodies(words, config_dir):
        chosen = body.get("model")
        models += [chosen] if isinstance(chosen, str) and not choices_of(words, "model") else []
        datasets += [body["dataset"]] if isinstance(body.get("dataset"), str) else []
    if datasets or not models:
        return []
    defaults = {model: str(read_yaml(f"model/{model}", config_dir).get("default_dataset", "world")) for model in models}
    if len(set(defaults.values())) > 1:
        listed = ", ".join(f"{model}: {dataset}" for model, dataset in defaults.items())
        raise UserError(f"the models' default datasets differ ({listed}); name one with dataset=")
    return [f"dataset={next(iter(defaults.values()))}"]


def _check_no_shadowing(config_dir: Path | None) -> None:
    """Hydra would read the built-in file and pass over the user's without a word."""
    for path in sorted(config_dir.rglob("*.yaml")) if config_dir else []:
        if (CONF / path.relative_to(config_dir)).is_file():  # type: ignore[arg-type]
            raise UserError(f"{path}: the built-in configuration has a file of this name; rename yours")


def named_in(words: Iterable[str], group: str) -> set[str]:
    """{group} when a word sets the group or something in it, else nothing."""
    keys = [word.lstrip("+~").partition("=")[0] for word in words]
    return {group for key in keys if key == group or key.startswith((f"{group}.", f"{group}@"))}


def choices_of(words: Iterable[str], group: str) -> list[str]:
    """The files chosen of a group; several when it is swept over."""
    values = [value for key, _, value in (word.lstrip("+").partition("=") for word in words) if key == group]
    return [choice.strip() for choice in re.split(r"[\[\],]", values[-1]) if choice.strip()] if values else []


def experiment_bodies(words: Iterable[str], config_dir: Path | None) -> Iterator[dict[str, Any]]:
    """What each chosen experiment file sets, its defaults list unrolled: {"model": "gpt2", "optim": {...}}."""
    for name in choices_of(words, "experiment"):
        body = read_yaml(f"experiment/{name}", config_dir)
        for entry in body.pop("defaults", []):
            for key, value in entry.items() if isinstance(entry, dict) else []:
                body[re.sub(r"^(override |optional )*/?", "", key)] = value  # the choice, whatever else is set in it
        yield body


def read_yaml(file: str, config_dir: Path | None) -> dict[str, Any]:
    """The YAML of that name, or {} when there is none: then Hydra says so, with the choices."""
    for folder in [CONF, config_dir]:
        if folder and (path := folder / f"{file}.yaml").is_file():
            content = OmegaConf.to_container(OmegaConf.load(path))
            return dict(content) if isinstance(content, dict) else {}  # type: ignore[arg-type]
    return {}
