"""The typed configuration of `clt features`: what `conf/features.yaml` is merged into."""

from dataclasses import dataclass

from pipeline.data.options import CacheOptions
from pipeline.interp.dashboards.feature_options import FeatureOptions
from pipeline.train.options import WeightsIn


@dataclass
class FeaturesConfig:
    cache: CacheOptions
    features: FeatureOptions
    run: str | None = None
    """Run directory, or the name of a run; null is the newest that holds a finished transcoder."""

    search: str | None = None
    """A text: list the described features whose contexts have it, and describe none."""

    prompt: str | None = None
    """A text: list the features that are active at its tokens, and describe none."""

    to: str | None = None
    """The directory of the features; null is runs/NAME/features. With search= or prompt= a JSON file of what is
    listed; null writes none."""

    transcoder: WeightsIn = WeightsIn.auto
    """Where its weights are while they are used. memory: all of them; disk: in their files, of which the rows that are
    needed are read, each time anew; auto: in memory if they take no more than half of what is free there."""

    device: str = "auto"
    """Where the base model and the transcoder run: auto, cpu, cuda or cuda:N."""

    dry_run: bool = False
    """Say what it would cost, and write nothing. `--dry-run` sets it."""
