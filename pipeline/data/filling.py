"""Filling the streams of the splits with the documents of a data set."""

import logging
from typing import TYPE_CHECKING

from pipeline.data import hub
from pipeline.data.documents import Split
from pipeline.data.mixture import Member, furthest_behind, members_of, sources_of
from pipeline.data.options import Content, DatasetOptions
from pipeline.data.packing import Marks, Stream
from pipeline.data.unfinished import Unfinished
from pipeline.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def fill(
    options: DatasetOptions,
    streams: dict[Split, Stream],
    tokenizer: "PreTrainedTokenizerBase",
    marks: Marks,
    unfinished: Unfinished,
) -> None:
    """Reads until every stream is full or the data set ends. What is already full is not tokenised, but for training
    documents of a mixture, since its shares are about them."""
    for name, state in (unfinished.members or {}).items():
        if state["commit"]:
            hub.remember(sources_of(options)[name][1], state["commit"])
    if unfinished.complete:
        return
    members = members_of(options, unfinished.members)
    mixed = len(members) > 1
    distinct = list({id(stream): stream for stream in streams.values()}.values())
    ended = ""

    def is_wanted(split: Split) -> bool:
        return not streams[split].full or (mixed and split is Split.train)

    bar = Bar(distinct, members)
    for member in members:  # what cannot be read at all is said before there is a bar
        member.begin()
    with bar:
        done = all(stream.full for stream in distinct)
        while not done:
            member = furthest_behind(members) if mixed else members[0]
            found = member.next(tokenizer, is_wanted)
            if found is None:
                ended = member.name
                bar.end()
                break
            split, stream = found.document.split, streams[found.document.split]
            if found.ids is not None:
                ids = marks.ids(found.ids, member.contents.content is not Content.text)
                stream.add(ids)
                if split is Split.train:
                    member.n_tokens += len(ids)
                bar.step()
            done = stream.full and all(stream.full for stream in distinct)
            if unfinished.is_due:
                unfinished.save({member.name: member.state() for member in members})
    unfinished.members = {member.name: member.state() for member in members}
    unfinished.save(unfinished.members, complete=True, ended=ended)
    _report(members, streams)


class Bar(Progress):
    """Counts tokens where it is known how many there will be, else what the reader counts."""

    def __init__(self, streams: list[Stream], members: list[Member]) -> None:
        self.streams, self.members = streams, members
        limits = [stream.skip + stream.limit for stream in streams if stream.limit is not None]
        self.by_tokens = len(limits) == len(streams) or len(members) > 1
        reader = members[0].reader
        total = sum(limits) if len(limits) == len(streams) else None if self.by_tokens else reader.total
        super().__init__(total, "tok" if self.by_tokens else reader.unit, "tokens", self._now())

    def _now(self) -> int:
        if self.by_tokens:
            return sum(stream.n_seen for stream in self.streams)
        return self.members[0].n_units

    def step(self) -> None:
        """Show what came since the last time; never more than the total."""
        n = self._now()
        n = n if self.total is None else min(n, self.total)
        if n > self.done:
            self.update(n - self.done)

    def end(self) -> None:
        """Everything was read: separators are no part of documents, and a character may take more than a byte."""
        if not self.by_tokens and self.total is not None:
            self.update(self.total - self.done)


def _report(members: list[Member], streams: dict[Split, Stream]) -> None:
    for member in members:
        read = sum(member.counts.values())
        left = f"{member.counts['filtered']:,} left out by the filter, {member.counts['empty']:,} empty"
        share = f"; {member.n_tokens:,} training tokens, weight {member.weight:g}" if len(members) > 1 else ""
        logger.info("%s: %s documents read, %s%s", member.name, f"{read:,}", left, share)
    sizes = ", ".join(f"{split} {len(stream.tokens):,}" for split, stream in streams.items() if stream.tokens)
    logger.info("tokens: %s", sizes or "none")
