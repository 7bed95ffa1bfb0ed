"""Several finished caches made one, without a training row rewritten: what `merged.py` reads.

    merge([Cache.open(a), Cache.open(b)], Path("cache"))      # -> the directory of the merged cache

1. What does not belong together is refused (`mergeable.py`).
2. Statistics follow exactly from those of the parts. Held-out contexts are those of all parts, each distinct one once.
3. All of it is written aside, the group's own `zarr.json` last, and takes its name as a whole.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import root
from pipeline.data.address import Place, Remote
from pipeline.data.cache import Cache
from pipeline.data.layout import (
    MERGED,
    SITES,
    STORED,
    Json,
    Size,
    Spec,
    found_at,
    hierarchy,
    little,
)
from pipeline.data.mergeable import HELD_OUT, check
from pipeline.data.merged import Merged, content_of
from pipeline.data.publish import metadata_of
from pipeline.data.shards import write_shard
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.files import atomic_directory

logger = logging.getLogger(__name__)

ORDER = (
    "rows are those of the parts, one part after the other, each in its own order; group g of n_groups, which is read "
    "together, is rows [N_p * g // n_groups, N_p * (g + 1) // n_groups) of each part p"
)


def merge(caches: list[Cache], cache_dir: Path, name: str | None = None, allow_repeats: bool = False) -> Path:
    """-> the directory of the merged cache under `cache_dir`, which may be there already; one that is damaged is made
    again. name: of the directory. Raises UserError, before anything is written, for caches that do not go together."""
    parts = [part for cache in caches for part in (cache.parts if isinstance(cache, Merged) else [cache])]
    repeats = check(parts, allow_repeats)
    request = _request(parts, repeats)
    path = found_at(cache_dir, request)
    if _is_there(path):
        logger.info("already there, nothing to do")
        return path
    if name is not None and not path.exists():
        path = _named(cache_dir, name)
    _write(path, parts, request)
    return path


def _request(parts: list[Cache], repeats: bool) -> Json:
    """What determines the content: the parts' requests, in their order. Model and data set are the first one's."""
    first = parts[0].request
    return first | {MERGED: [part.request for part in parts]} | ({"repeats": True} if repeats else {})


def _is_there(path: Path) -> bool:
    """Whether the merged cache is whole. Its parts are: they are open."""
    if not (path / "zarr.json").exists():
        return False
    try:
        Cache.open(path)
    except UserError as error:
        logger.warning("merging again: %s", error)
        return False
    return True


def _named(cache_dir: Path, name: str) -> Path:
    path = cache_dir / name
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"--name {name}: not the name of a directory under {cache_dir}/; use a plain one such as all")
    if path.exists():
        raise UserError(f"--name {name}: {path} exists and is another cache; choose another name")
    return path


def _write(path: Path, parts: list[Cache], request: Json) -> None:
    distinct = {split: _distinct(parts, split) for split in HELD_OUT}
    sizes = {split: sum(map(len, chosen)) for split, chosen in distinct.items()}
    width = parts[0].context - 1
    shape = parts[0].n_layers, parts[0].d_model
    specs = hierarchy(*shape, width + 1, {split: Size(n, n * width) for split, n in sizes.items()}, "auto")
    small = {f"norm/{part}": _whole(parts[0], f"norm/{part}") for part in ("gain", "bias")} | _statistics(parts)
    crcs: dict[str, dict[int, int]] = {}
    with atomic_directory(path) as aside:
        for name, spec in specs.items():
            if name in small:
                blocks = iter([small[name]])
            else:
                blocks = _held_out(parts, distinct[Split(name.split("/")[0])], name)
            crcs[name] = {
                i: write_shard(spec, spec.file(aside, name, i), rows) for i, rows in enumerate(_chunks(blocks, spec))
            }
        n_rows = {Split.train: sum(part.n_rows for part in parts)} | {s: n * width for s, n in sizes.items()}
        data = metadata_of(aside, specs, _attributes(path, parts, request, n_rows), crcs)
        (aside / root.NAME).write_bytes(data)  # without a copy: merging again costs little


def _attributes(path: Path, parts: list[Cache], request: Json, n_rows: dict[Split, int]) -> Json:
    """All but what `publish.py` adds. What the parts have in common, or say of themselves alone, is the first one's."""
    first = parts[0].attributes
    prints = "\n".join(part.dataset["fingerprint"] for part in parts)
    dataset = first["dataset"] | {"n_tokens": str(n_rows[Split.train])}
    n_chunks = sum(part.specs[STORED[0]].n_chunks for part in parts)
    common = {k: v for k, v in first.items() if k not in ("manifest", "checksum", "codec", "block_contexts")}
    return common | {
        "request": request,
        "dataset": dataset | {"fingerprint": hashlib.sha256(prints.encode()).hexdigest()},
        "n_rows": {str(split): n for split, n in n_rows.items()},
        "order": ORDER,
        "n_groups": min(n_chunks, max(part.n_rows for part in parts)),
        "parts": [
            {
                "path": _spelled(part.path, path.parent),
                "key": part.key,
                "n_rows": part.n_rows,
                "n_contexts": part.specs["tokens"].shape[0],
                "crc32c": content_of(part.attributes),
            }
            for part in parts
        ],
    }


