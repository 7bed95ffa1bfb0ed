"""From the words on a command line to a typed configuration, and to the stage that takes it.

The only file that knows Hydra. `launch` composes `conf/<command>.yaml` and the overrides, merges them into the
dataclass of the command (so that a wrong key, type or choice is caught here, once), and calls the `run(config)` of the
command's stage. Hydra itself creates no file and no directory: what a run leaves behind is its stage's business.

Five things happen to the words before Hydra reads them (`prepare`):
1. Values of text keys (a prompt, a name, a path) are quoted: commas, quotes, `=`, `~`, spaces and `1e3` survive.
2. `experiment=X` becomes `+experiment=X`, since no defaults list names an experiment.
3. `model=X` without `dataset=` takes the model's default dataset.
4. `clt train` that names neither a model nor a dataset trains on the newest complete cache.
5. `clt report` takes words that are no settings for runs.
"""

import difflib
import errno
import importlib
import importlib.util
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from pipeline import progress
from pipeline.errors import UserError
from pipeline.stages.circuit_options import CircuitsConfig, WeightsConfig
from pipeline.stages.export_options import ExportConfig, ImportConfig
from pipeline.stages.features_options import FeaturesConfig
from pipeline.stages.graph_options import GraphConfig
from pipeline.stages.intervene_options import InterveneConfig
from pipeline.stages.options import (
    BenchCacheConfig,
    BenchCodecConfig,
    BenchExtractConfig,
    BenchShareConfig,
    BenchTrainConfig,
    CompareConfig,
    ConvertConfig,
    EvalConfig,
    ExtractConfig,
    GenerateConfig,
    PretrainConfig,
    ReportConfig,
    TrainConfig,
)
from pipeline.stages.plot_options import PlotConfig
from pipeline.stages.sweep import Sweep

logger = logging.getLogger(__name__)

Config = (
    PretrainConfig
    | ExtractConfig
    | TrainConfig
    | EvalConfig
    | GenerateConfig
    | GraphConfig
    | InterveneConfig
    | FeaturesConfig
    | WeightsConfig
    | CircuitsConfig
    | PlotConfig
    | ConvertConfig
    | CompareConfig
    | ExportConfig
    | ImportConfig
    | ReportConfig
    | BenchExtractConfig
    | BenchCacheConfig
    | BenchCodecConfig
    | BenchShareConfig
    | BenchTrainConfig
)

WithoutCache = (
    PretrainConfig | GenerateConfig | InterveneConfig | CircuitsConfig | ExportConfig | ReportConfig | BenchCodecConfig
)
"""Those with no cache in their settings."""


@dataclass(frozen=True)
class Stage:
    schema: type[Config]
    module: str
    """Imported when the stage runs; has `run(config) -> Path`."""


STAGES = {
    "pretrain": Stage(PretrainConfig, "pipeline.stages.pretrain"),
    "extract": Stage(ExtractConfig, "pipeline.stages.extract"),
    "train": Stage(TrainConfig, "pipeline.stages.train"),
    "eval": Stage(EvalConfig, "pipeline.stages.evaluate"),
    "generate": Stage(GenerateConfig, "pipeline.stages.generate"),
    "graph": Stage(GraphConfig, "pipeline.stages.graph"),
    "intervene": Stage(InterveneConfig, "pipeline.stages.intervene"),
    "features": Stage(FeaturesConfig, "pipeline.stages.features"),
    "weights": Stage(WeightsConfig, "pipeline.stages.weights"),
    "circuits": Stage(CircuitsConfig, "pipeline.stages.circuits"),
    "plot": Stage(PlotConfig, "pipeline.stages.plot"),
    "convert": Stage(ConvertConfig, "pipeline.stages.convert"),
    "compare": Stage(CompareConfig, "pipeline.stages.compare"),
    "export": Stage(ExportConfig, "pipeline.stages.export"),
    "import": Stage(ImportConfig, "pipeline.stages.import_run"),
    "report": Stage(ReportConfig, "pipeline.stages.report"),
    "bench_extract": Stage(BenchExtractConfig, "pipeline.stages.bench_extract"),
    "bench_cache": Stage(BenchCacheConfig, "pipeline.stages.bench_cache"),
    "bench_codec": Stage(BenchCodecConfig, "pipeline.stages.bench_codec"),
    "bench_share": Stage(BenchShareConfig, "pipeline.stages.bench_share"),
    "bench_train": Stage(BenchTrainConfig, "pipeline.stages.bench_train"),
}

