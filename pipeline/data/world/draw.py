"""Random choices that keep the exact probability of what was chosen."""

from collections.abc import Sequence
from hashlib import blake2b
from math import log
from typing import TypeVar

T = TypeVar("T")

_LOG = [float("-inf")] + [log(n) for n in range(1, 4096)]
_WORD_BYTES = 64


class Draw:
    """A source of uniform choices, made from 512 hashed bits read as a number in mixed radix.

    The hash of the label is the whole state, so document i needs none of the documents before it. A document uses far
    fewer than 512 bits, so no choice is off uniform by more than 2^-200. `log_prob` is the natural logarithm of the
    probability of all choices so far.
    """

    __slots__ = ("_pool", "log_prob")

    def __init__(self, label: str):
        self._pool = int.from_bytes(blake2b(label.encode(), digest_size=_WORD_BYTES).digest(), "big")
        self.log_prob = 0.0

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        self._pool, choice = divmod(self._pool, n)
        self.log_prob -= _LOG[n]
        return choice

    def one_in(self, n: int) -> bool:
        """True with probability 1 / n."""
        self._pool, choice = divmod(self._pool, n)
        self.log_prob += -_LOG[n] if choice == 0 else _LOG[n - 1] - _LOG[n]
        return choice == 0

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """k different items, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(k)]
