"""`clt cache ls` and `clt cache info`: what is there, and what it is. Both return text, or the same as JSON."""

import json
import logging
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import inventory
from pipeline.data.address import Place
from pipeline.data.cache import Cache
from pipeline.data.commands import command_to_go_on
from pipeline.data.inventory import Found, Leftover, State
from pipeline.data.layout import SITES, STORED, Json, Spec, gb, spec_of, stored, stored_bytes, targets_of
from pipeline.data.merged import merged_of, places_of
from pipeline.data.options import Targets
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from pipeline.stages.cache_use import Runs

logger = logging.getLogger(__name__)

LEFTOVERS = {"packing": "packed tokens", "copying": "a copy that is not whole", "removed": "rest of a removed cache"}


def ls(cache_dir: Place, runs_dir: Path, as_json: bool = False) -> str:
    """Every cache, and what else takes room beside them."""
    found, rest, runs = inventory.caches(cache_dir), inventory.leftovers(cache_dir), Runs(runs_dir)
    rows = [_summary(cache, runs) for cache in found]
    others = [_leftover(left) for left in rest]
    if as_json:
        return json.dumps({"cache_dir": str(cache_dir), "caches": rows, "leftovers": others}, indent=2)
    if not rows and not others:
        return f"no caches under {cache_dir}/; make one with clt extract model=world"
    lines = _table(rows) if rows else [f"no caches under {cache_dir}/; make one with clt extract model=world"]
    for left in others:
        what = LEFTOVERS[left["kind"]]
        work = f", process {left['process']} is at work on it" if left["process"] else "; clt cache prune removes it"
        lines.append(f"{left['path']}: {what}, {gb(left['n_bytes'])}{work}")
    total = sum(row["n_bytes"] for row in [*rows, *others])
    return "\n".join([*lines, f"{gb(total)} in all under {cache_dir}/"])


def info(name: str | None, cache_dir: Place, runs_dir: Path, as_json: bool = False) -> str:
    """One cache: the one that is named, or the newest."""
    found = inventory.find(cache_dir, name) if name is not None else inventory.newest(cache_dir)
    about = _everything(found, Runs(runs_dir))
    return json.dumps(about, indent=2) if as_json else "\n".join(_described(about))


def _summary(found: Found, runs: Runs) -> Json:
    about, request = found.about, found.request
    return {
        "name": found.path.name,
        "path": str(found.path),
        "key": found.key,
        "model": about["model"]["name"] if about else None,
        "dataset": _data(about) if about else None,
        "n_tokens": about["n_rows"][Split.train] if about else None,
        "context": about["context"] if about else None,
        "codec": request["codec"] if request else None,
        "targets": str(targets_of(request)) if request else None,
        "n_bytes": found.n_bytes,
        "state": str(found.state),
        "detail": found.detail,
        "created": found.created,
        "runs": runs.of(found),
        **({"parts": [str(place) for place in places_of(found.path, about)]} if "parts" in about else {}),
    }


def _data(about: Json) -> str:
    return f"merged of {len(about['parts'])}" if "parts" in about else str(about["dataset"]["name"])


def _leftover(left: Leftover) -> Json:
    return {"path": str(left.path), "kind": left.kind, "n_bytes": left.n_bytes, "process": left.owner}


