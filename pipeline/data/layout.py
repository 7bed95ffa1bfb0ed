"""What lies where in a cache, and what it is called: arrays, chunk files, checksums, the request and its hash.

Shards of rows are equally long (but the last), as few as keep them within `cache.shard_mb`: 32 MB, doubled while there
would be more than 16,384 of them.
"""

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from pipeline.data import asking, tokens
from pipeline.data.address import Place, Remote
from pipeline.data.codecs import COMPRESSED, Int8
from pipeline.data.model_files import source_identity
from pipeline.data.options import Codec, DatasetOptions, ModelOptions, Targets
from pipeline.data.tokens import Split
from pipeline.errors import UserError

SCHEMA = 1
KIND = "clt-cache"
SITES = ("resid_mid", "mlp_in", "mlp_out")
STORED = ("resid_mid", "mlp_out")
"""What held-out splits store; the training split too, but for targets that are recomputed (`stored`)."""
HOOKS = {"resid_mid": "blocks.{l}.ln2.hook_in", "mlp_out": "blocks.{l}.hook_mlp_out"}
JOURNAL = ".journal"
"""Where an extraction notes what it has done; gone when the cache is finished (`data/journal.py`)."""
MERGED = "merged"
"""In a request: those of the parts of a merged cache (`data/merged.py`), which stand in its key."""
PACKING = ".packing"
"""Under cache.dir: tokens that were packed for caches that are not finished yet, by their names."""
COPYING = ".copying"
"""Under cache.dir: caches that are being copied there; in a store, in the cache: of which content it is a copy."""
CRC_BYTES = 4
PIECE_BYTES = 1 << 22
SHARD_MB = 32
MAX_SHARDS = 16384

Json = dict[str, Any]
SomePlace = TypeVar("SomePlace", Path, Remote, Place)


class Spec(NamedTuple):
    """Shape of one array and of its chunk files."""

    shape: tuple[int, ...]
    chunk_rows: int
    """Length of a chunk along the first axis; along the others it is as long as the array."""
    dtype: str
    dims: tuple[str, ...]
    compressor: str | None = None
    """A codec whose files are as long as they happen to be; None: plain numbers."""

    @property
    def n_chunks(self) -> int:
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Payload of a chunk file, which the checksum follows. The last chunk is as large as the others."""
        return int(np.prod(self.chunk_shape)) * np.dtype(self.dtype).itemsize

    @property
    def file_bytes(self) -> int:
        return self.chunk_bytes + CRC_BYTES

    def rows_in(self, chunk: int) -> int:
        return min(self.chunk_rows, self.shape[0] - chunk * self.chunk_rows)

    def file(self, root: Path, name: str, chunk: int) -> Path:
        """Zarr's default chunk key: <array>/c/<chunk>/0/0."""
        return root.joinpath(name, "c", str(chunk), *["0"] * (len(self.shape) - 1))


def spec_of(entry: Json) -> Spec:
    """A Spec from its fields in a manifest."""
    dims, compressor = tuple(entry["dims"]), entry.get("compressor")
    return Spec(tuple(entry["shape"]), entry["chunk_rows"], entry["dtype"], dims, compressor)


class Size(NamedTuple):
    """Of one split."""

    n_contexts: int
    n_rows: int


def hierarchy(
    n_layers: int,
    d_model: int,
    context: int,
    sizes: dict[Split, Size],
    shard_mb: str,
    targets: Targets = Targets.stored,
) -> dict[str, Spec]:
    """Every array of a raw cache, by its path in the group. Raises UserError for a shard size that is none."""
    per_layer, per_dim = ("layer",), ("layer", "d_model")
    specs = {}
    for split, size in sizes.items():
        rows = _shard_rows(size.n_rows, n_layers * d_model * 2, shard_mb)
        contexts = _shard_rows(size.n_contexts, context * 4, "auto")
        shape = (size.n_rows, n_layers, d_model)
        specs[prefix(split) + "tokens"] = Spec((size.n_contexts, context), contexts, "int32", ("context", "position"))
        names = STORED[:1] if split is Split.train and targets is Targets.recompute else STORED
        specs |= {prefix(split) + name: Spec(shape, rows, "uint16", ("row", *per_dim)) for name in names}
    for part in ("gain", "bias"):
        specs[f"norm/{part}"] = Spec((n_layers, d_model), n_layers, "float32", per_dim)
    for site in SITES:
        for part in ("mean", "std"):
            specs[f"stats/{site}/{part}"] = Spec((n_layers, d_model), n_layers, "float64", per_dim)
        specs[f"stats/{site}/rms"] = Spec((n_layers,), n_layers, "float64", per_layer)
    return specs


