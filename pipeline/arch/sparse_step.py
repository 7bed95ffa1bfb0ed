"""A training step's forward pass, in sparse form wherever few features are active.

    topk family     the chosen pairs, always
    relu, jumprelu  layer by layer, in the form that `core/density.py` finds

Pre-activations are dropped layer by layer, but for those of dense layers. A loss that reads every pre-activation keeps
them all and makes the encoder's gradient dense; decoding and its gradients stay sparse.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.arch.base import Encoded, Output, Transcoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.core.density import Form, Limits
from pipeline.core.gates import Gate, JumpReLU
from pipeline.core.sparse import Pattern, Sparse, chosen_features


def forward(
    model: Transcoder, x: Tensor, limits: Limits, keep_pre_acts: bool = False, sizes: Sequence[int] = ()
) -> Output:
    """The model's output, with the gradients of its dense form. x [B, L, D]; the limits are those of gates.

    `sizes` are a Matryoshka transcoder's prefixes, ascending, the last F.
    """
    if isinstance(model.activation, Gate):
        encoded = _gated(model, model.activation, x, limits, keep_pre_acts, wide=model.directions and len(sizes) < 2)
    else:
        encoded = _chosen(model, x, keep_pre_acts)
    out = model.decoded(encoded, x, sizes) if isinstance(model, Matryoshka) else model.decoded(encoded, x)
    y_hat = out.y_hat
    for source, beyond in enumerate(out.beyond):
        if beyond is not None:
            assert isinstance(model.activation, JumpReLU)
            tables = {target: partial(model.table, source, target) for target in model.targets(source)}
            y_hat = model.activation.write_beyond(y_hat, beyond, source, tables)
    return out._replace(y_hat=y_hat)


def _chosen(model: Transcoder, x: Tensor, keep_pre_acts: bool) -> Encoded:
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


def _gated(model: Transcoder, rule: Gate, x: Tensor, limits: Limits, keep_pre_acts: bool, wide: bool) -> Encoded:
    patterns: list[Pattern | None] = []
    beyond: list[Pattern | Tensor | None] = []
    features, gated, kept = [], [], []
    for layer, read in enumerate(model.inputs(x)):
        # One that was dense is likely to be so again, and only then autograd needs the product.
        recorded = keep_pre_acts or rule.form[layer] == Form.dense
        h = model.encode_layer(read, layer) if recorded else None
        with torch.no_grad():
            here = model.encode_aside(read, layer) if h is None else h.detach()
        pattern, values, window = rule.pairs(here, layer, limits, wide)
        if pattern is None or values is None:
            h = model.encode_layer(read, layer) if h is None else h
            here = h.detach()
            features.append(rule.layer(h, layer))
        else:
            here = values
            features.append(rule.at_pairs(_taught(model, layer, pattern, here, read), pattern, layer))
        patterns.append(pattern)
        beyond.append(window)
        gated.append(here)
        if h is not None:
            kept.append(h)
    pre_acts = tuple(kept) if keep_pre_acts else None
    return Encoded(pre_acts, Sparse(patterns, features), Sparse(patterns, gated), tuple(beyond))


def _taught(model: Transcoder, layer: int, pattern: Pattern, values: Tensor, read: Tensor) -> Tensor:
    return chosen_features(pattern, values, read, model.encoders[layer], model.b_enc[layer])