TEXT_KEYS = {
    "name", "run", "to", "path", "prompt", "prompts", "edits", "supernodes", "tokens", "swap.features",
    "swap.from_prompt", "search", "feature", "graphs", "features.ids", "graph.feature", "graph.slug", "graph.scan",
    "plot.features", "plot.token", "export.model_name", "export.licence", "read.revision",
    "model.path", "model.revision", "model.offload_dir", "lm.tokenizer", "cache.dir", "cache.path", "cache.local_dir",
    "train.init_from", "report.baseline", "log.project", "log.entity", "log.group",
    "dataset.name", "dataset.path", "dataset.subset", "dataset.split", "dataset.revision", "dataset.column",
    "dataset.filter.keep", "dataset.filter.drop",
}  # fmt: skip
"""Keys whose values reach the stage as they were typed. The price: they cannot be swept over with commas. A member of a
mixture (dataset.sources.NAME) has the same ones as the data set."""

QUIET = {
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "none",
    "hydra/hydra_logging": "none",
}
"""Settings under which Hydra writes nothing and leaves logging to `log_to_stderr`."""

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the operating system that are about the user's disk and not about our code."""

CONF = Path(__file__).resolve().parent.parent / "conf"
"""Where the built-in YAML lies in a checkout; in a wheel it is the package `pipeline.conf`."""

if spec := importlib.util.find_spec("pipeline.conf"):
    CONF = Path(next(iter(spec.submodule_search_locations or [str(CONF)])))

for _name, _stage in STAGES.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_stage.schema)


@dataclass(frozen=True)
class Request:
    """A command line after its options are parsed; the fields are Hydra's flags of the same names."""

    overrides: tuple[str, ...] = ()
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    config_dir: Path | None = None
    config_name: str | None = None
    info: str | None = None

    def argv(self, stage: str, words: Sequence[str]) -> list[str]:
        """The command line as Hydra wants it."""
        argv = [f"clt {stage.replace('_', ' ')}"]
        argv += ["--multirun"] if self.multirun else []
        argv += ["--resolve"] if self.resolve else []
        argv += ["--cfg", self.cfg] if self.cfg else []
        argv += ["--info", self.info] if self.info else []
        argv += ["--config-dir", str(self.config_dir)] if self.config_dir else []
        argv += ["--config-name", self.config_name] if self.config_name else []
        return argv + list(words)


def launch(stage: str, request: Request) -> int:
    """Run one command line and return its exit code: 0 done, 2 the user's input (one line says what to mend),
    1 our bug in a job of a sweep, 130 interrupted. Our bug outside a sweep is raised."""
    log_to_stderr()
    sweep: Sweep | None = None
    try:
        _check_flags(request)
        words = prepare(stage, request.overrides, request.config_dir, request.config_name)
        sweep = _sweep(stage, request, words) if request.multirun else None
        job = _Job(stage, request, sweep)
        _run_hydra(stage, request, words, job.run, _of_launcher(words, sweep))
        if job.sharing:
            importlib.import_module("pipeline.stages.share_pass").run(job.sharing, job.attempt)
    except KeyboardInterrupt:
        if sweep is None:
            logger.error("interrupted")
        else:
            sweep.interrupted()
        return 130
    except RuntimeError as error:
        if sweep is None or not _is_of_worker(error):
            raise
        logger.error(f"a job's process is gone, killed perhaps for want of memory or time: {one_line(error, stage)}")
        sweep.interrupted()
        return 2
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        logger.error(one_line(error, stage))
        return 2
    if sweep is not None:
        return sweep.end()
    for raised in job.errors:
        refusal = _refusal(raised, stage)
        if refusal is None:
            raise raised
        logger.error(refusal)
    return 2 if job.errors else 0


def attempt(work: Callable[[], object]) -> int:
    """Do what needs no configuration and return the exit code, as `launch` does: 0, 2 (one line says what to mend) or
    130. Our bug is raised."""
    log_to_stderr()
    try:
        work()
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except (UserError, OSError) as error:
        refusal = _refusal(error, "")
        if refusal is None:
            raise
        logger.error(refusal)
        return 2
    return 0


