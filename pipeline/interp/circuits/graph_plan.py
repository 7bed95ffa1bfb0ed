"""How large a graph's batches may be, and how long its parts take."""

import time
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.interp.circuits import graph_rows
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.circuits.graph_rows import Decoded
from pipeline.interp.circuits.graph_targets import Outputs
from pipeline.interp.circuits.held_prompt import Recorded
from pipeline.interp.replacement import ReplacementModel

STREAMS = 16
"""Arrays [T, D] of a copy of the prompt beside two for each layer (gradients and what is put in): what a layer's
attention and norms need at a time, and the layer before it."""


SLACK = 1.25
"""Memory that was measured over the sum of what is counted: 1.15 to 1.3 at 0.06 to 0.2 GB."""


class Plan(NamedTuple):
    batch: int
    """Targets at a time."""
    n_features: int
    """Features that become nodes."""
    n_active: int
    n_bytes: float
    """At the most, the model and the transcoder apart."""
    keep_bytes: float
    """What decoder rows may take of it."""

    def __str__(self) -> str:
        some = "" if self.n_features == self.n_active else f", {self.n_features:,} of them nodes"
        memory = f"about {self.n_bytes / 1e9:.2g} GB beside the model"
        return f"{self.n_active:,} active features{some}; {self.batch} targets at a time, {memory}"


def planned(model: ReplacementModel, prompt: Recorded, found: Decoded, outputs: Outputs, options: GraphOptions) -> Plan:
    """Raises UserError where even one target at a time takes more than `memory_gb`."""
    lm, n_active, item = model.lm, found.active.n, found.error.itemsize
    n_features = min(n_active, options.max_feature_nodes or n_active)
    n_tokens, n_outputs = prompt.tokens.shape[1], len(outputs.ids)
    n_other = (lm.n_base_layers + 3) * n_tokens + lm.n_base_layers + n_outputs
    rows = (n_features + n_outputs) * (n_active + n_other)
    graph = (n_features + n_other) ** 2
    recorded = prompt.gates.n_bytes + (4 * lm.n_base_layers + lm.n_layers**2) * n_tokens * lm.d_model * item
    copy = (2 * lm.n_base_layers + STREAMS) * n_tokens * lm.d_model * item + n_active * item
    # Ranking takes the rows twice more; it is done when the graph is put together.
    more = max(graph, 2 * rows) if n_features < n_active else graph
    fixed, limit = (rows + more) * item + recorded, options.memory_gb * 1e9 / SLACK
    room = max(0.0, limit - fixed)
    decoders = graph_rows.decoder_bytes(model, prompt, found.active)
    keep_bytes = decoders if decoders < room / 2 else 0
    batch = int(min(options.batch, n_active + n_outputs, (room - keep_bytes) // copy))
    if batch < 1:
        needed = (fixed + copy) * SLACK / 1e9
        why = (
            f"graph.memory_gb={options.memory_gb:g} is too little, {needed:.3g} are needed for {n_features:,} features"
        )
        raise UserError(f"{why}; lower graph.max_feature_nodes, or give graph.memory_gb={needed * 1.1:.2g}")
    return Plan(batch, n_features, n_active, (fixed + keep_bytes + batch * copy) * SLACK, keep_bytes)


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        """What was done since the last call is this part."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
