"""What the user may say about an intervention. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class Model(StrEnum):
    """What is edited."""

    original = "original"
    replacement = "replacement"


class Response(StrEnum):
    """What features do that are not edited."""

    open = "open"
    constrained = "constrained"
    gates = "gates"


class Hold(StrEnum):
    """Attention patterns and the denominators of norms."""

    live = "live"
    frozen = "frozen"


@dataclass
class InterveneOptions:
    model: Model = Model.original
    """original: the model itself; what the edited features write is added to the outputs of its MLPs. replacement: the
    transcoder in the MLPs' place."""

    keep_error: bool = True
    """Of model=replacement: what the transcoder misses on the unedited text is added as a constant, so that without an
    edit it is the original."""

    layers: Response = Response.open
    """open: what comes later responds, MLPs of the original or features of the replacement. constrained: all features
    hold the values that they have without the edit, so that edits act through their decoders alone. gates: the features
    that are active without the edit follow their pre-activations, whatever their threshold; no other becomes active."""

    until: int | None = None
    """With constrained or gates: the last layer for which this holds; later ones are open. Null: all."""

    attention: Hold = Hold.live
    """frozen: the attention patterns of the unedited run."""

    norms: Hold = Hold.live
    """frozen: the denominators of all norms are those of the unedited run."""

    top: int = 10
    """Tokens and features that are shown, those that change most."""

    n_tokens: int = 0
    """Tokens to generate under the intervention, the most likely one each (greedy)."""

    kv_cache: bool = True
    """Of generation: keep keys and values of earlier tokens. No effect on the result."""

    batch_tokens: int = 8192
    """Tokens in a forward pass, several interventions side by side."""


@dataclass
class SwapOptions:
    features: str | None = None
    """Which features take the values that they have elsewhere: LAYER/INDEX or names of supernodes, with commas; `all`:
    every feature that is active in one of the two places. Null: nothing is swapped."""

    from_prompt: str | None = None
    """Another prompt. Null: the same one."""

    at: str = "last"
    """Position of the prompt whose features are replaced, from 0 (the token that begins a context is one); negative
    ones count from the end."""

    from_at: str | None = None
    """Position of the other prompt. Null: what `at` says, of that prompt."""
