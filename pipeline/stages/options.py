"""The typed configuration of every command: what `conf/<command>.yaml` is merged into."""

from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions, LossOptions
from pipeline.data.options import CacheOptions, DatasetOptions, ExtractOptions, ModelOptions
from pipeline.dist.options import PATIENCE_S, DistOptions
from pipeline.interp.options import GenerateOptions
from pipeline.train.options import LmOptions, LogOptions, OptimOptions, TrainOptions, WeightsIn


class Documents(StrEnum):
    held_out = "held_out"
    all = "all"


@dataclass
class EvalOptions:
    n_contexts: int | None = None
    """Evaluation contexts to use; null is all that the cache holds (or dataset.held_out of another text)."""

    batch_tokens: int = 4096
    """Tokens in a forward pass. No effect on the result."""

    bootstrap: int = 2000
    """Resamples of the contexts, from which the 95 % intervals come; 0: no intervals."""

    curves: bool = True
    """Replace single layers too, those up to each layer and those from it."""

    curve_contexts: int = 32
    """Contexts that this is measured on, the first ones: L layers take 5 L - 5 forward passes of each."""

    faithfulness: bool = True
    """Compare what features write, and interventions on them, with the original model."""

    world: bool = True
    """Of the built-in world: accuracy on its tasks, country swaps, purity of features."""

    documents: Documents = Documents.held_out
    """Of another text (`dataset=`): its evaluation documents only, or all of it. The first is safe when the text, or a
    part of it, was trained on, since which documents are evaluation documents depends on their content alone."""


@dataclass
class PretrainConfig:
    lm: LmOptions
    dataset: DatasetOptions
    to: str | None = None
    """Directory of the new model; null is models/<lm.name>."""


@dataclass
class ExtractConfig:
    model: ModelOptions
    dataset: DatasetOptions
    cache: CacheOptions
    extract: ExtractOptions
    dry_run: bool = False
    """Say what it would cost, and write nothing. `--dry-run` sets it."""


@dataclass
class TrainConfig:
    model: ModelOptions
    dataset: DatasetOptions
    cache: CacheOptions
    arch: ArchOptions
    activation: ActivationOptions
    loss: LossOptions
    optim: OptimOptions
    train: TrainOptions
    log: LogOptions
    dist: DistOptions
    name: str | None = None
    """The run is written to runs/<name>; null is <experiment>-<n>, the first n that is free."""

    experiment: str | None = None
    """Name of the experiment file, for the default of `name`."""

    newest_cache: bool = False
    """Train on the newest complete cache. The command line sets it when it names neither model nor dataset."""

    dry_run: bool = False
    """Say what it would cost, and write nothing. `--dry-run` sets it."""

    resume: bool | None = None
    """null: continue the run of this name, or begin it. true: there must be one to continue; without a name it is the
    unfinished run that was at work last, with its own settings. false: there must be none."""


class Thresholds(StrEnum):
    per_feature = "per_feature"
    per_layer = "per_layer"


@dataclass
class ConvertOptions:
    thresholds: Thresholds = Thresholds.per_feature
    """per_feature: each feature fires as often as under its rule on the calibration split. per_layer: one threshold for
    a layer, with which the layer does."""


@dataclass
class ConvertConfig:
    cache: CacheOptions
    convert: ConvertOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    to: str | None = None
    """Name of the new run, or its directory; null is <run>-jumprelu."""

    device: str = "auto"
    """Where the transcoder runs: auto, cpu, cuda or cuda:N."""


@dataclass
class EvalConfig:
    cache: CacheOptions
    eval: EvalOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    dataset: DatasetOptions | None = None
    """Other text to evaluate on, without the cache."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""

    dist: DistOptions = field(default_factory=lambda: DistOptions("ddp", data=None, timeout_s=PATIENCE_S))
    """What the ranks that torchrun starts share: the text, the features, or both."""


@dataclass
class GenerateConfig:
    generate: GenerateOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    prompt: str | None = None
    """What is continued, tokenised as the run's text was. Empty: from the token that begins a context."""

    to: str | None = None
    """A JSON file with all of it; null writes none. `--json` sets it."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""


@dataclass
class ReportOptions:
    baseline: str | None = None
    """The run that all others are compared with, context by context; null is the one with the lowest KL."""

    resamples: int = 2000
    """Of the intervals of these differences; 0 leaves them out."""

    png: bool = False
    """Also write every plot as an image, NAME-plots/PLOT.png beside the page. `--png` sets it."""


@dataclass
class ReportConfig:
    report: ReportOptions
    runs: list[str] = field(default_factory=list)
    """Run directories, names of runs, or directories of runs such as a sweep's; none is the newest run. The command
    line takes them without `runs=`."""

    to: str | None = None
    """The page, which ends in .html; null is report.html in the run's or the sweep's directory, for several in the
    working directory. The CSV lies beside it."""


@dataclass
class CompareOptions:
    experiments: list[str] = field(default_factory=list)
    """Names of conf/experiment/ (or of --config-dir), in the order of the table."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """Each experiment is trained once with each train.seed."""

    parameters: str | None = None
    """Parameters of each transcoder (500k, 2M): arch.d_features becomes the largest that has no more. Null leaves the
    experiments' own widths."""

    l0: int | None = None
    """Active features of a token over all layers: sets activation.k, or loss.target_l0 of a rule without a k. Null
    leaves the experiments' own."""


@dataclass
class CompareConfig(TrainConfig):
    """Settings of `clt train` go to every experiment, over what its file says."""

    eval: EvalOptions = field(default_factory=EvalOptions)
    compare: CompareOptions = field(default_factory=CompareOptions)
    jobs: dict[str, TrainConfig] = field(default_factory=dict)
    """The settings of each experiment. The command line fills it in."""
