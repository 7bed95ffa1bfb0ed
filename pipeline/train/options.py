"""What the user may say about training. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.core.options import Kernels
from pipeline.data.options import Dtype


class AsyncCheckpoints(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


class Finish(StrEnum):
    last = "last"
    best = "best"


class LrSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Norm(StrEnum):
    rms = "rms"
    standard = "standard"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class SparseStep(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


@dataclass
class OptimOptions:
    name: str
    """adam, adamw, adam8bit, muon or signsgd."""

    lr: float = 1e-3
    """Peak learning rate."""

    beta1: float = 0.9
    """Of Adam's first moment; with muon of its Adam for what is no matrix."""

    beta2: float = 0.999
    """Of the second."""

    momentum: float = 0.95
    """muon: of the gradient's mean. signsgd: how far from its newest point towards the average gradients are taken."""

    weight_decay: float = 0.0
    """adamw, adam8bit, muon: the share of each weight, times the learning rate, that a step takes away."""

    clip: float | None = None
    """The largest norm of all gradients together; longer ones are scaled down to it. Null for no limit."""

    warmup: float = 0.02
    """Share of the run over which the learning rate rises from 0."""

    decay: float = 0.3
    """Share of the run, at its end, over which the learning rate falls to 0."""

    schedule: LrSchedule = LrSchedule.linear
    """Shape of the fall: linear, cosine, or constant for none."""


class WeightsIn(StrEnum):
    auto = "auto"
    memory = "memory"
    disk = "disk"


@dataclass
class TrainOptions:
    n_tokens: str | None = None
    """Length in tokens (400k, 10M); more than the cache holds means further passes. Null when n_steps is set."""

    n_steps: int | None = None
    """Length in optimiser steps. Null when n_tokens is set."""

    batch_tokens: int = 1024
    """Tokens of a step."""

    accumulate: int = 1
    """Equal parts of a step's tokens that go through the model one after the other, their gradients added up: less
    memory, the same step. Under the batchtopk rules tokens compete within a part."""

    seed: int = 0
    """Seed of the initial weights and of the order of the rows."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    kernels: Kernels = Kernels.auto
    """How sparse products are computed: torch, compiled (C++ for a CPU, float32), triton (CUDA; never yet run on
    one), or auto, which takes compiled where it can be had, else torch. All are exact; they round differently."""

    init_from: str | None = None
    """A finished run, by name or path, whose weights the run begins with, in place of arch.init; with
    activation=jumprelu its thresholds too."""

    norm: Norm = Norm.rms
    """rms: one scalar for each layer and side. standard: mean and standard deviation of each dimension."""

    weights: Precision = Precision.float32
    """Of the encoder and decoder tables while they are trained. bfloat16 halves their memory; it needs optim=adam8bit,
    which rounds at random, and is meant for CUDA."""

    sparse: SparseStep = SparseStep.auto
    """Whether a step does arithmetic on active features alone; the gradients are the same. auto: always for rules of
    the topk family; for relu and jumprelu in each layer while few features are active. always: however many are.
    never: dense."""

    share_pass: bool = False
    """The jobs of a sweep that read the same batches are trained together, in one process, and each batch is read once.
    Their results are those of separate runs. docs/sweeps.md."""

    dead_window: str = "auto"
    """A feature is dead when it has not fired for so many tokens; auto is a tenth of the run, at most 10M."""

    checkpoint_every: str = "auto"
    """Tokens between checkpoints; auto is a fifth of the run."""

    keep_checkpoints: int = 1
    """How many of the newest checkpoints stay."""

    async_checkpoints: AsyncCheckpoints = AsyncCheckpoints.auto
    """Whether a checkpoint is written while the training goes on, from a copy in the CPU's memory, as large as weights
    and optimiser state together. auto: where the training is on a GPU, from which they are copied anyway. The files are
    the same."""

    keep_best: int = 0
    """How many of the best checkpoints stay besides: those of the lowest FVU on the first rows of the calibration
    split, under the rule of training. No effect on the weights."""

    finish: Finish = Finish.last
    """Which checkpoint becomes final/: the last, or the best, with keep_best."""

    diverged: float | None = 10.0
    """The run stops when its reconstruction loss has been so many times its lowest, and above that of predicting the
    means, for 100 steps in a row. Null: it goes on as long as numbers are finite."""


class Logger(StrEnum):
    default = "default"
    tensorboard = "tensorboard"
    wandb = "wandb"


class WandbMode(StrEnum):
    online = "online"
    offline = "offline"


@dataclass
class LogOptions:
    name: Logger = Logger.default
    """Where lines are shown besides: tensorboard (runs/NAME/tensorboard), wandb, or default for nowhere. This and what
    follows changes nothing that is computed, and may differ when a run is continued."""

    project: str | None = None
    """wandb: the project. Null is W&B's own default."""

    entity: str | None = None
    """wandb: the user or team. Null is your default."""

    group: str | None = None
    """wandb: the group. Null is the folder in the run's name: a sweep or comparison is a group."""

    tags: list[str] = field(default_factory=list)
    """wandb: labels."""

    mode: WandbMode | None = None
    """wandb: online, or offline into runs/NAME/wandb, to be sent by `wandb sync`. Null is what WANDB_MODE says, else
    online."""

    report: bool = True
    """Rebuild runs/NAME/report.html after held-out measures, in a process of its own: once a minute at most, and for
    1 % of the time at most."""

    every: int = 50
    """Steps between lines of metrics.jsonl."""

    held_out_every: str | None = "auto"
    """Steps between lines with measures on held-out text, the last step besides. auto is a tenth of the run, or more
    where the run is short, in whole steps of `every`; null for none. No effect on the weights."""

    held_out_rows: int = 2048
    """Rows of the calibration split that are measured, the first ones, at least a batch. Best checkpoints are chosen by
    them."""


