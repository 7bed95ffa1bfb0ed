"""Which layers do features write: their own, or later ones?

A cross-layer transcoder may reconstruct a late MLP from early features, and so leave out what the model computes in
between. Two matrices [L, L], source layer by target layer, say how much it does, in the model's units:

    decoders[l][m]   sum_i |W_dec,i^{l -> m}|, over all features alike, those that never fire included
    written[l][m]    mean over tokens of sum_i a_i |W_dec,i^{l -> m}|, over the features that are active

(A transform of arch=molt has |U_t V_t|_F and a_t |U_t V_t x|; an offset of arch=tied counts where its feature is at
work.) Each with shares

    of_source[l][m]  of what layer l's features write, the part that goes to layer m. MLP outputs differ in size from
                     layer to layer, and this share with them
    of_target[m][l]  of what is written to layer m, the part that comes from layer l: free of the target's size
    own              what is written to own layers, of all that is written
    by_distance[d]   what is written d layers on, of all that is written

Shares are of norms, so writes that cancel count. The last layer has nowhere else to write, and the first target nothing
else to read from: their shares are 1 whatever the transcoder does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core.sparse import Chosen
from pipeline.dist import pieces
from pipeline.dist.joined import own
from pipeline.dist.pieces import ALONE
from pipeline.dist.wire import Group
from pipeline.interp.edits import chosen, features_of, one_each, written
from pipeline.progress import Progress

ENTRIES_AT_ONCE = 1 << 13
"""Bounds the memory of single features' writes: [entries, L, D]."""


def no_matrix(transcoder: Transcoder) -> str | None:
    """Why there is no matrix of source by target layers, or None."""
    if transcoder.n_sources == transcoder.dims.n_layers:
        return None
    return f"arch={transcoder.options.name} has one feature space over all layers, so no feature has a layer of its own"


@torch.no_grad()
def of_decoders(transcoder: Transcoder) -> Tensor:
    """`decoders`, float64 [L, L]."""
    transcoder, of_all = own(transcoder)
    mass = torch.zeros(transcoder.n_sources, transcoder.dims.n_layers, dtype=torch.float64)
    for source in range(transcoder.n_sources):
        for target in transcoder.targets(source):
            mass[source, target] = _norms(transcoder, source, target).double().sum()
    return of_all(mass)


@torch.no_grad()
def by_context(
    transcoder: Transcoder,
    read: Callable[[Tensor], Tensor],
    context: Tensor,
    n_contexts: int,
    batch_tokens: int,
    group: Group = ALONE,
) -> Tensor:
    """The sums over tokens that `written` is made of, float64 [n_contexts, L, L]. read: rows int64 [B] -> what the
    transcoder reads there [B, L, D]; context int64 [n], the context of each row. Rows are divided over the ranks."""
    transcoder, of_all = own(transcoder)
    n_layers, device = transcoder.dims.n_layers, transcoder.b_enc.device
    mass = torch.zeros(n_contexts, n_layers, n_layers, dtype=torch.float64)
    every = torch.arange(len(context)).split(batch_tokens)
    mine = [every[i] for i in pieces.mine(len(every), group)]
    with Progress(sum(map(len, mine)), "tok", "decoder mass") as bar:
        for rows in mine:
            inputs = read(rows).to(device)
            features = features_of(transcoder, inputs)
            for source in range(n_layers):
                one = chosen(features, source)
                at = context[rows][one.pattern.tokens.cpu()]
                for target, norms in _written_norms(transcoder, source, one, inputs).items():
                    mass[:, source, target].index_add_(0, at, norms.double().cpu())
            bar.update(len(rows))
    return of_all(pieces.added(mass, group, "decoder mass"))


def shares(mass: Tensor) -> dict[str, Any]:
    """The matrix and its shares, as in this file's head; None where nothing is written. mass [L, L]"""
    n_layers = mass.shape[0]
    total = float(mass.sum())
    return {
        "matrix": mass.tolist(),
        "of_source": [[_share(v, float(row.sum())) for v in row.tolist()] for row in mass],
        "of_target": [[_share(v, float(col.sum())) for v in col.tolist()] for col in mass.T],
        "own": _share(float(mass.trace()), total),
        "by_distance": [_share(float(mass.diagonal(d).sum()), total) for d in range(n_layers)],
    }


def _share(part: float, total: float) -> float | None:
    return part / total if total > 0 else None


def _norms(transcoder: Transcoder, source: int, target: int) -> Tensor:
    """|W_dec,i^{source -> target}| of each feature. [F]"""
    if not transcoder.directions:
        return transcoder.decoder_norms()[source]
    return transcoder.table(source, target).norm(dim=1)


def _written_norms(transcoder: Transcoder, source: int, one: Chosen, x: Tensor) -> dict[int, Tensor]:
    """The norm of what each entry of one source's features writes to each target. x [B, L, D] -> [nnz] for each"""
    pattern, values = one
    targets = transcoder.targets(source)
    if transcoder.directions and transcoder.linear:
        ids, number = pattern.indices.unique(return_inverse=True)
        return {target: values * transcoder.table(source, target, ids).norm(dim=1)[number] for target in targets}
    parts = [
        written(transcoder, one_each(transcoder, source, pattern.indices[at], values[at]), x[pattern.tokens[at]])
        for at in torch.arange(len(values)).split(ENTRIES_AT_ONCE)
    ]
    norms = torch.cat([part.norm(dim=2) for part in parts]) if parts else values.new_zeros(0, x.shape[1])
    return {target: norms[:, target] for target in targets}
