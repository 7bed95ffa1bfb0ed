"""What the user may say about `clt plot`. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass, field
from enum import StrEnum

from pipeline.interp.steering.intervene_options import Response


class Kind(StrEnum):
    heatmap = "heatmap"
    tokens = "tokens"
    embedding = "embedding"
    correlation = "correlation"
    ranking = "ranking"
    token_probability = "token_probability"


class By(StrEnum):
    norm = "norm"
    effect = "effect"


@dataclass
class PlotOptions:
    n: int | None = None
    """Features that are shown: of a prompt those that write most at its tokens in turn, of a correlation without one
    those that write most on the evaluation split. Null: 30; of tokens 12, of correlation 60, of token_probability 4, of
    an embedding 2,000."""

    features: str | None = None
    """These in their place: [0/12,1/7] (layer/feature), or a file with one on each line."""

    by: By = By.norm
    """Of a ranking: norm, activation x decoder norm, or effect, what taking the feature away changes in the logit of
    `token`."""

    token: str | None = None
    """Whose logit or probability is followed, behind the prompt's last token. Null: the most likely one."""

    factors: list[float] = field(default_factory=lambda: [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0])
    """Of token_probability: what the activation is multiplied by; 1 changes nothing, 0 takes the feature away."""

    response: Response = Response.constrained
    """Of effects and token_probability: what other features do meanwhile, as intervene.layers."""

    n_tokens: str = "8k"
    """Of correlation, and of what is done without a prompt: the first tokens of the evaluation split."""

    perplexity: float = 30.0
    """Of t-SNE: about how many neighbours a feature keeps."""

    seed: int = 0
    """Of t-SNE, UMAP and the draw of features for them."""

    png: bool = False
    """Also write an image beside the page. `--png` sets it."""
