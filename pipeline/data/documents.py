"""Records to documents, and documents to token ids.

A record is one line of a file or one row of a table. Its content is a text, a chat (messages) or token ids; a text may
be split further, into lines or paragraphs. What is empty and what the filter leaves out is counted and not packed.

Each document falls to training, calibration or evaluation by a hash of its own content: of the text, of the messages as
JSON, or of the ids. So the same document is held out whatever its container, the order, the seed and the model.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data.options import Content, DatasetKind, DatasetOptions, MemberOptions, SplitBy
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = DatasetOptions | MemberOptions

COLUMNS = {Content.text: "text", Content.chat: "messages", Content.tokens: "input_ids"}
"""Where the content is in a record when `column` is null."""


class Split(StrEnum):
    train = "train"
    calibration = "calibration"
    evaluation = "evaluation"


class Skipped(StrEnum):
    """Why a document is not packed."""

    empty = "empty"
    filtered = "filtered"


class Document(NamedTuple):
    content: Any
    """str, list of messages, or list of ids."""
    split: Split
    n_characters: int
    """Of the text; of ids, how many they are."""
    record: int
    """Number of its record, from 1."""


def split_of(text: str) -> Split:
    """Where a document belongs: 5 % calibration, 5 % evaluation, 90 % training, by a hash of its text without the
    white space around it."""
    digest = hashlib.blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=8).digest()
    part = int.from_bytes(digest, "little") % 20
    return (Split.calibration, Split.evaluation)[part] if part < 2 else Split.train


def column_of(source: Source) -> str:
    """Where the content is in a record."""
    return source.column or COLUMNS[source.content]


class Contents:
    """What the documents of one source are. `label` begins the messages of its UserErrors: dataset, or
    dataset.sources.NAME."""

    def __init__(self, source: Source, label: str) -> None:
        self.content, self.column, self.filter = source.content, column_of(source), source.filter
        self.split_by = None if source.kind is DatasetKind.text else source.split_by  # the reader splits text files
        self._where = f"{label}: record %d of {source.path}"
        self._keep, self._drop = (
            re.compile(rule) if rule else None for rule in (source.filter.keep, source.filter.drop)
        )

    def documents(self, record: dict[str, Any], number: int) -> list[Document | Skipped]:
        """The documents of a record, in order. Raises UserError for content of the wrong type."""
        where = self.filter.where
        if where and any(record.get(column) != value for column, value in where.items()):
            return [Skipped.filtered]
        content = record[self.column]
        if content is None:
            return [Skipped.empty]
        if self.content is Content.text:
            return [self._text(text, number) for text in self._split(content, number)]
        if self.content is Content.chat:
            return [self._chat(content, number)]
        return [self._ids(content, number)]

    def encode(self, documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
        """Token ids as the tokenizer gives them, without tokens that it would add to a text by itself. Raises
        UserError for a chat that the tokenizer has no template for, or whose template refuses it."""
        contents = [document.content for document in documents]
        if self.content is Content.tokens or not contents:
            return contents
        if self.content is Content.chat:
            contents = self._laid_out(list(documents), tokenizer)
        ids: list[list[int]] = tokenizer(contents, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def raw_text(self, document: Document) -> str:
        """A text as it is; of a chat what was said, a message a line."""
        return document.content if self.content is Content.text else _said(document.content)

    def _split(self, text: Any, number: int) -> list[str]:
        if not isinstance(text, str):
            what = f"column '{self.column}' holds {type(text).__name__}, not text"
            raise UserError(f"{self._where % number}: {what}; name another by column=, or say what it is by content=")
        if self.split_by in (None, SplitBy.document):
            return [text]
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        parts = text.split("\n" if self.split_by is SplitBy.line else "\n\n")
        return [part.strip("\n") for part in parts]

    def _text(self, text: str, number: int) -> Document | Skipped:
        if not text.strip():
            return Skipped.empty
        return Document(text, split_of(text), len(text), number) if self._passes(text) else Skipped.filtered

    def _chat(self, messages: Any, number: int) -> Document | Skipped:
        if not isinstance(messages, list):
            what = f"column '{self.column}' holds {type(messages).__name__}, not a list of messages"
            raise UserError(f"{self._where % number}: {what}; name another by column=")
        # Tables write null where a message lacks a field that another one has; lines of JSON leave it out.
        messages = [_without_nulls(message) for message in messages]
        for message in messages:
            given = message.keys() if isinstance(message, dict) else ()
            if not {"role", "content"} <= set(given) or not isinstance(message["role"], str):
                needs = "every message needs a role and a content"
                found = ", ".join(given) or type(message).__name__
                raise UserError(f"{self._where % number}: {needs}, found {found}; mend or drop the record")
        if not messages:
            return Skipped.empty
        canonical = json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        said = _said(messages)
        return Document(messages, split_of(canonical), len(said), number) if self._passes(said) else Skipped.filtered

    def _ids(self, ids: Any, number: int) -> Document | Skipped:
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            what = f"column '{self.column}' is no list of token ids (whole numbers from 0)"
            raise UserError(f"{self._where % number}: {what}; name another by column=")
        return Document(ids, split_of(" ".join(map(str, ids))), len(ids), number) if ids else Skipped.empty

    def _passes(self, text: str) -> bool:
        fewest, most = self.filter.min_characters, self.filter.max_characters
        return (
            (fewest is None or len(text) >= fewest)
            and (most is None or len(text) <= most)
            and (self._keep is None or self._keep.search(text) is not None)
            and (self._drop is None or self._drop.search(text) is None)
        )

    def _laid_out(self, documents: list[Document], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        from jinja2.exceptions import TemplateError

        if not getattr(tokenizer, "chat_template", None):
            fix = "use the instruction-tuned version of the model, or content=text"
            raise UserError(f"content=chat: the model's tokenizer has no chat template; {fix}")
        texts = []
        for document in documents:
            try:
                texts.append(str(tokenizer.apply_chat_template(document.content, tokenize=False)))
            except TemplateError as error:
                what = f"the model's chat template refuses it ({error})"
                raise UserError(f"{self._where % document.record}: {what}; mend or drop the record") from error
        return texts


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(child) for key, child in value.items() if child is not None}
    return [_without_nulls(child) for child in value] if isinstance(value, list) else value


def _said(messages: list[dict[str, Any]]) -> str:
    return "\n".join(m["content"] if isinstance(m["content"], str) else json.dumps(m["content"]) for m in messages)
