"""Documents to token contexts.

1. Documents are read in a fixed order and each falls to training, calibration or evaluation by a hash of its own text:
   the same text is held out whatever the file, the order and the seed.
2. Within a split, the documents' token ids are joined, an end-of-text token after each, and the stream is cut into
   contexts of T tokens. Each starts with the beginning-of-text token, put there by hand: tokenizers disagree on when
   they add it. A model without such a token has T tokens of text in a context instead.
3. Position 0 of a context is never a row: every row has at least one token to its left.

       row t  <->  context t // (T-1), position 1 + t % (T-1)

The ids that the tokenizer gives are the ids that are stored; nothing is decoded and tokenised again.
"""

import hashlib
import re
from array import array
from collections.abc import Iterator
from decimal import Decimal
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.data.options import DatasetKind, DatasetOptions, SplitBy
from pipeline.data.text import hash_files, read_text, text_files
from pipeline.errors import UserError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
BATCH_DOCUMENTS = 1024
"""Documents tokenised in one call; no effect on the result."""
BATCH_CHARACTERS = 2**20
MOST_HELD_OUT = 256
"""Contexts of each held-out split when dataset.held_out is null; fewer in a short text."""


class Split(StrEnum):
    train = "train"
    calibration = "calibration"
    evaluation = "evaluation"


class Packed(NamedTuple):
    contexts: np.ndarray
    """int32 [n_contexts, T]. Position 0 is the beginning-of-text token, or an ordinary one where the model has none.
    The tail of the last context may be padding (the end-of-text token)."""
    n_rows: int
    """Tokens at positions >= 1 that are not padding."""


def count(text: str) -> int:
    """A positive count with an optional unit: "400k", "10M", "1.5B", "123". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)\s*([kmb]?)", text.strip(), re.IGNORECASE | re.ASCII)
    value = Decimal(match[1]) * UNITS[match[2].lower()] if match else Decimal(0)
    if value <= 0 or value != value.to_integral_value():
        raise UserError(f"'{text}' is not a count; write a positive number such as 123, 400k, 10M or 1.5B")
    return int(value)


def split_of(text: str) -> Split:
    """Where a document belongs: 5 % calibration, 5 % evaluation, 90 % training, by a hash of its text without the
    white space around it."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    part = int.from_bytes(digest, "little") % 20
    return (Split.calibration, Split.evaluation)[part] if part < 2 else Split.train


def check(options: DatasetOptions) -> None:
    """Raises UserError for options that contradict one another, before anything is read."""
    if options.n_tokens != "all":
        count(options.n_tokens)
    if options.context < 2:
        raise UserError(f"dataset.context={options.context}: a context needs at least 2 tokens")
    if options.held_out is not None and options.held_out < 1:
        raise UserError(f"dataset.held_out={options.held_out}: thresholds and metrics need at least 1 context each")
    if options.kind is DatasetKind.world:
        for field in ("path", "split_by"):
            if getattr(options, field) is not None:
                raise UserError(
                    f"dataset.{field} does not apply to dataset={options.name}; drop it or use dataset=text"
                )
        if options.n_tokens == "all":
            raise UserError("dataset.n_tokens=all needs a text that ends; give a count such as dataset.n_tokens=400k")
    elif options.path is None:
        raise UserError(f"dataset={options.name} needs dataset.path=FILE, a folder of *.txt or a glob")


def documents(options: DatasetOptions) -> Iterator[str]:
    """The documents of a data set, in their fixed order. Generated ones never end. Raises UserError at once for options
    that contradict one another and for files that are not there."""
    check(options)
    if options.kind is DatasetKind.world:
        from pipeline.data import world

        return (document.text for document in world.documents(options.seed))
    assert options.path is not None  # by check
    return read_text(text_files(options.path), options.split_by or SplitBy.paragraph)


def source_identity(options: DatasetOptions) -> dict[str, str]:
    """What identifies the text beyond the options: the hash of the local files, or of the first generated documents, so
    that a changed text or generator makes another cache."""
    if options.kind is DatasetKind.world:
        sample = "\0".join(islice(documents(options), 256))
        return {"sha256": hashlib.sha256(sample.encode()).hexdigest()}
    check(options)
    assert options.path is not None  # by check
    return {"sha256": hash_files(text_files(options.path))}


def pack(
    options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase", bos_token_id: int | None
) -> dict[Split, Packed]:
    """All three splits of a data set: exactly `n_tokens` training rows (or all there are), and `held_out` full contexts
    each for calibration and evaluation. Raises UserError when the text ends first, with what it holds and the fix."""
    source = documents(options)
    cut = _Cut(options.context, bos_token_id, tokenizer.eos_token_id)
    n_train = None if options.n_tokens == "all" else cut.n_tokens(count(options.n_tokens))
    streams = {split: _Stream(n_train) if split is Split.train else _held_out(options, cut) for split in Split}
    _fill(options, streams, source, tokenizer)
    rows = {split: cut.n_rows(len(stream.tokens)) for split, stream in streams.items()}
    if any(stream.short or not stream.trim(cut) for stream in streams.values()):
        raise UserError(_too_short(options, rows))
    return {split: cut.contexts(stream.tokens) for split, stream in streams.items()}


