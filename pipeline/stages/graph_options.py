"""What `clt graph` may be told. Free of libraries, so that a wrong key is refused at once."""

from dataclasses import dataclass

from pipeline.interp.graph_options import GraphOptions


@dataclass
class GraphFileOptions(GraphOptions):
    nodes: float = 0.8
    """Share of the influence of all nodes that the kept ones have, in the JSON and at first on the page."""

    edges: float = 0.98
    """Share of the influence of the edges between them that the kept ones have."""

    slug: str | None = None
    """Name of the graph's files. Null: from the prompt."""


@dataclass
class GraphConfig:
    graph: GraphFileOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    prompt: str | None = None
    """What is explained, tokenised as the run's text was."""

    validate: bool = False
    """Ablate the features of most influence, one by one, and compare what the graph predicts with what happens.
    `--validate` sets it."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""
