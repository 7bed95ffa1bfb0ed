"""What `clt graph` may be told. Free of libraries, so that a wrong key is refused at once."""

from dataclasses import dataclass

from pipeline.data.options import CacheOptions
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.train.options import WeightsIn


@dataclass
class GraphFileOptions(GraphOptions):
    nodes: float = 0.8
    """Share of the influence of all nodes that the kept ones have, in the JSON and at first on the page."""

    edges: float = 0.98
    """Share of the influence of the edges between them that the kept ones have."""

    slug: str | None = None
    """Name of the graph's files. Null: from the prompt."""

    scan: str = "./data/features"
    """What the JSON says of where examples of features are. circuit-tracer's server finds the default beside the
    graphs, in features/; Neuronpedia wants one of its model ids."""

    circuit_tracer_only: bool = False
    """Leave out of the JSON the nodes that circuit-tracer does not have (positions, MLPs at position 0, features left
    out, biases), and prune as it would. The page and the whole graph keep them."""

    examples: bool | None = None
    """Find contexts and names of the kept features that `clt features` has not described, in the evaluation split of
    the run's cache. Null: where that cache is at hand; true: refuse to go on without it."""

    heads: int = 0
    """Of so many of the strongest kept edges between two positions: through which attention heads they go."""


@dataclass
class GraphConfig:
    cache: CacheOptions
    graph: GraphFileOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    prompt: str | None = None
    """What is explained, tokenised as the run's text was."""

    prompts: str | None = None
    """A text file with a prompt on each line: a graph of each, with one loading of the model."""

    validate: bool = False
    """Ablate the features of most influence, one by one, and compare what the graph predicts with what happens.
    `--validate` sets it."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""
