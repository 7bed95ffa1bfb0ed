"""What the user may say about attribution graphs. Free of libraries, so that a mistyped key costs no time."""

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


@dataclass
class GraphOptions:
    targets: list[str] | None = None
    """Tokens whose logits are explained, as in '[" Paris"," Lyon"]'. Null: the most likely ones."""

    difference: list[str] | None = None
    """Two tokens: the logit of the first minus that of the second is explained instead."""

    feature: str | None = None
    """LAYER/INDEX@POSITION: this feature's pre-activation is explained instead."""

    logit_mass: float = 0.95
    """Without targets: the fewest most likely tokens whose probabilities add up to this much (circuit-tracer's)."""

    max_logits: int = 10
    """And no more of them than this."""

    max_feature_nodes: int | None = 7500
    """Features that become nodes, those of most influence on the targets (circuit-tracer's limit). The others of each
    layer and position are one rest node. Null: all active ones."""

    batch: int = 64
    """Targets in one backward pass, fewer where memory_gb asks for it. No effect on the result but rounding."""

    update_every: int = 4
    """Batches until influences are ranked anew, where max_feature_nodes leaves some features out."""

    memory_gb: float = 8.0
    """Most memory for the trace, in 10^9 bytes, the model and the transcoder apart."""

    dtype: Precision = Precision.float32
    """Of the model, the transcoder and the edges while tracing. float64 is for checks: twice the memory."""
