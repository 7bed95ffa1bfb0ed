"""Documents of a data set in the order in which they are packed, tokenised a group at a time.

A data set has one member, or those of a mixture. Weights are shares of the training tokens, and nothing is random: the
next document comes from the member that is furthest behind its share, that is, with the fewest training tokens for its
weight (ties: the first by name). So each share is exact to within a document at every point. Where the next document
would come from a member that has ended, the data set ends.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data import hub
from pipeline.data.documents import Contents, Document, Skipped, Source, Split
from pipeline.data.options import DatasetKind, DatasetOptions
from pipeline.data.sources import reader_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 1024
"""Documents tokenised in one call; no effect on the result."""
BATCH_CHARACTERS = 2**20

Json = dict[str, Any]


class Encoded(NamedTuple):
    document: Document
    ids: list[int] | None
    """None when nobody wanted the tokens of this split."""


class Member:
    """One source and how far its documents were taken. `state()` tells that, and a member made with it goes on."""

    def __init__(self, name: str, source: Source, label: str, seed: int, weight: float, state: Json | None) -> None:
        self.name, self.source, self.weight = name, source, weight
        self.contents = Contents(source, label)
        self.reader = reader_of(source, label, seed, state["reader"] if state else None)
        self.n_tokens: int = state["n_tokens"] if state else 0
        """Of training, which the shares are about."""
        self.counts = Counter(state["counts"] if state else {})
        """Documents that were taken: packed, and by Skipped."""
        self.n_units: int = state["n_units"] if state else 0
        """How far the reader came, in its units."""
        self._batches = self.reader.batches()
        self._state = state and {key: state[key] for key in ("reader", "n_records", "n_units")}
        """Where the batch began."""
        self._skip: int = state["taken"] if state else 0
        """Documents from there on that were taken before."""
        self._n_records: int = state["n_records"] if state else 0
        self._batch: list[Document | Skipped] = []
        self._taken = self._tokenised = 0
        self._ids: dict[int, list[int]] = {}

    def state(self) -> Json:
        """Plain values, for a file."""
        began = self._state or self._here()
        taken = {"taken": self._taken + self._skip, "n_tokens": self.n_tokens, "counts": dict(self.counts)}
        commit = hub.resolved(self.source).get("revision") if self.source.kind is DatasetKind.hub else None
        return began | taken | {"commit": commit}

    def begin(self) -> bool:
        """Have a document that was not taken yet, if there is one."""
        while self._taken == len(self._batch):
            if self._batch or self._state is None:
                self._state = self._here()
            batch = next(self._batches, None)
            self._batch = []
            self._taken = self._tokenised = 0
            if batch is None:
                return False
            for number, record in enumerate(batch.records, self._n_records + 1):
                self._batch += self.contents.documents(record, number)
            self._n_records += len(batch.records)
            self.n_units += batch.n_units
            self._taken = self._tokenised = min(self._skip, len(self._batch))
            self._skip -= self._taken
            self._ids.clear()
        return True

    def next(self, tokenizer: "PreTrainedTokenizerBase", is_wanted: Callable[[Split], bool]) -> Encoded | None:
        """The next document that is packed; None at the end. Tokenises a group ahead."""
        document = self.next_document()
        if document is None:
            return None
        place = self._taken - 1
        if place >= self._tokenised:
            self._tokenise(place, tokenizer, is_wanted)
        return Encoded(document, self._ids.pop(place, None))

    def next_document(self) -> Document | None:
        """The same without its tokens."""
        while self.begin():
            found = self._batch[self._taken]
            self._taken += 1
            if isinstance(found, Document):
                self.counts["packed"] += 1
                return found
            self.counts[found.value] += 1
        return None

    def _here(self) -> Json:
        return {"reader": self.reader.state(), "n_records": self._n_records, "n_units": self.n_units}

    def _tokenise(self, start: int, tokenizer: "PreTrainedTokenizerBase", is_wanted: Callable[[Split], bool]) -> None:
        group: list[tuple[int, Document]] = []
        n_characters, end = 0, start
        while end < len(self._batch) and len(group) < BATCH_DOCUMENTS and n_characters < BATCH_CHARACTERS:
            found = self._batch[end]
            if isinstance(found, Document) and is_wanted(found.split):
                group.append((end, found))
                n_characters += found.n_characters
            end += 1
        self._tokenised = end
        ids = self.contents.encode([document for _, document in group], tokenizer)
        self._ids |= {place: ids for (place, _), ids in zip(group, ids, strict=True)}


def sources_of(options: DatasetOptions) -> dict[str, tuple[str, Source]]:
    """name -> (what its options are called, its options) of each member, by name. A data set that is no mixture is its
    own member."""
    if options.kind is not DatasetKind.mixture:
        return {options.name: ("dataset", options)}
    return {name: (f"dataset.sources.{name}", source) for name, source in sorted(options.sources.items())}


def members_of(options: DatasetOptions, states: dict[str, Json] | None = None) -> list[Member]:
    """Sorted by name. Raises UserError for files that are not there and for what the hub does not give."""
    return [
        Member(name, source, label, options.seed, getattr(source, "weight", 1.0), (states or {}).get(name))
        for name, (label, source) in sources_of(options).items()
    ]


def furthest_behind(members: list[Member]) -> Member:
    """The member that the next document comes from."""
    return min(members, key=lambda member: member.n_tokens / member.weight)  # the first by name, since they are sorted


def training_texts(members: list[Member], n_characters: int | None) -> Iterator[str]:
    """Texts of the training documents, shares of a mixture by characters, until `n_characters` of them were given."""
    done = 0
    while n_characters is None or done < n_characters:
        member = furthest_behind(members)
        document = member.next_document()
        if document is None:
            return
        if document.split is Split.train:
            text = member.contents.raw_text(document)
            member.n_tokens += len(text)
            done += len(text)
            yield text


def all_texts(members: list[Member]) -> Iterator[str]:
    """Texts of all documents; of a mixture one member after the other."""
    for member in members:
        while (document := member.next_document()) is not None:
            yield member.contents.raw_text(document)
