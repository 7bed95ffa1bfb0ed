"""What the user may say about `clt features`. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class Text(StrEnum):
    evaluation = "evaluation"
    calibration = "calibration"
    training = "training"


class Choose(StrEnum):
    random = "random"
    most_active = "most_active"


@dataclass
class FeatureOptions:
    layers: list[int] | None = None
    """Layers whose features are described, counted from 0 at the first that the transcoder reads. Null: all."""

    ids: str | None = None
    """These features alone: [0/12,1/7] (layer/feature), or a file with one on each line. Null: those that n says."""

    n: str = "all"
    """How many of the layers' features: all, or a number such as 1000 or 10k."""

    choose: Choose = Choose.random
    """Which n: random, or most_active (on the most tokens)."""

    seed: int = 0
    """Of that draw, and of the activations that stand for all of a frequent feature's."""

    split: Text = Text.evaluation
    """Whose tokens: evaluation, calibration or training. The held-out ones' activations are read from the cache; those
    of training tokens are computed again by the language model."""

    n_tokens: str = "all"
    """At most so many tokens, in whole contexts, the first ones: all, or a number such as 100k."""

    top: int = 16
    """Contexts with the highest activations, one from each context of the text."""

    quantiles: int = 5
    """Equal parts of a feature's active tokens, by activation, that examples are drawn from; 0: none."""

    per_quantile: int = 4
    """Examples of each part."""

    before: int = 24
    """Tokens of an example before its most activating one."""

    after: int = 12
    """And behind it."""

    bins: int = 50
    """Of the histogram of activations."""

    sample: int = 256
    """Activations of a feature that are kept for quantiles and their examples: all of them up to here, else a uniform
    sample of so many."""

    logits: int = 10
    """Tokens that a feature's decoder raises most, and lowers most; 0: none."""

    related: int = 10
    """Most related features, by decoder and by activity; 0: none."""

    related_tokens: str = "16k"
    """The first tokens of the text, in whole contexts, on which activity is compared."""

    batch_tokens: int = 4096
    """Tokens whose activations are computed at once."""

    memory_mb: int = 512
    """Of the running sums and examples, in MB (2^20 bytes). Features that need more are described in groups, one after
    the other, each in passes of its own over the tokens."""

    packed: bool = False
    """Write one file a layer and index.json.gz in place of one file a feature."""

    shown: int = 8
    """Of a prompt or a search: features in each token's row, and rows of a search."""