def _spelled(part: Place, cache_dir: Path) -> str:
    """A name where the part lies in the same directory, so that both can be moved together."""
    assert not isinstance(part, Remote), "caches are merged on a disk"
    return part.name if part.resolve().parent == cache_dir.resolve() else str(part.resolve())


def _statistics(parts: list[Cache]) -> dict[str, NDArray[np.float64]]:
    """Of all rows together, from those of the parts."""
    found: dict[str, NDArray[np.float64]] = {}
    share = np.array([part.n_rows for part in parts]) / sum(part.n_rows for part in parts)
    for site in SITES:
        mean, std, rms = (
            np.stack([values.numpy() for values in column])
            for column in zip(*(part.stats(site) for part in parts), strict=True)
        )
        whole = np.tensordot(share, mean, 1)
        found[f"stats/{site}/mean"] = whole
        found[f"stats/{site}/std"] = np.sqrt(np.tensordot(share, std**2 + (mean - whole) ** 2, 1))
        found[f"stats/{site}/rms"] = np.sqrt(np.tensordot(share, rms**2, 1))
    return found


def _distinct(parts: list[Cache], split: Split) -> list[list[int]]:
    """Of each part the held-out contexts that stood in none before them."""
    seen: set[bytes] = set()
    found: list[list[int]] = []
    for part in parts:
        found.append([])
        for number, context in enumerate(_whole(part, f"{split}/tokens")):
            if context.tobytes() not in seen:
                seen.add(context.tobytes())
                found[-1].append(number)
    return found


def _held_out(parts: list[Cache], chosen: list[list[int]], name: str) -> Iterator[NDArray[Any]]:
    """Of each part the entries of an array that belong to the chosen contexts: rows, or the contexts themselves."""
    for part, contexts in zip(parts, chosen, strict=True):
        if contexts:
            values, tokens = _whole(part, name), name.split("/")[0] + "/tokens"
            by_context = values.reshape(part.specs[tokens].shape[0], -1, *values.shape[1:])
            yield by_context[contexts].reshape(-1, *values.shape[1:])


def _whole(part: Cache, name: str) -> NDArray[Any]:
    """An array, in memory."""
    n_chunks = part.specs[name].n_chunks
    return np.concatenate([part.read_chunk(name, chunk, part.buffer(name)) for chunk in range(n_chunks)])


def _chunks(blocks: Iterator[NDArray[Any]], spec: Spec) -> Iterator[NDArray[Any]]:
    """Rows that come in blocks of any length, cut into chunks; the last one is filled up with zeros."""
    chunk, filled = np.zeros(spec.chunk_shape, little(spec.dtype)), 0
    for block in blocks:
        while len(block):
            n = min(len(block), spec.chunk_rows - filled)
            chunk[filled : filled + n], block, filled = block[:n], block[n:], filled + n
            if filled == spec.chunk_rows:
                yield chunk
                chunk[:], filled = 0, 0
    if filled:
        yield chunk
