"""The typed configuration of `clt plot`: what `conf/plot.yaml` is merged into."""

from dataclasses import dataclass

from pipeline.data.options import CacheOptions
from pipeline.interp.plots.plot_options import Kind, PlotOptions
from pipeline.train.options import WeightsIn


@dataclass
class PlotConfig:
    cache: CacheOptions
    plot: PlotOptions
    kind: Kind = Kind.heatmap
    """heatmap, tokens, embedding, correlation, ranking or token_probability."""

    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    prompt: str | None = None
    """The text that features are shown on; embedding and correlation can do without."""

    to: str | None = None
    """The page, which ends in .html; null is runs/NAME/plots/KIND-PROMPT.html. The image lies beside it."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""
