"""Features of a training step, in sparse form wherever few are active.

    topk family     the chosen pairs, always
    relu, jumprelu  layer by layer: the pairs that the gradients need while they are few, else dense (`core/density.py`)

Pre-activations are dropped layer by layer, but for those of dense layers. A loss that reads every pre-activation keeps
them all and makes the encoder's gradient dense; decoding and its gradients stay sparse.
"""

import torch
from torch import Tensor

from pipeline.arch.base import Encoded, Transcoder
from pipeline.core.density import Limits
from pipeline.core.gates import Gate
from pipeline.core.sparse import Pattern, Sparse, chosen_features


def encode(model: Transcoder, x: Tensor, limits: Limits, keep_pre_acts: bool) -> Encoded:
    """What `Transcoder.activate` gives, at the cost of the active pairs. x [B, L, D]; the limits are those of gates."""
    if isinstance(model.activation, Gate):
        return _gated(model, model.activation, x, limits, keep_pre_acts)
    assert model.activation.chooses
    if not keep_pre_acts:
        return Encoded(None, model.choose(x))
    inputs = model.inputs(x)
    pre_acts = tuple(model.encode_layer(h, layer) for layer, h in enumerate(inputs))
    with torch.no_grad():
        # The rule may overwrite what it is given.
        chosen = list(model.activation.choose((h.clone() for h in pre_acts), model.rank_norms()))
    values = [_taught(model, layer, *one, inputs[layer]) for layer, one in enumerate(chosen)]
    return Encoded(pre_acts, Sparse([pattern for pattern, _ in chosen], values))


def _gated(model: Transcoder, rule: Gate, x: Tensor, limits: Limits, keep_pre_acts: bool) -> Encoded:
    patterns: list[Pattern | None] = []
    features, gated, kept = [], [], []
    for layer, read in enumerate(model.inputs(x)):
        # Recorded for autograd, which needs no more than its arguments, before it is known whether it is needed.
        h = model.encode_layer(read, layer)
        pattern, here = rule.pairs(h.detach(), layer, limits), h.detach()
        if pattern is None:
            features.append(rule.layer(h, layer))
        else:
            here = here.flatten().index_select(0, pattern.tokens * pattern.n_features + pattern.indices)
            features.append(rule.at_pairs(_taught(model, layer, pattern, here, read), pattern, layer))
        patterns.append(pattern)
        gated.append(here)
        if keep_pre_acts:
            kept.append(h)
    return Encoded(tuple(kept) if keep_pre_acts else None, Sparse(patterns, features), Sparse(patterns, gated))


def _taught(model: Transcoder, layer: int, pattern: Pattern, values: Tensor, read: Tensor) -> Tensor:
    return chosen_features(pattern, values, read, model.encoders[layer], model.b_enc[layer])
