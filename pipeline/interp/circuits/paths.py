"""What an MLP's output, or an embedding, does to one target along some of the paths through a model.

The model is held (`frozen.py`), so that what is left between the MLPs is affine: an effect is a gradient, and a
difference of gradients is the effect of the paths in which two sets of attention patterns differ. MLPs write constants
here, and behind position 0 what a skip path makes of their input.

Patterns that are changed head by head choose the paths: a head whose pattern is 0 lets nothing through.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.data.models import LanguageModel
from pipeline.interp.circuits import frozen
from pipeline.interp.circuits.frozen import Gates


class Target(NamedTuple):
    """A direction in which something is read."""

    layer: int
    """Of the feature that reads, from 0 at the first layer that is read; n_layers: behind the final norm."""
    position: int
    row: Tensor
    """[D]: an encoder row, or a direction of logits."""


class Effects(NamedTuple):
    """Gradients of a target, for n sets of gates."""

    mlp_out: Tensor
    """[n, L, T, D]: of each layer's MLP output; 0 where it comes too late."""
    embedding: Tensor
    """[n, T, D]: of what the embedding of tokens gives."""
    value: Tensor
    """[T, D]: what it gives."""


def effects(lm: LanguageModel, transcoder: Transcoder, gates: Gates, n: int, tokens: Tensor, target: Target) -> Effects:
    """The gradients under n sets of gates at once (`gates` holds n patterns for each layer, or one for all). tokens
    int64 [1, T]"""
    with _affine(lm, transcoder, tokens, n) as (read, writes, embedding), frozen.held(lm, gates), torch.enable_grad():
        hidden = lm.weights.base_model(tokens.to(lm.device).expand(n, -1), use_cache=False).last_hidden_state
        x = hidden if target.layer == lm.n_layers else read[target.layer]
        reading = (x[:, target.position] * target.row.to(x)).sum()
        found = torch.autograd.grad(reading, [*writes, *embedding], materialize_grads=True)
    return Effects(torch.stack(found[:-1], dim=1), found[-1], embedding[0][0].detach())


@torch.no_grad()
def responses(
    lm: LanguageModel, transcoder: Transcoder, gates: Gates, n: int, tokens: Tensor, added: Tensor
) -> list[Tensor]:
    """What every layer's transcoder reads, and what the final norm gives, of writes `added` [L, T, D] beside nothing.
    -> L + 1 times [n, T, D]"""
    with frozen.held(lm, gates):
        found = []
        for amount in (added, torch.zeros_like(added)):
            with _affine(lm, transcoder, tokens, n, amount) as (read, _, _):
                hidden = lm.weights.base_model(tokens.to(lm.device).expand(n, -1), use_cache=False).last_hidden_state
            found.append([*(read[layer] for layer in range(lm.n_layers)), hidden])
    return [with_it - without for with_it, without in zip(*found, strict=True)]


@contextmanager
def _affine(
    lm: LanguageModel, transcoder: Transcoder, tokens: Tensor, n: int, writes: Tensor | None = None
) -> Iterator[tuple[dict[int, Tensor], list[Tensor], list[Tensor]]]:
    """(what the transcoder reads, by layer; what MLPs write; what embeddings give), the last two leaves of a gradient.
    The first is filled when the model runs. writes [L, T, D]; None: zeros."""
    read: dict[int, Tensor] = {}
    shape, like = (n, tokens.shape[1], lm.d_model), next(lm.weights.parameters())
    amounts = torch.zeros(lm.n_layers, *shape[1:]) if writes is None else writes
    leaves = [amount.to(like).expand(shape).clone().requires_grad_() for amount in amounts]
    embedding: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor, layer: int) -> None:
        read[layer] = output if transcoder.options.site == Site.mlp_in else inputs[0]

    def write(module: nn.Module, inputs: object, output: Tensor, layer: int) -> Tensor:
        if layer not in read:
            return torch.zeros_like(output)
        own = leaves[layer].to(output.device)
        if transcoder.W_skip is None:
            return own
        skipped = read[layer] @ transcoder.W_skip[layer].to(read[layer]).T
        return own + torch.cat([torch.zeros_like(skipped[:, :1]), skipped[:, 1:]], dim=1)

    def embed(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedding.append(output.detach().clone().requires_grad_())
        return embedding[0]

    with ExitStack() as hooks:
        hooks.enter_context(lm.weights.get_input_embeddings().register_forward_hook(embed))
        for base_layer in range(lm.n_base_layers):
            layer = base_layer - lm.layers.start
            norm, out, _ = lm.modules(base_layer)
            if base_layer in lm.layers:
                hooks.enter_context(norm.register_forward_hook(partial(keep, layer=layer)))
            hooks.enter_context(out.register_forward_hook(partial(write, layer=layer)))
        yield read, leaves, embedding