def with_codec(specs: dict[str, Spec], codec: Codec) -> dict[str, Spec]:
    """The arrays of a cache of any codec when its training rows are stored by this one: shards of as many rows."""
    found = {name: spec for name, spec in specs.items() if not name.startswith("codec/")}
    for name in stored(found):
        spec = found[name]._replace(compressor=codec.value if codec in COMPRESSED else None, dtype="uint16")
        if codec is Codec["int8"]:
            spec = spec._replace(dtype="int8")
            shape = spec.shape[1:]
            found |= {code_array(name, part): Spec(shape, shape[0], "float32", spec.dims[1:]) for part in Int8._fields}
        found[name] = spec
    return found


def code_array(name: str, part: str) -> str:
    """Where the scale or the offset of an int8 array stands in the group."""
    return f"codec/{name}/{part}"


def sums_shape(codec: Codec, n_layers: int, d_model: int) -> tuple[int, ...]:
    """What is summed over the rows of a block: sum and sum of squares of each site; for int8 also squared error and
    clipped numbers of each stored array."""
    return (len(SITES) + (len(STORED) if codec is Codec["int8"] else 0), 2, n_layers, d_model)


def _shard_rows(n_rows: int, row_bytes: int, shard_mb: str) -> int:
    if shard_mb == "auto":
        limit = SHARD_MB << 20
        while -(-n_rows // max(1, limit // row_bytes)) > MAX_SHARDS:
            limit *= 2
    else:
        if not re.fullmatch(r"\d+(\.\d+)?", shard_mb) or not (limit := int(float(shard_mb) * 2**20)):
            raise UserError(f"cache.shard_mb={shard_mb} is no size; use auto or a number of MB such as 32")
    n_shards = -(-n_rows // max(1, limit // row_bytes))
    return -(-n_rows // n_shards)


def prefix(split: Split) -> str:
    """Where the arrays of a split stand in the group."""
    return "" if split is Split.train else f"{split}/"


def stored(arrays: Mapping[str, object], split: Split = Split.train) -> tuple[str, ...]:
    """Those of STORED that a split has, by the arrays of the cache: specs, or a manifest's entries."""
    return tuple(name for name in STORED if prefix(split) + name in arrays)


def targets_of(request: Json) -> Targets:
    """How the training rows come to their mlp_out; a request that says nothing has it stored."""
    return Targets(request.get("targets", Targets.stored))


def check_codec(codec: Codec, targets: Targets) -> None:
    """Raises UserError for a codec that loses bits of what targets are recomputed from."""
    if targets is Targets.recompute and codec is Codec["int8"]:
        why = "targets that are recomputed from rounded inputs are not the model's"
        fix = "use cache.targets=stored with it, or a codec without loss (blosc-lz4-bitshuffle, pcodec)"
        raise UserError(f"cache.codec={codec} with cache.targets={targets}: {why}; {fix}")


def request_of(
    model: ModelOptions, dataset: DatasetOptions, codec: Codec = Codec.raw, targets: Targets = Targets.stored
) -> Json:
    """What determines a cache's content, in plain values: options (not devices or batch sizes) and the hashes of local
    files. Raises UserError for options that contradict one another and for files that are not there."""
    check_codec(codec, targets)
    described = json.loads(json.dumps({"model": asdict(model), "dataset": asking.asked(dataset)}))
    for field in ("device", "device_map", "max_memory", "offload_dir", "default_dataset"):  # no part of the content
        del described["model"][field]
    if dataset.n_tokens != "all":  # 400k and 400000 are one request
        described["dataset"]["n_tokens"] = str(tokens.count(dataset.n_tokens))
    if "skip_tokens" in described["dataset"]:  # left out where it is 0, in whatever spelling
        described["dataset"] |= {"skip_tokens": str(tokens.skipped(dataset))}
        described["dataset"] = {k: v for k, v in described["dataset"].items() if (k, v) != ("skip_tokens", "0")}
    source = {"model": source_identity(model), "dataset": tokens.source_identity(dataset)}
    more = {"targets": targets.value} if targets is not Targets.stored else {}  # caches were made before there was this
    return {"schema": SCHEMA, **described, "codec": str(codec), **more, "source": source}


def key_of(request: Json) -> str:
    """The name of a request's content: 12 hex digits."""
    return hashlib.sha256(canonical(request)).hexdigest()[:12]


def directory_of(cache_dir: SomePlace, request: Json) -> SomePlace:
    """Where the cache of a request lies, finished or not; a merged one may have been given another name."""
    data = MERGED if MERGED in request else request["dataset"]["name"]
    names = [re.sub(r"[^\w.-]+", "_", name) for name in (request["model"]["name"], data)]
    return cache_dir / f"{names[0]}-{names[1]}-{key_of(request)}"


def unchecked_attributes(data: bytes) -> Json | None:
    """Those in the bytes of a zarr.json, of whatever program; None where there are none."""
    try:
        attributes = json.loads(data)["attributes"]
    except (ValueError, KeyError, TypeError):
        return None
    return attributes if isinstance(attributes, dict) else None


def found_at(cache_dir: SomePlace, request: Json) -> SomePlace:
    """The same, with a merged cache found under whatever name it was given."""
    usual = directory_of(cache_dir, request)
    if MERGED not in request or isinstance(cache_dir, Remote) or isinstance(usual, Remote) or usual.exists():
        return usual
    for file in sorted(cache_dir.glob("[!.]*/zarr.json")):
        if (unchecked_attributes(file.read_bytes()) or {}).get("request") == request:
            return file.parent
    return usual


def checksum(attributes: Json) -> int:
    """crc32c of the attributes themselves."""
    return int(google_crc32c.value(canonical({k: v for k, v in attributes.items() if k != "checksum"})))


def checksum_of(file: Path, n_bytes: int) -> int:
    """crc32c of the first n_bytes of a file, read in pieces (bytes, so that other threads go on meanwhile). Raises
    EOFError when it is shorter."""
    with file.open("rb", buffering=0) as stream:
        return checksum_in(stream, n_bytes)


def checksum_in(stream: io.FileIO, n_bytes: int) -> int:
    """The same of an open file, from where it stands."""
    crc = 0
    while n_bytes:
        piece = stream.read(min(PIECE_BYTES, n_bytes))
        if not piece:
            raise EOFError(f"{stream.name} ends early")
        crc = google_crc32c.extend(crc, piece)
        n_bytes -= len(piece)
    return int(crc)


def read_into(stream: io.FileIO, offset: int, out: NDArray[Any]) -> None:
    """Bytes of an open file from `offset` on into a contiguous array. Raises EOFError when it ends early."""
    flat = out.reshape(-1).view(np.uint8).data
    stream.seek(offset)
    done = 0
    while done < flat.nbytes:
        n = stream.readinto(flat[done:])
        if not n:
            raise EOFError(f"{stream.name} ends early")
        done += n


def canonical(value: Json) -> bytes:
    """JSON in one spelling, for hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def file_bytes(entry: Json, chunk: int) -> int:
    """Size of a chunk file, by the array's entry in a manifest."""
    return int(entry["bytes"][chunk]) if entry.get("compressor") else spec_of(entry).file_bytes


def stored_bytes(arrays: Json) -> int:
    """Size of all chunk files, by a manifest's entries."""
    return sum(file_bytes(entry, chunk) for entry in arrays.values() for chunk in range(spec_of(entry).n_chunks))


def total_bytes(specs: dict[str, Spec]) -> int:
    return sum(spec.n_chunks * spec.file_bytes for spec in specs.values())


def token_bytes(specs: dict[str, Spec]) -> int:
    """Of a training row, before compression."""
    return sum(int(np.prod(specs[name].shape[1:])) * np.dtype(specs[name].dtype).itemsize for name in stored(specs))


def gb(n_bytes: int) -> str:
    """1234567890 -> 1.23 GB (10^9 bytes)"""
    value, unit = (n_bytes / 1e9, "GB") if n_bytes >= 1e8 else (n_bytes / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