def _table(rows: list[Json]) -> list[str]:
    head = ["NAME", "MODEL", "DATA", "TOKENS", "T", "CODEC", "SIZE", "STATE", "CREATED", "RUNS"]
    cells = [
        [
            row["name"],
            row["model"] or "?",
            row["dataset"] or "?",
            "?" if row["n_tokens"] is None else f"{row['n_tokens']:,}",
            str(row["context"] or "?"),
            _codec(row),
            gb(row["n_bytes"]),
            _state(row),
            _when(row["created"]) or "-",
            _some(row["runs"]) or "-",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    right = {"TOKENS", "T", "SIZE"}
    lines = []
    for line in [head, *cells]:
        parts = [
            text.rjust(width) if title in right else text.ljust(width)
            for title, text, width in zip(head, line, widths, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    details = [f"{row['name']}: {row['detail']}" for row in rows if row["state"] in (State.damaged, State.other)]
    return lines + details


def _codec(row: Json) -> str:
    """What is stored, and how."""
    codec = row["codec"] or "?"
    return f"{codec}, {row['targets']}" if row["targets"] == Targets.recompute else codec


def _state(row: Json) -> str:
    """In a table: a word, and what fits behind it."""
    if row["state"] == State.unfinished:
        return f"unfinished, {row['detail']}"
    return row["detail"] if row["state"] == State.at_work else str(row["state"])


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _when(created: str | None) -> str:
    """In the time zone of whoever asks."""
    return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M") if created else ""


def _everything(found: Found, runs: Runs) -> Json:
    about, request = found.about, found.request
    if request is None:
        return _summary(found, runs)
    chosen = ("model", "dataset", "hooks", "norm", "n_rows", "bos_token_id", "eos_token_id", "seed", "versions")
    known = {**_summary(found, runs), **{name: about[name] for name in chosen}}
    known |= {"command": command_to_go_on(about, found.path.parent), "rms": _rms(found)}
    if "parts" in about:
        parts = [part | {"path": str(place)} for part, place in zip(about["parts"], known["parts"], strict=True)]
        return known | {"parts": parts, "n_groups": about["n_groups"], "data": _data(about)}
    arrays = about["manifest"]["arrays"]
    spec, rows = spec_of(arrays[STORED[0]]), {name: arrays[name] for name in stored(arrays)}
    n_files = len(rows) * spec.n_chunks
    return known | {
        "bytes_per_token": _bytes_per_token(found, spec),
        "arrays": list(rows),
        "shards": {"n": spec.n_chunks, "rows": spec.chunk_rows, "n_bytes": stored_bytes(rows) // n_files},
        "lost": _lost(about),
        "recompute": about.get("recompute"),
        "part_of": [str(path) for path in merged_of(found.path, found.path.parent)],
    }


def _bytes_per_token(found: Found, spec: Spec) -> int:
    """Of the codec, or of the raw numbers where that depends on them and is not known yet."""
    arrays = found.about["manifest"]["arrays"]
    names = stored(arrays)
    if spec.compressor and found.state is State.complete:
        return round(stored_bytes({name: arrays[name] for name in names}) / spec.shape[0])
    return len(names) * int(np.prod(spec.shape[1:])) * np.dtype(spec.dtype).itemsize


def _lost(about: Json) -> Json | None:
    """What a lossy codec lost of each site; None where nothing was."""
    codec = about.get("codec", {})
    return {name: codec[name] for name in STORED if name in codec} if STORED[0] in codec else None


def _rms(found: Found) -> dict[str, list[float]] | None:
    """Root mean square of each site in each layer, over the training rows; None where it cannot be read."""
    if found.state is not State.complete:
        return None
    try:
        cache = Cache.open(found.path)
        return {site: cache.stats(site)[2].tolist() for site in SITES}
    except UserError as error:
        logger.warning(error)
        return None


def _described(about: Json) -> list[str]:
    state = ": ".join(filter(None, [about["state"], about["detail"]]))
    made = f", made {_when(about['created'])}" if about["created"] else ""
    lines = [f"{about['path']}: {state}{made}, {gb(about['n_bytes'])} on disk"]
    if "command" not in about:
        return [*lines, f"runs        {', '.join(about['runs']) or 'none'}"]
    parts = {
        "model": _model(about["model"]),
        "layers": _layers(about["model"]),
        "norm": f"{about['norm']['kind']} norm before each MLP, epsilon {about['norm']['eps']:g}",
        **_parts(about),
        "rows": ", ".join(f"{split} {n:,}" for split, n in about["n_rows"].items()) + f"; seed {about['seed']}",
        "contexts": f"{about['context']} tokens, {_beginning(about['bos_token_id'])}",
        "storage": _storage(about),
        "targets": _targets(about),
        "made with": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        "command": about["command"],
        "runs": ", ".join(about["runs"]) or "none",
    }
    lines += [f"{name:11} {text}" for name, text in parts.items()]
    return lines + _statistics(about)


def _targets(about: Json) -> str:
    """Where the training rows' mlp_out come from."""
    if about["targets"] == Targets.stored:
        return "stored"
    fvu = about["recompute"]
    off = f", FVU {max(fvu['fvu']):.1g} against the model's own" if fvu else ""
    return f"recomputed from resid_mid by the model's own MLPs{off}"


def _parts(about: Json) -> dict[str, str]:
    """Text, and of a merged cache where its rows lie."""
    if "n_groups" not in about:
        part_of = {"part of": ", ".join(about["part_of"])} if about["part_of"] else {}
        return {"data set": _dataset(about["dataset"]), **part_of}
    rows = {f"part {i}": f"{part['path']}: {part['n_rows']:,} rows" for i, part in enumerate(about["parts"])}
    return {"data set": f"{about['data']}; clt cache info PART says what each holds", **rows}


def _storage(about: Json) -> str:
    if "n_groups" in about:
        return f"{about['codec']}, in the parts, read in {about['n_groups']:,} groups of rows of all of them"
    shards, n_arrays = about["shards"], len(about["arrays"])
    return (
        f"{about['codec']}, {about['bytes_per_token']:,} bytes a token, {n_arrays} x {shards['n']:,} shards of "
        f"{shards['rows']:,} rows ({gb(shards['n_bytes'])})"
    )


def _model(model: Json) -> str:
    commit = f"commit {model['revision']}" if model["revision"] else "no commit"
    hashes = ", ".join(f"{part} sha256 {model[f'{part}_sha256'][:16]}" for part in ("weights", "tokenizer"))
    return f"{model['name']} ({model['architecture']}, {model['path']}), {commit}, {hashes}"


def _layers(model: Json) -> str:
    first, stop = model["layers"]
    return f"{first} to {stop - 1} of width {model['d_model']}, {model['dtype']}, {model['attention']} attention"


def _dataset(dataset: Json) -> str:
    """What was said about it, and what it turned out to be. Options that say nothing are left out."""
    named = {"name", "kind", "fingerprint", "resolved"}
    given = {key: value for key, value in _flat(dataset) if key.split(".")[0] not in named and value not in (None, {})}
    words = ", ".join(f"{key}={value}" for key, value in given.items())
    commits = "".join(f", {key} {value}" for key, value in _flat(dataset["resolved"]))
    return f"{dataset['name']} ({dataset['kind']}): {words}; tokens sha256 {dataset['fingerprint'][:16]}{commits}"


def _flat(tree: Json, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _beginning(bos_token_id: int | None) -> str:
    return "which begin with ordinary text" if bos_token_id is None else f"which begin with token {bos_token_id}"


def _statistics(about: Json) -> list[str]:
    """Root mean square by layer."""
    if about["rms"] is None:
        return []
    first = about["model"]["layers"][0]
    rows = zip(*(about["rms"][site] for site in SITES), strict=True)
    lines = ["rms, layer  " + "".join(f"{site:>12}" for site in SITES)]
    return lines + [f"{first + i:>10}  " + "".join(f"{value:12.4g}" for value in row) for i, row in enumerate(rows)]
