"""Those whom features and tokens compete with when a rule chooses among them: the others of the same tensor.

Where a transcoder's features or a batch's tokens lie on several processes, the rules are handed other peers, which know
of those elsewhere too. Here they are the identity: who is alone has in hand all that there is to choose among.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from pipeline.core import products


class Found(NamedTuple):
    """Of a layer the k largest of each token, or as many as there are here, in some order."""

    compared: Tensor
    """What they are compared by. [B, k]"""
    indices: Tensor
    """Which features they are. int64 [B, k]"""
    values: Tensor
    """The features themselves, 0 where `compared` is not above 0. [B, k]"""


class Row(NamedTuple):
    """Pairs of token and feature that all compete with each other: those of a layer, or of all layers."""

    compared: Tensor
    """[B, ..., F]"""
    values: Tensor
    """The features themselves. [B, ..., F]"""


class Largest(NamedTuple):
    """What is chosen of a row."""

    positions: Tensor
    """Where, in the row laid flat, ascending. int64 [n]"""
    values: Tensor
    """The features there. [n]"""
    smallest: Tensor | None
    """The smallest of what was compared among the chosen, wherever they are. []; None where nothing is above 0."""
    guess: float
    """Where a search of the next such row does well to begin (`products.largest`); 0 if nothing is known."""


class Peers:
    """Nobody else. What others answer is what one process would, that held all features and tokens."""

    def whole(self, d_features: int) -> int:
        """Features of a layer, wherever they are, of which so many are here."""
        return d_features

    def best(self, layers: Iterable[Found], k: Sequence[int]) -> Iterator[tuple[Found, Tensor | None]]:
        """Of each layer what is found, and which of it is among the k largest of its token and above 0: bool [B, k], or
        None where all may stay and what is not above 0 has the value 0. Ties go to the lowest feature."""
        for found in layers:
            yield found, None

    def largest(self, rows: Iterable[Row], k: Sequence[int], guesses: Iterable[float]) -> Iterator[Largest]:
        """Of each row the k B largest above 0, B the tokens of the batch; ties go to the lowest (token, [layer,]
        feature)."""
        for row, n, guess in zip(rows, k, guesses, strict=True):
            flat = row.compared.reshape(-1)
            positions, smallest = products.largest(flat, n * row.compared.shape[0], guess)
            lowest = smallest if positions.numel() else None
            yield Largest(positions, row.values.reshape(-1)[positions], lowest, float(smallest))

    def strongest(self, layers: Iterable[tuple[Tensor, Tensor]], k: int) -> Iterator[Tensor]:
        """Of each layer the activations z >= 0 [B, n] of the features `ids` [n], with all but the k largest of each
        token set to 0. Differentiable in z. layers: (z, ids)"""
        for z, ids in layers:
            if ids.numel() <= k:
                yield z
                continue
            values, indices = z.topk(k, dim=1)
            yield z.new_zeros(z.shape).scatter(1, indices, values)

    @contextmanager
    def same_tokens(self) -> Iterator[None]:
        """Within it everyone looks at the same tokens, so that no tokens elsewhere compete with those here."""
        yield


ALONE = Peers()