def compose(stage: str, overrides: Sequence[str] = (), config_dir: Path | None = None) -> Config:
    """The configuration that `clt <stage> <overrides>` would run with, for Python callers and tests.

    Raises UserError where the command line would print its one line.
    """
    try:
        words = prepare(stage, overrides, config_dir)
        words += [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose(stage, words, return_hydra_config=True)
            choices = dict(cfg.hydra.runtime.choices)
            with open_dict(cfg):
                del cfg["hydra"]
            config = _typed(stage, cfg, choices, job=None, bases={})
        return _with_own_settings(_with_jobs(config, words), words)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(one_line(error, stage)) from error


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
        named = _named(words, "model") | _named(words, "dataset") | _named(words, "newest_cache")
        for body in _experiments(words, config_dir):
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


def _named(words: Iterable[str], group: str) -> set[str]:
    """{group} when a word sets the group or something in it, else nothing."""
    keys = [word.lstrip("+~").partition("=")[0] for word in words]
    return {group for key in keys if key == group or key.startswith((f"{group}.", f"{group}@"))}


def _choices(words: Iterable[str], group: str) -> list[str]:
    """The files chosen of a group; several when it is swept over."""
    values = [value for key, _, value in (word.lstrip("+").partition("=") for word in words) if key == group]
    return [choice.strip() for choice in re.split(r"[\[\],]", values[-1]) if choice.strip()] if values else []


def _experiments(words: Iterable[str], config_dir: Path | None) -> Iterator[dict[str, Any]]:
    """What each chosen experiment file sets, its defaults list unrolled: {"model": "gpt2", "optim": {...}}."""
    for name in _choices(words, "experiment"):
        body = _read(f"experiment/{name}", config_dir)
        for entry in body.pop("defaults", []):
            for key, value in entry.items() if isinstance(entry, dict) else []:
                body[re.sub(r"^(override |optional )*/?", "", key)] = value  # the choice, whatever else is set in it
        yield body


def _default_dataset(words: list[str], config_dir: Path | None) -> list[str]:
    """[dataset=X] when a model is chosen, on the command line or by the experiment, and no dataset is."""
    models = _choices(words, "model")
    datasets = _choices(words, "dataset")
    for body in _experiments(words, config_dir):
        chosen = body.get("model")
        models += [chosen] if isinstance(chosen, str) and not _choices(words, "model") else []
        datasets += [body["dataset"]] if isinstance(body.get("dataset"), str) else []
    if datasets or not models:
        return []
    defaults = {model: str(_read(f"model/{model}", config_dir).get("default_dataset", "world")) for model in models}
    if len(set(defaults.values())) > 1:
        listed = ", ".join(f"{model}: {dataset}" for model, dataset in defaults.items())
        raise UserError(f"the models' default datasets differ ({listed}); name one with dataset=")
    return [f"dataset={next(iter(defaults.values()))}"]


def _read(file: str, config_dir: Path | None) -> dict[str, Any]:
    """The YAML of that name, or {} when there is none: then Hydra says so, with the choices."""
    for folder in [CONF, config_dir]:
        if folder and (path := folder / f"{file}.yaml").is_file():
            content = OmegaConf.to_container(OmegaConf.load(path))
            return dict(content) if isinstance(content, dict) else {}  # type: ignore[arg-type]
    return {}


def _check_flags(request: Request) -> None:
    if request.config_dir and not request.config_dir.is_dir():
        raise UserError(f"--config-dir {request.config_dir}: no such directory")
    if request.resolve and not request.cfg:
        raise UserError("--resolve goes with --cfg; add --cfg job")
    if sum(map(bool, (request.multirun, request.cfg, request.info))) > 1:
        raise UserError("only one of --multirun, --cfg and --info can be given; leave the others out")


def _check_no_shadowing(config_dir: Path | None) -> None:
    """Hydra would read the built-in file and pass over the user's without a word."""
    for path in sorted(config_dir.rglob("*.yaml")) if config_dir else []:
        if (CONF / path.relative_to(config_dir)).is_file():  # type: ignore[arg-type]
            raise UserError(f"{path}: the built-in configuration has a file of this name; rename yours")


def _run_hydra(
    stage: str, request: Request, words: list[str], task: Callable[[DictConfig], None], more: dict[str, str]
) -> None:
    """more: settings of Hydra's own, which words of the same key replace."""
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    quiet = [f"{key}={value}" for key, value in (QUIET | more).items() if key not in keys]
    with tempfile.TemporaryDirectory(prefix="clt-sweep-") as folder, _swapped_argv_and_environment() as argv:
        if "hydra.sweep.dir" not in keys:
            quiet.append(f"hydra.sweep.dir={QuotedString(folder, Quote.single).with_quotes()}")  # its multirun.yaml
        argv[:] = request.argv(stage, [*quiet, *words])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=stage)(task)()


