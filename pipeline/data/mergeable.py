"""Which caches can be merged: those of one model and one layout, whose texts do not disturb one another."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.cache import Cache
from pipeline.data.codecs import COMPRESSED
from pipeline.data.layout import STORED, prefix
from pipeline.data.tokens import Split
from pipeline.errors import UserError

HELD_OUT = (Split.calibration, Split.evaluation)
Hashes = dict[Split, NDArray[np.uint64]]
"""Of the distinct contexts of each split, sorted."""


def check(parts: list[Cache], allow_repeats: bool) -> bool:
    """Whether training contexts stand in several of the parts, which is refused unless it is allowed. Raises UserError
    for parts that do not go together."""
    _check_distinct(parts)
    for part in parts[1:]:
        _check_same(parts[0], part)
    _check_storage(parts)
    hashes = [{split: _hashes(part, split) for split in Split} for part in parts]
    _check_held_out(parts, hashes)
    return _check_repeats(parts, hashes, allow_repeats) > 0


def _check_distinct(parts: list[Cache]) -> None:
    if len(parts) < 2:
        raise UserError("one cache is nothing to merge; name two or more")
    keys = [part.key for part in parts]
    for number, part in enumerate(parts):
        if part.key in keys[:number]:
            raise UserError(f"{part.path} is named twice, or is a part of a merged cache that is named; name it once")


def _facts(part: Cache) -> dict[str, Any]:
    """What all parts must have in common."""
    about, model = part.attributes, part.model
    return {
        "weights of the model": model["weights_sha256"],
        "revision of the model": model["revision"],
        "tokenizer": model["tokenizer_sha256"],
        "layers": model["layers"],
        "arithmetic (model.dtype)": model["dtype"],
        "hooks": part.hooks,
        "norm": about["norm"],
        "shape of rows": [part.n_layers, part.d_model],
        "context length (dataset.context)": part.context,
        "token at position 0 (dataset.bos)": about["bos_token_id"],
        "codec (clt cache convert)": str(part.codec),
        "origin of targets (cache.targets)": str(part.targets),
    }


def _check_same(first: Cache, other: Cache) -> None:
    a, b = _facts(first), _facts(other)
    for what, value in a.items():
        if b[what] != value:
            differ = f"{other.path} and {first.path} differ in the {what}: {b[what]} and {value}"
            raise UserError(f"{differ}; merge caches that differ in their text alone")
    mine, theirs = first.norm, other.norm
    if not (mine.gain.equal(theirs.gain) and mine.bias.equal(theirs.bias)):
        raise UserError(f"{other.path} and {first.path} differ in the norm's parameters; merge caches of one model")


def _check_storage(parts: list[Cache]) -> None:
    """Ranges of rows must be readable, and held-out contexts have all their rows."""
    for part in parts:
        if part.codec in COMPRESSED:
            fix = f"convert the parts first: clt cache convert {part.path} codec=raw (or int8)"
            raise UserError(f"{part.path} is stored as {part.codec}, of which no range of rows can be read; {fix}")
        for split in HELD_OUT:
            n_contexts, width = part.specs[f"{split}/tokens"].shape[0], part.context - 1
            if part.specs[f"{split}/{STORED[0]}"].shape[0] != n_contexts * width:
                raise UserError(f"{part.path}: its last {split} context is not full; leave this cache out")


def _check_held_out(parts: list[Cache], hashes: list[Hashes]) -> None:
    """Raises UserError for contexts of a part that another one holds out for something else."""
    used = {Split.train: "trained on", Split.calibration: "held out for calibration"}
    for i, mine in enumerate(hashes):
        for j, theirs in enumerate(hashes):
            for split in (Split.train, Split.calibration) if i != j else ():
                others = [other for other in HELD_OUT if other is not split]
                n = sum(len(np.intersect1d(mine[split], theirs[o], assume_unique=True)) for o in others)
                if n:
                    what = f"{n:,} contexts that {parts[j].path} holds out are {used[split]} in {parts[i].path}"
                    raise UserError(f"{what}; metrics would be of text that was seen. Leave one of the two out")


def _check_repeats(parts: list[Cache], hashes: list[Hashes], allow: bool) -> int:
    """-> how many distinct training contexts stand in more than one part. Raises UserError unless that is allowed."""
    n, seen, holders = 0, np.empty(0, np.uint64), []
    for part, own in zip(parts, (of_part[Split.train] for of_part in hashes), strict=True):
        again = len(np.intersect1d(seen, own, assume_unique=True))
        if again:
            holders.append(part.path.name)
        n, seen = n + again, np.union1d(seen, own)
    if n and not allow:
        what = f"{n:,} training contexts of {', '.join(holders)} stand in a part before it as well"
        fix = "extract other text (dataset.skip_tokens), or take them with --allow-repeats"
        raise UserError(f"{what} and would be trained on twice; {fix}")
    return n


def _hashes(part: Cache, split: Split) -> NDArray[np.uint64]:
    """A 64-bit hash of each distinct context of a split, sorted."""
    name = prefix(split) + "tokens"
    buffer, n_chunks = part.buffer(name), part.specs[name].n_chunks
    return np.unique(np.concatenate([hash_rows(part.read_chunk(name, chunk, buffer)) for chunk in range(n_chunks)]))


def hash_rows(contexts: NDArray[np.int32]) -> NDArray[np.uint64]:
    """[n, T] -> [n]: the finaliser of SplitMix64, token after token."""
    z = np.zeros(len(contexts), np.uint64)
    for column in np.ascontiguousarray(contexts.T):
        z += column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z
