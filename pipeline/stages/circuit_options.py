"""What `clt weights` and `clt circuits` may be told. Free of libraries, so that a wrong key is refused at once."""

from dataclasses import dataclass

from pipeline.data.options import CacheOptions
from pipeline.train.options import WeightsIn


@dataclass
class WeightsOptions:
    n: int = 10
    """Inputs and outputs to show along the residual stream, and as many through attention heads."""

    count: bool = True
    """Count on held-out text how the feature is active with others, and rank by that. false: by the weights alone."""

    n_tokens: str = "50k"
    """Of that text: a number, 50k, 2M or all."""

    batch_tokens: int = 2048
    """How many of them are encoded at a time."""

    norm_contexts: int = 8
    """Held-out contexts on which norm denominators are measured."""


@dataclass
class WeightsConfig:
    cache: CacheOptions
    weights: WeightsOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    feature: str | None = None
    """LAYER/INDEX, layers from 0 at the first that is read."""

    to: str | None = None
    """A file for all rows, which ends in .csv or .parquet; null writes none."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""


@dataclass
class CircuitsOptions:
    least: int = 2
    """Graphs that a feature or an edge must be in."""

    nodes: float = 0.8
    """Share of the influence of all nodes that each graph keeps, as in clt graph."""

    edges: float = 0.98
    """Share of the influence of the edges between them."""

    n: int = 15
    """Features and edges to show; the files have all."""


@dataclass
class CircuitsConfig:
    circuits: CircuitsOptions
    graphs: str | None = None
    """Folder of .safetensors files that clt graph wrote for several prompts of one run; null is the graphs of the
    newest run."""

    to: str | None = None
    """JSON file; null is circuits.json in that folder. NAME-features.csv and NAME-edges.csv lie beside it."""
