"""The typed configuration of every command: what `conf/<command>.yaml` is merged into."""

from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.arch.options import ArchOptions
from pipeline.core.options import ActivationOptions, LossOptions
from pipeline.data.options import CacheOptions, DatasetOptions, ExtractOptions, ModelOptions
from pipeline.train.options import LmOptions, LogOptions, OptimOptions, TrainOptions


class Documents(StrEnum):
    held_out = "held_out"
    all = "all"


@dataclass
class EvalOptions:
    n_contexts: int | None = None
    """Evaluation contexts to use; null is all that the cache holds (or dataset.held_out of another text)."""

    batch_tokens: int = 4096
    """Tokens in a forward pass. No effect on the result."""

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
class BenchExtractOptions:
    rounds: int = 15
    """Rounds that count; each times the three variants, one after the other."""

    batches: int = 2
    """Forward passes of a variant in a round."""

    batch_tokens: int = 1024
    """Tokens of a forward pass."""

    context: int = 128
    """Tokens of a context."""

    device: str = "auto"
    """Of the random model; a named one has its model.device."""


@dataclass
class BenchExtractConfig:
    cache: CacheOptions
    bench: BenchExtractOptions
    model: ModelOptions | None = None
    """Null: a random model of GPT-2 small's shape."""

    to: str | None = None
    """The JSON file; null is bench/extract.json."""


@dataclass
class BenchCacheOptions:
    mb: int = 1024
    """Size of the scratch caches' training rows in MB (2^20 bytes). Two of them lie on the disk at a time."""

    n_layers: int = 12
    """Layers of a row; a row takes n_layers x d_model x 4 bytes."""

    d_model: int = 768
    """Width of a row."""

    batch_tokens: int = 4096
    """Rows of a batch that is read."""

    write_tokens: int = 1024
    """Rows that are scattered at a time."""

    rounds: int = 5
    """Rounds; each times every variant, one after the other."""


@dataclass
class BenchCacheConfig:
    cache: CacheOptions
    bench: BenchCacheOptions
    run: str | None = None
    """Run directory, or the name of a run, whose speed the loader's is compared with; null compares with none."""

    to: str | None = None
    """The JSON file; null is bench/cache.json."""


class TimedBy(StrEnum):
    wall = "wall"
    cpu = "cpu"


@dataclass
class BenchTrainOptions:
    shapes: list[str] | None = None
    """Of A, B, gpt2 and custom. Null: A and B, and on CUDA gpt2 where the memory is enough; custom when a size below is
    set."""

    n_layers: int | None = None
    """Layers of the custom shape; null, here and below, is what shape A has."""

    d_model: int | None = None
    """Width of the custom shape."""

    d_features: int | None = None
    """Features a layer of the custom shape."""

    batch_tokens: int | None = None
    """Tokens of a step of the custom shape."""

    l0: int | None = None
    """jumprelu, relu: active features of a token and layer, which the encoder's biases are set for. Null is the shape's
    own k."""

    kernels: list[str] | None = None
    """Settings of train.kernels that are timed. Null: all that this machine has."""

    timed_by: TimedBy = TimedBy.wall
    """wall: the time that passes. cpu: the time that this process computes, for a machine on which others work too; not
    for a GPU."""

    rounds: int = 9
    """Rounds that count; each times every variant, one after the other."""

    threads: int | None = None
    """CPU threads. Null: OMP_NUM_THREADS where it is set, else 1."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    memory: bool = True
    """Measure the peak memory of each side, in a process of its own."""

    scaling: bool = False
    """Measure what twice the features and twice the k cost."""

    loop: bool = True
    """Measure what the trainer adds to a bare step, on a cache."""

    pairs: int = 15
    """Pairs of a stretch of training and as many bare steps."""

    pair_steps: int = 20
    """Steps of a stretch."""

    tokens: str = "100M"
    """Length of the run whose time is estimated."""


@dataclass
class BenchTrainConfig:
    cache: CacheOptions
    """Where the trainer's part finds its cache: cache.path, or the newest; a scratch one where there is none."""

    bench: BenchTrainOptions
    activation: ActivationOptions
    """topk, batchtopk, jumprelu or relu; activation.k null is the shape's own."""

    loss: LossOptions
    to: str | None = None
    """The JSON file; null is bench/train.json. `--json` sets it."""


@dataclass
class BenchShareOptions:
    runs: int = 8
    """Runs that share a pass, or do not."""

    mb: int = 256
    """Size of the scratch cache's training rows in MB (2^20 bytes), which each pass reads once."""

    n_layers: int = 12
    """Layers of a row; a row takes n_layers x d_model x 4 bytes."""

    d_model: int = 768
    """Width of a row."""

    d_features: int = 16
    """Features a layer of each transcoder, one for each layer."""

    k: int = 4
    """Active features of a token and layer."""

    batch_tokens: int = 512
    """Tokens of a step."""

    throttle_mb: float = 100.0
    """MB (10^6 bytes) a second at which shards come, at most, in the second half of the table."""

    rounds: int = 3
    """Rounds; each times every variant, one after the other."""


@dataclass
class BenchShareConfig:
    cache: CacheOptions
    """Where the scratch cache lies, cache.dir; cache.shard_mb."""

    bench: BenchShareOptions
    to: str | None = None
    """The JSON file; null is bench/share.json."""


@dataclass
class BenchCodecOptions:
    rows: int = 400_000
    """Rows of the synthetic channels."""

    sample: int = 7281
    """Those of them that the code is fitted to; 7,281 is what GPT-2 small's shape gives."""

    seed: int = 0


@dataclass
class BenchCodecConfig:
    bench: BenchCodecOptions
    to: str | None = None
    """The JSON file; null is bench/codec.json."""


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

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""


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