def pack_other(
    options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase", bos_token_id: int | None, split: Split | None
) -> Packed:
    """`held_out` full contexts of one split, or of all documents (None): evaluation on another text, which needs no
    training rows (`n_tokens` plays no part). Raises UserError when the text ends first."""
    source = documents(options)
    cut = _Cut(options.context, bos_token_id, tokenizer.eos_token_id)
    wanted = _held_out(options, cut)
    streams = {part: wanted if split in (part, None) else _Stream(0) for part in Split}
    _fill(options, streams, source, tokenizer)
    if wanted.short or not wanted.trim(cut):
        n = cut.n_rows(len(wanted.tokens)) // (options.context - 1)
        what = f"{n} contexts of {options.context} {split or ''} tokens".replace("  ", " ")
        fix = f"use dataset.held_out={n}" if n else "give more text or a smaller dataset.context"
        raise UserError(
            f"dataset.path={options.path}: the text holds {what}, dataset.held_out={options.held_out}; {fix}"
        )
    return cut.contexts(wanted.tokens)


def fingerprint(packed: dict[Split, Packed]) -> str:
    """sha256 of the packed tokens of all splits."""
    total = hashlib.sha256()
    for split in Split:
        contexts, n_rows = packed[split]
        total.update(f"{split} {contexts.shape} {n_rows}\n".encode())
        total.update(np.ascontiguousarray(contexts, dtype="<i4").data)
    return total.hexdigest()


class _Cut(NamedTuple):
    """How a stream of tokens is laid out in contexts."""

    context: int
    bos_token_id: int | None
    eos_token_id: int

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

    def contexts(self, tokens: "array[int]") -> Packed:
        n_rows = self.n_rows(len(tokens))
        full, rest = divmod(self.n_tokens(n_rows), self.width)
        contexts = np.full((full + (rest > 0), self.context), self.eos_token_id, dtype=np.int32)
        if self.bos_token_id is not None:
            contexts[:, 0] = self.bos_token_id
        stream = np.frombuffer(tokens, dtype=np.int32)
        text = contexts[:, self.context - self.width :]
        text[:full] = stream[: full * self.width].reshape(full, self.width)
        if rest:
            text[full, :rest] = stream[full * self.width : full * self.width + rest]
        return Packed(contexts, n_rows)


class _Stream:
    """Tokens of one split, four bytes each, up to `limit` of them (None: no limit). With `at_most` fewer will do, as
    many full contexts as there are."""

    def __init__(self, limit: int | None, at_most: bool = False) -> None:
        self.limit = limit
        self.at_most = at_most
        self.tokens: array[int] = array("i")

    def trim(self, cut: _Cut) -> int:
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

    def add(self, ids: list[int], eos_token_id: int) -> None:
        self.tokens.extend(ids)
        self.tokens.append(eos_token_id)
        if self.limit is not None:
            del self.tokens[self.limit :]


def _fill(
    options: DatasetOptions,
    streams: dict[Split, _Stream],
    source: Iterator[str],
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Reads until every stream is full or the documents end. What is already full is not tokenised."""
    distinct = set(streams.values())
    limits = [stream.limit for stream in distinct if stream.limit is not None]
    by_tokens = len(limits) == len(distinct)
    total = sum(limits) if by_tokens else _n_bytes(options)
    with Progress(total, unit="tok" if by_tokens else "B", desc="tokens") as progress:
        for batch in _batches(source):
            wanted = [(stream, text) for text in batch if text.strip() and not (stream := streams[split_of(text)]).full]
            n_before = sum(len(stream.tokens) for stream in distinct)
            if wanted:
                encoded = tokenizer([text for _, text in wanted], add_special_tokens=False, verbose=False)["input_ids"]
                for (stream, _), ids in zip(wanted, encoded, strict=True):
                    if ids:
                        stream.add(ids, tokenizer.eos_token_id)
            done = sum(len(stream.tokens) for stream in distinct) - n_before if by_tokens else sum(map(len, batch))
            progress.update(min(done, total - progress.done))
            if all(stream.full for stream in distinct):
                return
        if not by_tokens:  # separators are no part of documents, and a character may take more than a byte
            progress.update(total - progress.done)


def _n_bytes(options: DatasetOptions) -> int:
    assert options.path is not None  # only a text can be read to its end
    return sum(file.stat().st_size for file in text_files(options.path))


def _batches(source: Iterator[str]) -> Iterator[list[str]]:
    """Documents in groups that are worth a call of the tokenizer."""
    batch: list[str] = []
    n_characters = 0
    for text in source:
        batch.append(text)
        n_characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    yield batch


def _held_out(options: DatasetOptions, cut: _Cut) -> _Stream:
    contexts = MOST_HELD_OUT if options.held_out is None else options.held_out
    return _Stream(cut.n_tokens(contexts * (options.context - 1)), at_most=options.held_out is None)


def _too_short(options: DatasetOptions, rows: dict[Split, int]) -> str:
    held_out = {split: rows[split] // (options.context - 1) for split in (Split.calibration, Split.evaluation)}
    found = f"{rows[Split.train]} training rows, " + " and ".join(
        f"{n} {split} contexts" for split, n in held_out.items()
    )
    fixes = []
    if rows[Split.train] and options.n_tokens != "all" and rows[Split.train] < count(options.n_tokens):
        fixes.append("dataset.n_tokens=all")
    smallest = min(held_out.values())
    if options.held_out is not None and 0 < smallest < options.held_out:
        fixes.append(f"dataset.held_out={smallest}")
    fix = "use " + " ".join(fixes) if fixes and smallest else "give more text"
    if not smallest:
        fix += ", a smaller dataset.context or shorter documents (dataset.split_by=line)"
    asked = f"dataset.n_tokens={options.n_tokens} dataset.held_out={options.held_out}"
    found = f"{found} of {options.context} tokens"
    return f"dataset.path={options.path}: the text ends after {found}; asked for {asked}; {fix}"
