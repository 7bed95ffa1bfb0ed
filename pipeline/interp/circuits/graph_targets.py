"""What an attribution graph explains beside its features: logits, a difference of two, or one feature.

A logit target is the unembedding's output before any soft cap, minus its mean over the vocabulary: softmax sees nothing
of that mean, and every source would otherwise have an edge that moves all tokens alike.

    row   W_U[v] - mean_v W_U        W_U[a] - W_U[b]        a row of W_enc
    bias  b_U[v] - mean_v b_U        b_U[a] - b_U[b]        its b_enc
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interp import naming
from pipeline.interp.circuits.graph_options import GraphOptions
from pipeline.interp.circuits.held_prompt import Recorded
from pipeline.interp.replacement import ReplacementModel


class Outputs(NamedTuple):
    """k targets, all of which are read at the same layer and position."""

    labels: list[str]
    ids: list[int]
    """Token ids, a feature's number; -1 of a difference."""
    layer: int
    """L: behind the last layer, by the unembedding."""
    position: int
    rows: Tensor
    """[k, D]"""
    biases: Tensor
    """[k], what is added behind the row."""
    values: Tensor
    """[k], in the model itself."""
    probabilities: Tensor
    """[k], of tokens; 1 of a difference and of a feature, as their weight in influences."""


def check(options: GraphOptions) -> None:
    """Raises UserError for settings that mean nothing, before anything is loaded."""
    given = [name for name in ("targets", "difference", "feature") if getattr(options, name) is not None]
    if len(given) > 1:
        raise UserError(f"graph.{given[0]} and graph.{given[1]} both say what to explain; give one of them")
    if options.targets is not None and not options.targets:
        raise UserError("graph.targets=[] names no token; give some, or leave it out for the most likely ones")
    if options.difference is not None and (len(options.difference) != 2 or len(set(options.difference)) != 2):
        raise UserError(f"graph.difference={options.difference} needs two tokens that differ")
    if not 0 < options.logit_mass <= 1:
        raise UserError(f"graph.logit_mass={options.logit_mass} is no probability; give one above 0 and at most 1")
    for name in ("max_logits", "batch", "update_every", "max_feature_nodes"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"graph.{name}={value} must be 1 or more")
    if not options.memory_gb > 0:
        raise UserError(f"graph.memory_gb={options.memory_gb} leaves no memory; give more than 0")
    if options.feature is not None:
        _parsed(options.feature)


def outputs(model: ReplacementModel, prompt: Recorded, options: GraphOptions) -> Outputs:
    """Raises UserError for tokens that are none, and for a feature that there is not."""
    if options.feature is not None:
        return _feature(model, prompt, options.feature)
    lm, last, n_layers = model.lm, prompt.tokens.shape[1] - 1, model.lm.n_layers
    unembedding = lm.weights.get_output_embeddings()
    W: Tensor = unembedding.weight.detach()
    bias = getattr(unembedding, "bias", None)
    b = prompt.head.new_zeros(len(W)) if bias is None else bias.detach()
    probabilities = prompt.logits.softmax(dim=0)
    if options.difference is not None:
        one, other = (naming.token(lm, text, "graph.difference") for text in options.difference)
        label = " - ".join(lm.tokenizer.decode([token]) for token in (one, other))
        row, added, value = ((t[one] - t[other])[None] for t in (W, b, prompt.head))
        return Outputs([label], [-1], n_layers, last, row, added, value, prompt.head.new_ones(1))
    if options.targets is not None:
        ids = list(dict.fromkeys(naming.token(lm, text, "graph.targets") for text in options.targets))
    else:
        ids = likely(probabilities, options)
    labels = [lm.tokenizer.decode([token]) for token in ids]
    rows, biases, values = (t[ids] - t.mean(dim=0) for t in (W, b, prompt.head))
    return Outputs(labels, ids, n_layers, last, rows, biases, values, probabilities[ids])


def likely(probabilities: Tensor, options: GraphOptions) -> list[int]:
    """The fewest most likely tokens whose probabilities add up to `logit_mass`, `max_logits` of them at most. [V]"""
    found = probabilities.topk(min(options.max_logits, len(probabilities)))
    before = found.values.cumsum(dim=0) - found.values
    return found.indices[before < options.logit_mass].tolist()


def _feature(model: ReplacementModel, prompt: Recorded, text: str) -> Outputs:
    (layer, index, position), transcoder = _parsed(text), model.transcoder
    n_tokens = prompt.tokens.shape[1]
    naming.check_there([(layer, index)], model.lm.n_layers, transcoder.d_features, f"graph.feature={text}: ")
    if not 1 <= position < n_tokens:
        raise UserError(
            f"graph.feature={text}: the prompt has positions 0 to {n_tokens - 1}, and features are traced from 1 on"
        )
    row, bias = transcoder.encoder_row(layer, index), transcoder.b_enc[layer, index]
    value = transcoder.encode_layer(prompt.x[layer][position][None], layer)[0, index]
    rows, biases, values = (t.detach()[None] for t in (row, bias, value))
    return Outputs([text], [index], layer, position, rows, biases, values, torch.ones_like(values))


def _parsed(text: str) -> tuple[int, int, int]:
    found = naming.place(text)
    if found is None or found.position is None:
        raise naming.no_feature(f"graph.feature={text}", "LAYER/INDEX@POSITION, such as 2/731@4")
    return found.layer, found.feature, found.position
