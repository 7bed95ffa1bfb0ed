"""The typed configuration of `clt bench` but for `clt bench dist` (`plan_options.py`)."""

from dataclasses import dataclass
from enum import StrEnum

from pipeline.core.options import ActivationOptions, LossOptions
from pipeline.data.options import CacheOptions, ModelOptions


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
