"""A transcoder whose features lie on several ranks, used as if it were in one piece.

Each rank holds its rows (`train/artifact.read` of a shard) and a `Joined` around them. All ranks ask theirs for the
same things in the same order, about the same tokens, and each has the whole answer:

    reconstructions    each rank decodes those of the features that it holds; one sum, of v B D bytes a layer, v those
                       of a number. b_dec and W_skip are added by feature rank 0 alone
    features           each rank chooses among its own, where a rule compares them with the others' (`dist/select.py`).
                       `layer_features` leaves it at that, since they are only decoded again; `activate` and
                       `all_features` gather them, 8 + v bytes for each that is active
    [S, F] numbers     thresholds, b_enc, decoder norms: of all features

The rows themselves, W_enc and W_dec, never move. What needs all of them at once is not here, so that it fails and does
not take the rows of one rank for all. Without a gradient.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from pipeline.arch.base import Encoded, Transcoder
from pipeline.core.activations import Activation, FixedThreshold
from pipeline.core.pattern import from_positions
from pipeline.core.sparse import Chosen, Features, Pattern, Sparse, from_pairs, of_layer
from pipeline.dist.sharded import Ranks


def own(transcoder: Transcoder) -> tuple[Transcoder, Callable[[Tensor], Tensor]]:
    """The features of a transcoder that are on this rank, and what makes the sum over all features of a sum over
    those. Of one in one piece: itself, and the identity."""
    return (transcoder.part, transcoder.total) if isinstance(transcoder, Joined) else (transcoder, lambda sums: sums)


class Joined(Transcoder):
    """`part`: the transcoder with the features that are here, in its place for good. Features have the numbers that
    they have among all."""

    at: Tensor
    """int64 [F]: where each feature is in the part, -1 elsewhere."""
    ids: Tensor
    """int64 [n]: the numbers of the features that are here."""

    def __init__(self, part: Transcoder, ranks: Ranks) -> None:
        """part: with fixed thresholds, on the device where it stays; b_dec and W_skip whole, and left to one rank."""
        nn.Module.__init__(self)  # the weights are the part's
        self.part, self.ranks = part, ranks
        self.options, self.dims, self.d_features = ranks.whole.options, part.dims, ranks.whole.d_features
        self.causal, self.linear, self.directions = part.causal, part.linear, part.directions
        device, ids = part.b_enc.device, ranks.shard.ids()
        at = torch.full((self.d_features,), -1).index_copy_(0, ids, torch.arange(len(ids)))
        self.register_buffer("at", at.to(device), persistent=False)
        self.register_buffer("ids", ids.to(device), persistent=False)
        self.b_dec = nn.Parameter(part.b_dec.detach().clone(), requires_grad=False)
        ranks.bare(part)
        self.b_enc = nn.Parameter(self._whole(part.b_enc.detach()), requires_grad=False)
        assert isinstance(part.activation, FixedThreshold)
        self.activation = FixedThreshold(self._whole(part.activation.threshold))
        self.train(part.training)

    @property
    def n_sources(self) -> int:
        return self.part.n_sources

    def under(self, rule: Activation) -> Self:
        """The same weights under a rule for the features of the part, who knows of those elsewhere."""
        other = super().under(rule)
        other._modules = other._modules | {"part": self.part.under(rule)}
        return other

    def targets(self, layer: int) -> range:
        return self.part.targets(layer)

    def reads(self, source: int) -> range:
        return self.part.reads(source)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.part.inputs(x)

    def total(self, sums: Tensor) -> Tensor:
        """The sum over the feature ranks, on the CPU or the ranks' device."""
        features = self.ranks.mesh.features
        return features.sum(sums.to(features.device, copy=True).contiguous(), "sums").to(sums.device)

    def pre_acts_of(self, x: Tensor, source: int, ids: Tensor) -> Tensor:
        at = self.at[ids]
        here = (at >= 0).nonzero().squeeze(1)
        found = x.new_zeros(len(x), len(ids))
        found[:, here] = self.part.pre_acts_of(x, source, at[here])
        return self.total(found)

    def layer_features(self, x: Tensor, layer: int) -> tuple[Pattern, Tensor]:
        """Those that are here."""
        pattern, values = self.part.layer_features(x, layer)
        return Pattern(self.ids[pattern.indices], pattern.offsets, self.d_features), values

    def all_features(self, x: Tensor) -> Sparse:
        return self._of_all(self.part.all_features(x))

    def activate(self, x: Tensor, need_pre_acts: bool) -> Encoded:
        """In sparse form always. Rules that look at other tokens look at those of `x` alone."""
        assert not need_pre_acts, "pre-activations of all features are nowhere"
        if not self.part.activation.chooses:
            return Encoded(None, self.all_features(x))
        with self.part.activation.peers.same_tokens():
            return Encoded(None, self._of_all(self.part.choose(x)))

    def decode(self, features: Features, x: Tensor) -> Tensor:
        return self._sum(self.part.decode(self._here(features), x))

    def decode_layer(self, features: Sparse, layer: int, x: Tensor) -> Tensor:
        return self._sum(self.part.decode_layer(self._here(features), layer, x))

    def written(self, features: Features) -> Tensor:
        return self._sum(self.part.written(self._here(features)))

    @torch.no_grad()
    def decoder_norms(self) -> Tensor:
        return self._whole(self.part.decoder_norms())

    def _sum(self, y_hat: Tensor) -> Tensor:
        return self.ranks.summed([y_hat], "reconstruction")[0]

    def _whole(self, rows: Tensor) -> Tensor:
        """A number of each feature, of all features. [S, n] -> [S, F]"""
        return self.total(rows.new_zeros(len(rows), self.d_features).index_copy_(1, self.ids, rows))

    def _of_all(self, features: Sparse) -> Sparse:
        """The features of every rank, from those of the part; ascending, as in one process."""
        found = [_chosen(features, source) for source in range(self.n_sources)]
        n_tokens = found[0].pattern.n_tokens
        size = n_tokens * self.d_features
        place = torch.cat(
            [i * size + p.tokens * self.d_features + self.ids[p.indices] for i, (p, _) in enumerate(found)]
        )
        values = torch.cat([values for _, values in found])
        # One tensor of int32 words for both, so that it is one gather.
        said = torch.cat([place[:, None].view(torch.int32), values[:, None].view(torch.int32)], dim=1)
        heard = torch.cat(self.ranks.mesh.features.gather_ragged(said, "features"))
        places, order = heard[:, :2].contiguous().view(torch.int64).squeeze(1).sort()
        every = heard[:, 2:].contiguous().view(values.dtype).squeeze(1)[order]
        edges = torch.searchsorted(places, size * torch.arange(self.n_sources + 1, device=places.device)).tolist()
        patterns = [
            from_positions(places[a:b] - i * size, torch.Size((n_tokens, self.d_features)))
            for i, (a, b) in enumerate(pairwise(edges))
        ]
        return Sparse(patterns, [every[a:b] for a, b in pairwise(edges)])

    def _here(self, features: Features) -> Sparse:
        """Those of the features of all ranks that this one has."""
        assert isinstance(features, Sparse)
        found = []
        for source in range(len(features.values)):
            pattern, values = _chosen(features, source)
            at = self.at[pattern.indices]
            here = (at >= 0).nonzero().squeeze(1)
            found.append((from_pairs(pattern.tokens[here], at[here], pattern.n_tokens, len(self.ids)), values[here]))
        return Sparse([pattern for pattern, _ in found], [values for _, values in found])


def _chosen(features: Sparse, source: int) -> Chosen:
    one = of_layer(features, source)
    assert isinstance(one, Chosen)
    return one
