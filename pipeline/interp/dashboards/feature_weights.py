"""What a feature's weights say: where it writes, which tokens that speaks for, and which features write alike.

    decoder norm     |W_dec[l][f, m]| for each target layer m
    logits           the decoder rows, summed over the targets, through the gain of the final norm and the unembedding
                     (`LanguageModel.read_out`): what the feature adds to each logit along the direct path, up to the
                     norm's denominator. Later layers read it too, and this says nothing of that.
    cosine           of two features' decoder rows, concatenated over all target layers; 0 where one writes nothing

An architecture whose features have no fixed direction (MOLT) has none of these, and one that writes to another place
than the MLPs' outputs (an SAE) no logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.data.models import LanguageModel
from pipeline.interp.dashboards.feature_rows import widened

AT_ONCE = 256
"""Features whose rows are held against all others in one product."""


class Named(NamedTuple):
    """The highest entries of rows, the highest first."""

    ids: Tensor
    """int64 [n, k]"""
    value: Tensor
    """[n, k]"""


def norms_by_target(transcoder: Transcoder, source: int, ids: Tensor) -> Tensor:
    """ids [n] -> [n, L], 0 where a source does not write"""
    found = torch.zeros(len(ids), transcoder.dims.n_layers)
    for target in transcoder.targets(source):
        found[:, target] = transcoder.table(source, target, ids).float().norm(dim=1).cpu()
    return found


def has_logits(transcoder: Transcoder) -> bool:
    return transcoder.directions and transcoder.options.writes == Site.mlp_out


def logits(lm: LanguageModel, transcoder: Transcoder, source: int, ids: Tensor, k: int) -> tuple[Named, Named]:
    """ids [n] -> (what the features raise most, what they lower most), tokens of the tokenizer alone"""
    found = [_logits(lm, transcoder, source, some, k) for some in ids.split(AT_ONCE)]
    top, bottom = (Named(*(torch.cat(parts) for parts in zip(*side, strict=True))) for side in zip(*found, strict=True))
    return top, bottom


def _logits(lm: LanguageModel, transcoder: Transcoder, source: int, ids: Tensor, k: int) -> tuple[Named, Named]:
    rows = widened(ids)
    written = torch.stack([transcoder.table(source, target, rows).float() for target in transcoder.targets(source)])
    effect = lm.read_out(written.sum(dim=0))[: len(ids), : len(lm.tokenizer)]
    k = min(k, effect.shape[1])
    top, bottom = effect.topk(k), effect.topk(k, largest=False)
    return Named(top.indices, top.values), Named(bottom.indices, bottom.values)


def alike(transcoder: Transcoder, source: int, ids: Tensor, norms: Tensor, k: int) -> Named:
    """The features of all sources with the highest cosine to each of `ids` [n], themselves left out.

    norms [S, F]: `transcoder.decoder_norms()`. -> indices source * F + feature
    """
    found = [_alike(transcoder, source, some, norms, k) for some in ids.split(AT_ONCE)]
    return Named(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _alike(transcoder: Transcoder, source: int, ids: Tensor, norms: Tensor, k: int) -> Named:
    d_features = transcoder.d_features
    wide = widened(ids)
    products = norms.new_zeros(len(wide), transcoder.n_sources, d_features)
    for other in range(transcoder.n_sources):
        for target in transcoder.targets(source):
            if target in transcoder.targets(other):
                rows = transcoder.table(source, target, wide)
                products[:, other] += (rows @ transcoder.table(other, target).T).to(products.dtype)
    scale = norms[source][ids][:, None, None] * norms
    cosine = torch.where(scale > 0, products[: len(ids)] / scale, 0.0).flatten(1)
    cosine[torch.arange(len(ids)), source * d_features + ids] = -torch.inf
    best = cosine.topk(min(k, cosine.shape[1] - 1))
    return Named(best.indices.cpu(), best.values.cpu())
