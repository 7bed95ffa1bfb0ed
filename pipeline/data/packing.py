"""Streams of tokens, and the contexts that they are cut into.

A stream is the ids of a split's documents, an end-of-text token after each, cut into contexts of T tokens. Position 0
of a context is never a row: every row has at least one token to its left.

    row t  <->  context t // (T-1), position 1 + t % (T-1)
"""

from array import array
from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    contexts: np.ndarray
    """int32 [n_contexts, T]. Position 0 is the beginning-of-text token, or an ordinary one where there is none. The
    tail of the last context may be padding (the end-of-text token)."""
    n_rows: int
    """Tokens at positions >= 1 that are not padding."""


class Cut(NamedTuple):
    """How a stream of tokens is laid out in contexts."""

    context: int
    bos_token_id: int | None
    padding: int

    @property
    def width(self) -> int:
        """Tokens of the stream in a context."""
        return self.context - (self.bos_token_id is not None)

    def n_rows(self, n_tokens: int) -> int:
        """Rows that `n_tokens` of the stream give: all of them behind a BOS, else all but each context's first."""
        full, rest = divmod(n_tokens, self.width)
        first = self.bos_token_id is None
        return full * (self.width - first) + max(rest - first, 0)

    def n_tokens(self, n_rows: int) -> int:
        """The shortest stream that gives `n_rows` rows: the inverse of n_rows."""
        full, rest = divmod(n_rows, self.context - 1)
        first = self.bos_token_id is None
        return full * self.width + (rest + first if rest else 0)

    def n_contexts(self, n_rows: int) -> int:
        return -(-n_rows // (self.context - 1))

    def contexts(self, tokens: "array[int]") -> Packed:
        n_rows = self.n_rows(len(tokens))
        full, rest = divmod(self.n_tokens(n_rows), self.width)
        contexts = np.full((full + (rest > 0), self.context), self.padding, dtype=np.int32)
        if self.bos_token_id is not None:
            contexts[:, 0] = self.bos_token_id
        stream = np.frombuffer(tokens, dtype=np.int32)
        text = contexts[:, self.context - self.width :]
        text[:full] = stream[: full * self.width].reshape(full, self.width)
        if rest:
            text[full, :rest] = stream[full * self.width : full * self.width + rest]
        return Packed(contexts, n_rows)


class Marks(NamedTuple):
    """The tokens that are put in, and those that are taken out for it."""

    separator: int | None
    """Stands after each document; None: nothing does."""
    leading: frozenset[int]
    """Beginning-of-text tokens: one of them is dropped from the start of a document that comes with it."""

    def ids(self, ids: list[int], has_marks: bool) -> list[int]:
        """What a document adds to its stream; nothing for one without tokens. `has_marks`: the document (a chat,
        tokens) may come with its own begin and end."""
        if has_marks and ids and ids[0] in self.leading:
            ids = ids[1:]
        if has_marks and ids == [self.separator]:
            return []
        if not ids or self.separator is None or (has_marks and ids[-1] == self.separator):
            return ids
        return [*ids, self.separator]


class Stream:
    """Tokens of one split, four bytes each, up to `limit` of them (None: no limit), behind the first `skip`, which are
    not kept. With `at_most` fewer will do, as many full contexts as there are."""

    def __init__(self, limit: int | None, at_most: bool = False, skip: int = 0) -> None:
        self.limit = limit
        self.at_most = at_most
        self.skip = skip
        self.skipped = 0
        self.tokens: array[int] = array("i")

    @property
    def n_seen(self) -> int:
        """Tokens that came, kept or not."""
        return self.skipped + len(self.tokens)

    def trim(self, cut: Cut) -> int:
        """Drop what fills no context, where only full ones count. -> rows that are left"""
        n_rows = cut.n_rows(len(self.tokens))
        if self.at_most:
            n_rows -= n_rows % (cut.context - 1)
            del self.tokens[cut.n_tokens(n_rows) :]
        return n_rows

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.tokens) >= self.limit

    @property
    def short(self) -> bool:
        return self.limit is not None and len(self.tokens) < self.limit and not self.at_most

    def add(self, ids: list[int]) -> None:
        n = min(self.skip - self.skipped, len(ids))
        self.skipped += n
        self.tokens.extend(ids[n:])
        if self.limit is not None:
            del self.tokens[self.limit :]
