"""Any data set to exact token contexts.

1. Documents are read in a fixed order (`sources.py`), left out by the filter or assigned to training, calibration or
   evaluation by a hash of their own content (`documents.py`), and taken from the members of a mixture by the shares of
   their tokens (`mixture.py`).
2. Within a split, the documents' token ids are joined and the stream is cut into contexts (`packing.py`). Each starts
   with the beginning-of-text token of the BOS policy, put there by hand: tokenizers disagree on when they add it.
3. Progress can be kept in a directory, so that an interrupted call goes on (`unfinished.py`).

The ids that the tokenizer gives are the ids that are stored; nothing is decoded and tokenised again.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data import checks, hub, shortage
from pipeline.data.documents import Split, split_of
from pipeline.data.filling import fill
from pipeline.data.mixture import all_texts, members_of, sources_of, training_texts
from pipeline.data.options import Bos, Content, DatasetKind, DatasetOptions, Separator
from pipeline.data.packing import Cut, Marks, Packed, Stream
from pipeline.data.text import files_of, hash_files
from pipeline.data.unfinished import Unfinished
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "MOST_HELD_OUT", "Packed", "Split", "bos_of", "check", "count", "documents", "fingerprint", "pack", "pack_other",
    "resolved", "sizes", "skipped", "source_identity", "split_of", "texts",
]  # fmt: skip

Json = dict[str, Any]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
MOST_HELD_OUT = 256
"""Contexts of each held-out split when dataset.held_out is null; fewer in a short text."""
CHARACTERS_A_TOKEN = 8
"""What `texts` reckons with: more than tokenizers reach, so that it gives at least the text that n_tokens needs."""


def count(text: str) -> int:
    """A positive count with an optional unit: "400k", "10M", "1.5B", "123". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d{1,2})?)\s*([kmb]?)", text.strip(), re.IGNORECASE | re.ASCII)
    value = Decimal(match[1]) * UNITS[match[2].lower()] if match else Decimal(0)
    if value <= 0 or value != value.to_integral_value():
        raise UserError(f"'{text}' is not a count; write a positive number such as 123, 400k, 10M or 1.5B")
    return int(value)


def skipped(options: DatasetOptions) -> int:
    """Training rows that dataset.skip_tokens leaves out, before they are rounded to contexts. Raises UserError for what
    is no count."""
    return 0 if re.fullmatch(r"\s*0+\s*", options.skip_tokens, re.ASCII) else count(options.skip_tokens)


def check(options: DatasetOptions) -> None:
    """Raises UserError for options that contradict one another, before anything is read."""
    if options.n_tokens != "all":
        count(options.n_tokens)
    skipped(options)
    checks.check(options)


