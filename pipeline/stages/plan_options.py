"""The typed configuration of `clt plan` and `clt bench dist`."""

from dataclasses import dataclass, field

from pipeline.core.options import ActivationOptions
from pipeline.stages.options import TrainConfig


@dataclass
class PlanOptions:
    n_layers: int | None = None
    """Layers of the base model. With d_model, in place of the configuration of the model that is named."""

    d_model: int | None = None
    """Its width."""

    models: list[str] = field(default_factory=list)
    """One line of a table for each, by the sizes that are written down here: gpt2, llama-3.2-1b, llama-3.1-8b. Empty:
    the whole plan of one model."""

    worlds: list[int] = field(default_factory=list)
    """With models: ranks, one line for each. Empty: dist.world."""

    expansion: int | None = None
    """Features a layer as a multiple of the width, in place of arch.d_features."""

    l0: float | None = None
    """Active features of a token over all layers, for a rule that does not choose them. Null: loss.target_l0; without
    that every layer is planned in dense form, the most that it can be."""

    dead: float = 0.0
    """Share of features that are dead, for AuxK, whose reconstruction is summed only where some are."""

    device: str = "cuda"
    """Kind of device that is planned for, cuda or cpu: on a CPU, and with train.kernels=triton, Adam takes gradients of
    tables as terms, elsewhere they are as large as the tables."""

    device_gb: float = 80.0
    """Its memory, 10^9 bytes. A plan says whether a step fits."""

    rates: str | None = None
    """A JSON file of clt bench train: rates of its largest shape, and how many floors a step took there."""

    links: str | None = None
    """A JSON file of clt bench dist: rate and latency of the links between its ranks."""

    gflops: float | None = None
    """Products of matrices, 10^9 operations a second. Null: 50,000 in float32 (an H100's vector units at 75 %), 600,000
    with train.weights=bfloat16 (its matrix units at 60 %)."""

    gather_gb_s: float | None = None
    """Rows read at random and summed, 10^9 bytes a second. Null: 1,500, half of memory_gb_s."""

    memory_gb_s: float | None = None
    """Bytes read and written in order, 10^9 a second. Null: 2,500 (an H100's 3,350 at 75 %)."""

    link_gb_s: float | None = None
    """What a rank sends to another of its machine, 10^9 bytes a second. Null: 300 (NVLink of an H100, 450 one way)."""

    net_gb_s: float | None = None
    """What it sends to another machine. Null: 40 (a network of 400 Gbit/s for each GPU, at 80 %)."""

    ranks_per_machine: int = 8
    """Ranks that the faster link joins."""

    latency_us: float | None = None
    """Microseconds of a collective, beside its bytes. Null: 30."""


@dataclass
class PlanConfig(TrainConfig):
    """Settings of `clt train`, and what it would take to run them. No cache is looked for."""

    plan: PlanOptions = field(default_factory=PlanOptions)
    to: str | None = None
    """A JSON file with the figures; null writes none. `--json` sets it."""


@dataclass
class BenchDistOptions:
    shape: str = "A"
    """Sizes, as clt bench train names them; one of A and B."""

    pairs: int = 15
    """Stretches of the plain run and of that under torchrun, in turns."""

    steps: int = 10
    """Steps of a stretch."""

    ranks: list[int] = field(default_factory=lambda: [2])
    """Processes of the other runs: by features and by data."""

    mb: int = 16
    """MB (10^6 bytes) of the sum that the link's rate is taken from."""

    threads: int = 1
    """CPU threads of a process."""


@dataclass
class BenchDistConfig:
    bench: BenchDistOptions
    activation: ActivationOptions
    """topk, batchtopk or relu; activation.k null is the shape's own."""

    to: str | None = None
    """The JSON file; null is bench/dist.json. `--json` sets it."""