class Weights(StrEnum):
    float32 = "float32"
    float16 = "float16"


@dataclass
class LmOptions:
    """A small GPT-2-architecture language model for `clt pretrain`."""

    name: str
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 512

    tokenizer: str | None = None
    """A directory or hub name whose tokenizer is used. Null: the built-in world's words for its documents, and for
    other text a byte-level BPE that is trained on the training documents."""

    vocab_size: int = 4096
    """Tokens of a BPE that is trained here, at most; no effect with another tokenizer."""

    tokenizer_mb: float = 50.0
    """A BPE is trained on the first so many MB (10^6 bytes) of the training documents."""

    n_steps: int | None = None
    """Length in optimiser steps. Null when n_tokens is set."""

    n_tokens: str | None = None
    """Length in tokens (400k, 10M); more than the data holds means further epochs. Null when n_steps is set."""

    batch_tokens: int = 4096
    """Tokens of a step, in whole contexts."""

    optim: OptimOptions = field(
        default_factory=lambda: OptimOptions(
            name="adamw", lr=3e-3, beta2=0.98, warmup=0.02, decay=0.98, schedule=LrSchedule.cosine
        )
    )
    weight_decay: float = 0.1
    """AdamW's, on matrices only."""

    seed: int = 0
    """Seed of the initial weights, of the order of the contexts and of the samples."""

    early_attention_penalty: float = 0.0
    """Weight of the mean attention of layer 0 to earlier tokens other than the first. It makes the model look facts up
    where the subject stands, which a transcoder can explain, rather than copy the subject to the end first. Above 0 the
    attention is computed step by step (eager), which is slower."""

    dtype: Dtype = Dtype.auto
    """Arithmetic of the matrix products; weights and optimiser are float32 either way. auto is bfloat16 on CUDA and
    float32 elsewhere. A CPU without bfloat16 instructions takes ten times as long with it."""

    weights: Weights = Weights.float32
    """How the finished weights are stored. float16 halves the file; it is only for small models whose weights stay far
    from its limits."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""

    eval_every: int = 500
    """Steps between held-out losses, with samples of the model's text. No effect on the weights."""

    checkpoint_every: int = 500
    """Steps between checkpoints. No effect on the result."""

    n_samples: int = 3
    """Samples at each held-out loss: the first from nothing, the others from the beginnings of held-out documents."""

    sample_tokens: int = 40
    """Tokens of a sample at most, its given beginning left out; less where the context ends."""

    temperature: float = 0.8
    """Of the samples; 0 takes the most likely token each time."""