def bos_of(options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token at position 0 of every context by `dataset.bos`, or None where text begins there. Raises UserError for
    a policy that the tokenizer cannot meet."""
    if options.bos is Bos.none:
        return None
    if options.bos is Bos.auto:
        return tokenizer.bos_token_id
    if tokenizer.eos_token_id is None:
        raise UserError("dataset.bos=eos: the tokenizer has no end-of-text token; use dataset.bos=none")
    return int(tokenizer.eos_token_id)


def pack(
    options: DatasetOptions,
    tokenizer: "PreTrainedTokenizerBase",
    bos_token_id: int | None,
    workspace: Path | None = None,
) -> dict[Split, Packed]:
    """All three splits of a data set: exactly `n_tokens` training rows (or all there are) behind those of
    `skip_tokens`, and `held_out` full contexts each for calibration and evaluation. With `workspace`, a directory of
    the caller's, an interrupted call goes on, and a finished one costs nothing a second time. Raises UserError when the
    text ends first, with what it holds and the fix."""
    check(options)
    cut, marks = _layout(options, tokenizer, bos_token_id)
    n_train = None if options.n_tokens == "all" else cut.n_tokens(count(options.n_tokens))
    train = Stream(n_train, skip=cut.n_contexts(skipped(options)) * cut.width)
    streams = {split: train if split is Split.train else _held_out(options, cut) for split in Split}
    unfinished = Unfinished(workspace, _key(options, tokenizer, bos_token_id) if workspace else "", streams)
    fill(options, streams, tokenizer, marks, unfinished)
    rows = {split: cut.n_rows(len(stream.tokens)) for split, stream in streams.items()}
    if any(stream.short or not stream.trim(cut) for stream in streams.values()):
        raise UserError(shortage.too_short(options, rows, unfinished))
    return {split: cut.contexts(stream.tokens) for split, stream in streams.items()}


def pack_other(
    options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase", bos_token_id: int | None, split: Split | None
) -> Packed:
    """`held_out` full contexts of one split, or of all documents (None): evaluation on another text, which needs no
    training rows (`n_tokens` plays no part). Raises UserError when the text ends first, and for `skip_tokens`."""
    check(options)
    if skipped(options):
        raise UserError("dataset.skip_tokens leaves out training text, of which an evaluation takes none; drop it")
    cut, marks = _layout(options, tokenizer, bos_token_id)
    wanted = _held_out(options, cut)
    streams = {part: wanted if split in (part, None) else Stream(0) for part in Split}
    unfinished = Unfinished(None, "", streams)
    fill(options, streams, tokenizer, marks, unfinished)
    if wanted.short or not wanted.trim(cut):
        n = cut.n_rows(len(wanted.tokens)) // (options.context - 1)
        what = f"{n} contexts of {options.context} {split or ''} tokens".replace("  ", " ")
        fix = f"use dataset.held_out={n}" if n else "give more text or a smaller dataset.context"
        found = shortage.nothing(unfinished) or f"the text holds {what}, dataset.held_out={options.held_out}; {fix}"
        raise UserError(f"{shortage.named(options)}: {found}")
    return cut.contexts(wanted.tokens)


def documents(options: DatasetOptions) -> Iterator[str]:
    """Text of all documents after the filter, of every split, in order. Raises UserError as `texts` does."""
    _check_text(options)
    return all_texts(members_of(options))


def texts(options: DatasetOptions) -> Iterator[str]:
    """Text of the training documents after the filter, in order, to train a tokenizer on: all of them, or with a count
    of tokens what they take at most (8 characters a token). Of a chat what was said. Raises UserError at once for
    content=tokens, which has no text, and as `pack` does."""
    _check_text(options)
    n_characters = None if options.n_tokens == "all" else count(options.n_tokens) * CHARACTERS_A_TOKEN
    return training_texts(members_of(options), n_characters)


def sizes(options: DatasetOptions, bos_token_id: int | None) -> dict[Split, tuple[int, int]] | None:
    """(n_contexts, n_rows) of each split, by arithmetic; None for n_tokens=all. Without a number of held-out contexts
    the most that there can be."""
    if options.n_tokens == "all":
        return None
    cut = Cut(options.context, bos_token_id, 0)
    held_out = MOST_HELD_OUT if options.held_out is None else options.held_out
    rows = dict.fromkeys(Split, held_out * (options.context - 1)) | {Split.train: count(options.n_tokens)}
    return {split: (cut.n_contexts(n), n) for split, n in rows.items()}


def resolved(options: DatasetOptions) -> Json:
    """What a cache records about where the text came from, after `pack`: the commit of a hub data set, in a mixture of
    each such member by its name. Empty for others."""
    found = {name: hub.resolved(s) for name, (_, s) in sources_of(options).items() if s.kind is DatasetKind.hub}
    if options.kind is not DatasetKind.mixture:
        return dict(found.get(options.name, {}))
    return {name: commit for name, commit in found.items() if commit}


def source_identity(options: DatasetOptions) -> Json:
    """What identifies the text beyond the options, so that a changed text or generator makes another cache: the hash of
    local files, or of the first generated documents; nothing for hub data sets; of a mixture that of each member."""
    check(options)
    found: dict[str, Json] = {}
    for name, (label, source) in sources_of(options).items():
        found[name] = {}
        if source.kind is DatasetKind.world:
            from pipeline.data import world

            sample = "\0".join(document.text for document in islice(world.documents(options.seed), 256))
            found[name] = {"sha256": hashlib.sha256(sample.encode()).hexdigest()}
        elif source.kind is not DatasetKind.hub:
            assert source.path is not None  # by check
            found[name] = {"sha256": hash_files(files_of(source.path, source.kind, f"{label}.path"))}
    return found if options.kind is DatasetKind.mixture else found[options.name]


def fingerprint(packed: dict[Split, Packed]) -> str:
    """sha256 of the packed tokens of all splits."""
    total = hashlib.sha256()
    for split in Split:
        contexts, n_rows = packed[split]
        total.update(f"{split} {contexts.shape} {n_rows}\n".encode())
        total.update(np.ascontiguousarray(contexts, dtype="<i4").data)
    return total.hexdigest()


def _check_text(options: DatasetOptions) -> None:
    check(options)
    if skipped(options):
        raise UserError("dataset.skip_tokens counts tokens, of which there are none before a tokenizer; drop it")
    for label, source in sources_of(options).values():
        if source.content is Content.tokens:
            raise UserError(f"{label}.content=tokens holds no text for a tokenizer; give text or chats")


def _layout(
    options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase", bos_token_id: int | None
) -> tuple[Cut, Marks]:
    eos = tokenizer.eos_token_id
    if eos is None and options.separator is Separator.eos:
        fix = "use dataset.separator=none, or name the token in tokenizer_config.json"
        raise UserError(f"dataset.separator=eos: the model's tokenizer has no end-of-text token; {fix}")
    begins = (bos_token_id, getattr(tokenizer, "bos_token_id", None))
    leading = frozenset(token for token in begins if token is not None)
    separator = eos if options.separator is Separator.eos else None
    return Cut(options.context, bos_token_id, 0 if eos is None else eos), Marks(separator, leading)


def _held_out(options: DatasetOptions, cut: Cut) -> Stream:
    contexts = MOST_HELD_OUT if options.held_out is None else options.held_out
    return Stream(cut.n_tokens(contexts * (options.context - 1)), at_most=options.held_out is None)


def _key(options: DatasetOptions, tokenizer: "PreTrainedTokenizerBase", bos_token_id: int | None) -> str:
    """What a directory with unfinished packing belongs to."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    parts: list[Any] = [json.dumps(asdict(options), sort_keys=True, default=str), bos_token_id, tokenizer.eos_token_id]
    parts += [fast.to_str() if fast is not None else type(tokenizer).__name__]
    parts += [getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "chat_template", None)]
    for label, source in sources_of(options).values():
        if source.kind not in (DatasetKind.world, DatasetKind.hub):
            for file in files_of(str(source.path), source.kind, f"{label}.path"):
                about = file.stat()
                parts += [str(file.resolve()), about.st_size, about.st_mtime_ns]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
