"""What every activation rule is: from pre-activations to features, over all layers."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from pipeline.core.options import ActivationOptions
from pipeline.core.peers import ALONE, Peers
from pipeline.core.sparse import Pattern


class Activation(nn.Module):
    """An activation rule over all layers. `peers` are those whom its features and tokens compete with.

    `norms` [L, F], which the rules that rank by them are handed, are the decoder norms |W_dec,i|, without gradient.
    """

    chooses = False
    """Whether the rule chooses a few pairs, so that the sparse path applies."""

    per_token = True
    """Whether a token's features depend on that token's layer alone, so that the rule can run live in a model."""

    compares_layers = False
    """Whether `choose` holds the pre-activations of all layers at once."""

    by_norm = False
    """Whether the rule reads the decoder norms."""

    def __init__(self, options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> None:
        super().__init__()
        self.name, self.n_layers, self.d_features = options.name, n_layers, d_features
        self.peers = peers

    def forward(self, pre_acts: Tensor, norms: Tensor | None = None) -> Tensor:
        """[B, L, F] -> features [B, L, F]"""
        return torch.stack([self.layer(h, i, norms) for i, h in enumerate(pre_acts.unbind(1))], dim=1)

    def layer(self, pre_acts: Tensor, layer: int, norms: Tensor | None = None) -> Tensor:
        """One layer's features, for the rules whose layers are independent. [B, F] -> [B, F]"""
        raise NotImplementedError

    def choose(self, pre_acts: Iterable[Tensor], norms: Tensor | None = None) -> Iterator[tuple[Pattern, Tensor]]:
        """For each layer's pre-activations [B, F], which it may overwrite: the chosen pairs and their features [nnz].

        Layers are taken one at a time where the rule allows it, so that no more than one need be in memory.
        """
        raise NotImplementedError

    def at(self, done: float) -> None:
        """Tell the rule what share of the run lies behind it. A rule that is told nothing is at the end of its run."""