@contextmanager
def _swapped_argv_and_environment() -> Iterator[list[str]]:
    """hydra.main reads sys.argv, and with HYDRA_FULL_ERROR it raises its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [], "1"
    try:
        yield sys.argv
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _sweep(stage: str, request: Request, words: list[str]) -> Sweep:
    """The jobs of -m. Those of training that write anything are noted in runs/NAME/sweep.yaml."""
    flags = ["--config-dir", str(request.config_dir)] if request.config_dir else []
    flags += ["--config-name", request.config_name] if request.config_name else []
    given = list(request.overrides)
    is_dry = [word.partition("=")[2] for word in given if word.lstrip("+").startswith("dry_run=")][-1:] == ["true"]
    directory = None
    if stage == "train" and not is_dry:
        name = _sweep_name(request, words)
        if Path("runs").resolve() in Path("runs", name).resolve().parents:  # else each job is refused
            directory = Path("runs", name)
        given += [] if _named(given, "name") else [f"name={name}"]
    again = shlex.join(["clt", *stage.split("_"), "-m", *flags, *given])
    now = datetime.now().isoformat(timespec="microseconds")
    return Sweep(again, tuple(words), partial(_refusal, stage=stage), directory, now)


def _sweep_name(request: Request, words: list[str]) -> str:
    """`name`, wherever it is given; else one after the experiment or the architecture, if there is but one, that is
    free."""
    for word in reversed(request.overrides):
        if word.lstrip("+").startswith("name="):
            return word.partition("=")[2]
    bodies = [_read(request.config_name or "train", request.config_dir), *_experiments(words, request.config_dir)]
    for body in reversed(bodies):
        if isinstance(body.get("name"), str):
            return str(body["name"])
    labels = _choices(words, "experiment") or _choices(words, "arch") or ["clt"]
    return _free_name(re.sub(r"[^\w.+-]+", "-", labels[0]) if len(labels) == 1 else "sweep")


def _of_launcher(words: list[str], sweep: Sweep | None) -> dict[str, str]:
    """Settings for a launcher that hands jobs to other machines: its folder is to be where the runs are."""
    launchers = _choices(words, "hydra/launcher")
    if sweep is None or sweep.directory is None or not any(name.startswith("submitit") for name in launchers):
        return {}
    logger.info(f"the jobs write to {sweep.directory}/.submitit/*/*_log.err")
    folder = QuotedString(str(sweep.directory / ".submitit" / "%j"), Quote.single).with_quotes()
    return {"hydra.launcher.submitit_folder": folder}


def _is_of_worker(error: RuntimeError) -> bool:
    """Whether a launcher says that the process of a job has ended before the job."""
    return isinstance(error, BrokenExecutor) or type(error).__module__.startswith("submitit.")


class _Job:
    """What Hydra calls for each job: types the configuration and runs the stage. Errors are noted instead of raised, so
    that the other jobs of a sweep run and Hydra adds no words of its own."""

    def __init__(self, stage: str, request: Request, sweep: Sweep | None) -> None:
        self.stage, self.sweep = stage, sweep
        self.errors: list[Exception] = []
        """Of a command line without -m."""
        self.sharing: dict[int, TrainConfig] = {}
        """Jobs that are to be trained together (train.share_pass), when all are known."""
        self.bases: dict[str, str] = {}
        """Default names that a sweep has taken: experiment -> base of `name`."""
        self.parent = os.getpid()
        self.searchpath = [f"hydra.searchpath=[file://{request.config_dir.resolve()}]"] if request.config_dir else []

    def run(self, cfg: DictConfig) -> None:
        settings = HydraConfig.get()
        number = int(settings.job.num) if self.sweep is not None else None
        is_away = os.getpid() != self.parent  # a launcher may run this in a process of its own
        log_to_stderr(f"[{number}] " if is_away else "")
        progress.bars = progress.bars and not is_away  # several would draw on one terminal
        if self.sweep is not None and number is not None:
            threads = os.environ.get("OMP_NUM_THREADS") if is_away else None
            self.sweep.begin(number, settings.overrides.task, f", CPU threads: {threads}" if threads else "")
        done = self.attempt([number or 0], lambda: self._work(cfg, settings, number, is_away))
        if is_away and not done and self.sweep is not None and self.sweep.directory is None:
            raise self.errors[0]  # only an exception finds its way back to the parent

    def attempt(self, numbers: Sequence[int], work: Callable[[], object]) -> bool:
        """Do the work of these jobs. What it raises fails them alone. -> whether it was done"""
        try:
            work()
        except Exception as error:  # noqa: BLE001  (the sweep goes on, and says what it was)
            self.errors.append(error)
            if self.sweep is not None:
                self.sweep.failed(numbers, error)
            return False
        return True

    def _work(self, cfg: DictConfig, settings: Any, number: int | None, is_away: bool) -> None:
        words = settings.overrides.task
        base = self.sweep.directory.name if self.sweep is not None and self.sweep.directory is not None else None
        config = _typed(self.stage, cfg, dict(settings.runtime.choices), number, self.bases, base)
        config = _with_jobs(config, [*words, *self.searchpath])
        config = _with_own_settings(config, words)
        _number(config, number)
        if type(config) is TrainConfig and config.train.share_pass and number is not None:
            if is_away or settings.runtime.choices.get("hydra/launcher") != "basic":
                raise UserError(
                    "train.share_pass=true trains its jobs in one process, so that no launcher can spread them; leave "
                    "hydra/launcher out"
                )
            self.sharing[number] = config
            return
        importlib.import_module(STAGES[self.stage].module).run(config)


def _refusal(error: Exception, stage: str) -> UserError | None:
    """What the user can mend, in one line; None for a bug of ours."""
    if isinstance(error, UserError):
        return UserError(one_line(error, stage))
    if isinstance(error, OSError) and error.errno in DISK:
        place = error.filename or "the disk"
        return UserError(f"{place}: {os.strerror(error.errno)}; mend that and run the same command again")
    return None


def _typed(
    stage: str,
    cfg: DictConfig,
    choices: dict[str, str | None],
    job: int | None,
    bases: dict[str, str],
    base: str | None = None,
) -> Config:
    """The command's dataclass, with its run's name filled in. base: that of a sweep's runs, where it is decided."""
    # Merged once more, since `+key=value` and a root without the schema in its defaults pass Hydra unchecked.
    try:
        checked = OmegaConf.merge(OmegaConf.structured(STAGES[stage].schema), OmegaConf.to_container(cfg))
        config: Config = OmegaConf.to_object(checked)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(one_line(error, stage)) from error
    if isinstance(config, TrainConfig):
        config.experiment = config.experiment or choices.get("experiment")
        config.name = base if config.name is None else config.name
        if config.name is None:
            label = config.experiment or choices.get("arch") or config.arch.name
            label = re.sub(r"[^\w.+-]+", "-", "compare" if isinstance(config, CompareConfig) else label)
            config.name = bases.setdefault(label, _free_name(label))
        if job is not None:
            config.name = f"{config.name}/{job}"
    elif isinstance(config, WithoutCache):
        pass
    elif config.cache.path is not None:
        raise UserError(f"cache.path names what clt train reads, not clt {stage.replace('_', ' ')}; leave it out")
    return config


