"""What `clt intervene` may be told. Free of libraries, so that a wrong key is refused at once."""

from dataclasses import dataclass

from pipeline.interp.steering.intervene_options import InterveneOptions, SwapOptions
from pipeline.train.options import WeightsIn


@dataclass
class InterveneConfig:
    intervene: InterveneOptions
    swap: SwapOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    prompt: str | None = None
    """Whose features are edited, tokenised as the run's text was."""

    edits: str | None = None
    """Edits with commas between them, or a YAML or JSON file with a list of them. One is FEATURE@WHERE=VALUE (set),
    *FACTOR (scale) or +VALUE (add). FEATURE: LAYER/INDEX, or the name of a supernode. WHERE: a position, several, a
    range 2:6, last, prompt, new (each generated token) or all, the default."""

    supernodes: str | None = None
    """A JSON or YAML file of named groups of features: {"name": ["0/17", "1/3@4"]}, or a graph's."""

    tokens: str | None = None
    """Next tokens that are shown in any case, with commas: Paris,Berlin. Their texts, or #17 for the token 17."""

    to: str | None = None
    """A JSON file with all of it; null writes none. `--json` sets it."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""
