"""What features write, and the model and its replacement with something added to or swapped among it.

The two sides of every intervention: the original model, whose MLP outputs are changed, and the live replacement, whose
features or reconstructions are. Position 0 is never edited: it keeps its own MLP output, as in any replacement.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.core.normalize import MlpNorm
from pipeline.core.sparse import Chosen, Pattern, Sparse, of_layer
from pipeline.data.models import LanguageModel
from pipeline.interp.original import read_original, read_site
from pipeline.interp.replacement import Choice, Live, keep_position_0

Output = Callable[[int, Tensor], Tensor]
"""(layer, an MLP output [n, T, D]) -> what takes its place."""


class State(NamedTuple):
    """A forward pass of the original model over contexts [n, T]."""

    logits: Tensor
    """[n, T, V]"""
    x: Tensor
    """[n, T, L, D]: what the transcoder reads."""
    mlp_out: Tensor
    """[n, T, L, D]"""


class Sides:
    """A language model and a transcoder of its MLP outputs, in the model's units and with fixed thresholds."""

    def __init__(self, lm: LanguageModel, transcoder: Transcoder) -> None:
        self.lm, self.transcoder, self.site = lm, transcoder, transcoder.options.site
        self.norm: MlpNorm = lm.mlp_norm().to(str(lm.device))

    @torch.inference_mode()
    def state(self, tokens: Tensor) -> State:
        """tokens int64 [n, T]"""
        found = read_original(self.lm, self.site, self.norm, tokens)
        return State(found.logits, torch.stack(found.x, dim=2), torch.stack(found.mlp_out, dim=2))

    @torch.inference_mode()
    def inputs(self, tokens: Tensor) -> Tensor:
        """`state(tokens).x` alone: without the head."""
        resid_mid, mlp_out = self.lm.collect(tokens)
        layers = zip(resid_mid.unbind(2), mlp_out.unbind(2), strict=True)
        return torch.stack([read_site(self.site, self.norm, i, *layer) for i, layer in enumerate(layers)], dim=2)

    @torch.inference_mode()
    def original(self, tokens: Tensor, edit: Output, last: bool = False) -> Tensor:
        """Logits [n, T, V] of the model with its MLP outputs edited; what comes later is live. last: the last
        position's, [n, 1, V]."""
        return self.lm.logits(tokens, lambda layer, resid, own: keep_position_0(own, edit(layer, own)), last=last)

    @torch.inference_mode()
    def replaced(
        self, tokens: Tensor, edit: Output | None = None, choose: Choice | None = None, last: bool = False
    ) -> Tensor:
        """Logits [n, T, V] of the live replacement with each layer's features edited by `choose`, or its
        reconstructions by `edit`; later features are live. last: the last position's, [n, 1, V]."""
        live = Live(self, range(self.lm.n_layers), choose=choose)

        def mlp(layer: int, resid: Tensor, own: Tensor) -> Tensor:
            y_hat = live(layer, resid, own)
            return keep_position_0(own, edit(layer, y_hat)) if edit else y_hat

        unread = () if self.site == Site.mlp_out else range(self.lm.n_layers)
        return self.lm.logits(tokens, mlp, own_at_0=unread, last=last)


def features_of(transcoder: Transcoder, x: Tensor) -> Sparse:
    """Every source's features in sparse form. x [B, L, D]"""
    return transcoder.all_features(x)


def written(transcoder: Transcoder, features: Sparse, x: Tensor) -> Tensor:
    """What the features write, without biases and skip path. x [B, L, D], read where features have no fixed direction
    (MOLT). -> [B, L, D]"""
    if transcoder.directions:
        return transcoder.written(features)
    return transcoder.decode(features, x) - transcoder.b_dec


def decoder_rows(transcoder: Transcoder, source: int, ids: Tensor) -> Tensor:
    """What a unit of each feature ids int64 [n] of `source` writes to every layer, 0 where none. -> [n, L, D]
    in the weights' dtype, on their device"""
    ids = ids.to(transcoder.b_dec.device)
    rows = transcoder.b_dec.new_zeros(len(ids), *transcoder.dims)
    for target in transcoder.targets(source):
        rows[:, target] = transcoder.table(source, target, ids)
    return rows


def one_each(transcoder: Transcoder, source: int, ids: Tensor, values: Tensor) -> Sparse:
    """One feature of `source` at work for each token, no other. ids int64 [B], values [B]"""
    n, device = ids.numel(), ids.device
    nothing = Pattern(ids[:0], torch.zeros(n + 1, dtype=torch.int64, device=device), transcoder.d_features)
    patterns, amounts = [nothing] * transcoder.n_sources, [values[:0]] * transcoder.n_sources
    patterns[source] = Pattern(ids, torch.arange(n + 1, device=device), transcoder.d_features)
    amounts[source] = values
    return Sparse(patterns, amounts)


def chosen(features: Sparse, source: int) -> Chosen:
    """One source's features, which are in sparse form."""
    one = of_layer(features, source)
    assert isinstance(one, Chosen)
    return one