def _number(config: Config, job: int | None) -> None:
    """What a job of a sweep writes where `to=` says, beside what the others do: out.json -> out-0.json."""
    to = getattr(config, "to", None)
    if job is None or not to:
        return
    place = Path(to)
    is_file = place.suffix in (".json", ".html")
    config.to = str(place.with_stem(f"{place.stem}-{job}") if is_file else place.with_name(f"{place.name}-{job}"))  # type: ignore[union-attr]


def _with_jobs(config: Config, words: Sequence[str]) -> Config:
    """A comparison with what `clt train +experiment=X` and the same words, as Hydra sees them, would run with."""
    if not isinstance(config, CompareConfig):
        return config
    own = {"compare", "eval", "name", "jobs", "experiment", "newest_cache"}
    shared = [word for word in words if word.lstrip("+~").partition("=")[0].split(".")[0] not in own]
    for name in config.compare.experiments:
        begun = GlobalHydra.instance().is_initialized()  # on a command line, not in Python
        try:
            with nullcontext() if begun else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
                composed = hydra.compose("train", [f"+experiment={name}", *shared])
            job = _typed("train", composed, {"experiment": name}, job=None, bases={})
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"compare.experiments: {one_line(error, 'train')}") from error
        assert isinstance(job, TrainConfig)
        config.jobs[name] = job
    return config


def _with_own_settings(config: Config, words: Sequence[str]) -> Config:
    """A training run that is named and no more, in the place of what the defaults say."""
    if type(config) is not TrainConfig:
        return config
    if not config.resume and not Path("runs", str(config.name), "config.yaml").exists():
        return config
    # Not before: what it needs takes as long to import as all that is needed here.
    from pipeline.stages.train_resume import continued

    return continued(config, words)


def _free_name(label: str) -> str:
    n = 0
    while Path("runs", f"{label}-{n}").exists():
        n += 1
    return f"{label}-{n}"


# ---------------------------------------------------------------------------------------------- errors, in one line


def one_line(error: Exception, stage: str) -> str:
    """The cause, the valid choices (the likeliest first) and the fix."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form key=value (such as optim.lr=1e-3), or its value needs quotes"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _wrong_choice(error)
    text = " ".join(re.split(r"\s+See https?:", str(error))[0].split())
    if ambiguous := re.match(r"Ambiguous value for argument '(.*?)' 1\. ", text):
        return f"{ambiguous[1]}: several values; add -m to run one job for each"
    where = found[0] if (found := re.match(r"In '[^']*': ", text)) else ""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    key = str(cause.full_key)
    if isinstance(cause, MissingMandatoryValue):
        return f"{where}{key} has no value; add {key}=... (clt {stage} --cfg job shows the whole configuration)"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return where + _wrong_key(key, cause.object_type)
    return f"{where}{key}: {_wrong_value(' '.join(str(cause.msg).split()).split(' full_key: ')[0])}"


def _wrong_choice(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    choices = _likeliest_first(choice, error.options or [])
    if not group:
        return f"--config-name {choice}: no such file in the built-in configuration or in --config-dir"
    if group == "hydra/launcher" and choice != "basic":
        return f"{group}={choice}: no such launcher here ({choices}); pip install 'clt-pipeline[sweep]' has more"
    return f"{group}={choice}: no such {group}; {choices or f'conf/{group}/{choice}.yaml is missing'}"


def _wrong_key(key: str, schema: Any) -> str:
    section, _, name = key.rpartition(".")
    names = [field.name for field in fields(schema)] if is_dataclass(schema) else []
    return f"{key}: no such key{f' in {section}' if section else ''}; {_likeliest_first(name, names)}"


def _wrong_value(message: str) -> str:
    kinds = {"Float": "a number", "Integer": "a whole number"}
    if found := re.match(r"Value '(.*)' of type '.*' could not be converted to (\w+)", message):
        return f"{found[1]!r} is not {kinds.get(found[2], found[2])}"
    if found := re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        return f"{found[1]!r} is not a choice; {_likeliest_first(found[1], found[2].split(', '))}"
    if found := re.match(r"Value '(.*)' is not a valid bool", message):
        return f"{found[1]!r} is neither true nor false"
    if re.match(r"field '.*' is not Optional", message):
        return "null is not a value here"
    if found := re.match(r"Invalid type assigned: .* is not a subclass of \w+. value: (.*)", message):
        return f"{found[1]!r} given for a whole section; set its keys one by one, section.key=value"
    return message


def _likeliest_first(word: str, choices: Sequence[str]) -> str:
    """'did you mean lr? choices: lr, beta1, beta2', or '' when there is nothing to choose from."""
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"{guess}choices: {', '.join([*close, *(c for c in choices if c not in close)])}" if choices else ""


# ---------------------------------------------------------------------------------------------- logging, completion


def log_to_stderr(prefix: str = "") -> None:
    """Our messages from INFO, plain, each after the prefix; other packages' from WARNING. Safe to call again."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == "clt"]:
        root.removeHandler(handler)
    root.addHandler(_Stderr(prefix))
    root.setLevel(logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    # transformers loads torchao where it is installed, which speaks of kernels for other machines, and torch of it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the moment; names the level from WARNING up."""

    def __init__(self, prefix: str) -> None:
        super().__init__(sys.stderr)
        self.name, self._prefix = "clt", prefix

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = level + super().format(record)
        return "\n".join(self._prefix + line for line in text.split("\n"))


def complete(stage: str, words: Sequence[str], incomplete: str) -> list[str]:
    """What the shell may put in place of the unfinished override: groups, choices, keys, values in force."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
            return list(plugin._query(config_name=stage, line=" ".join([*words, incomplete])))
    except (HydraException, OmegaConfBaseException, ValueError):
        return []  # a command line that is wrong so far has no completions; running it says what is wrong
