"""The activation cache on disk: its layout, and the reader.

A cache is a Zarr v3 group, `<cache.dir>/<model>-<dataset>-<key>/`, which any Zarr reader opens:

    zarr.json              attributes: request, model, data set, hooks, norm, manifest, ... Written last: a directory
                           without it is unfinished, and nothing can open it.
    tokens                 int32 [n_contexts, T]
    resid_mid, mlp_out     uint16 [N, L, D], the bits of bfloat16. Row r of training token t is Permutation(N, seed)(t),
                           token t being (context t // (T-1), position 1 + t % (T-1)).
    norm/gain, norm/bias   float32 [L, D], of the norm in front of each MLP
    stats/<site>/mean, std float64 [L, D], and rms [L] (root of the mean square), over the training rows;
                           sites resid_mid, mlp_in (the norm applied to the stored resid_mid) and mlp_out
    calibration/, evaluation/  tokens, resid_mid, mlp_out of the held-out contexts, row t in the order of the tokens

An array is cut along its first axis; each chunk is one file of plain little-endian numbers and a 4-byte crc32c, so that
it can be memory-mapped. To Zarr a missing chunk is zeros; here the manifest is the truth: what it does not list does
not exist, and a file that differs from it is refused. The name of the directory is the hash of what was asked for.
"""

import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data.address import Place, Remote
from pipeline.data.chunk_files import Files, files_of, repair
from pipeline.data.codecs import Int8, decompress
from pipeline.data.journal import read_state
from pipeline.data.layout import (
    CRC_BYTES,
    JOURNAL,
    KIND,
    SCHEMA,
    SITES,
    STORED,
    Json,
    checksum,
    checksum_in,
    command_of,
    directory_of,
    file_bytes,
    key_of,
    little,
    prefix,
    request_of,
    spec_of,
    stored_bytes,
)
from pipeline.data.options import Codec, DatasetOptions, ModelOptions
from pipeline.data.remote import Store
from pipeline.data.shuffle import Permutation
from pipeline.data.tokens import Split
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


class Shard(NamedTuple):
    """A chunk of the training rows: one file of each stored array."""

    chunk: int
    first: int
    """Its first row."""
    n_rows: int
    """Rows that hold tokens. The last file is padded with zero rows, which nothing hands out."""


def find(cache_dir: Place, model: ModelOptions, dataset: DatasetOptions, codec: Codec = Codec.raw) -> "Cache":
    """The finished cache of these options. Raises UserError, with the command that makes it, when there is none."""
    request = request_of(model, dataset, codec)
    return with_key(cache_dir, key_of(request), request)


def with_key(cache_dir: Place, key: str, request: Json) -> "Cache":
    """The finished cache of a request that was made earlier. Raises UserError, with the command that makes it."""
    path = directory_of(cache_dir, request)
    if key_of(request) != key or not is_finished(path):
        begun = not isinstance(path, Remote) and (path / JOURNAL).exists()
        state = "is not finished" if begun else "does not exist"
        raise UserError(f"the cache {path} {state}; run: {command_of(request, cache_dir)}")
    return Cache.open(path)


def newest(cache_dir: Place) -> "Cache | None":
    """The finished cache that was made last. What cannot be used is passed over, with a warning that says why."""
    found: list[Cache] = []
    for path in finished(cache_dir):
        try:
            found.append(Cache.open(path))
        except UserError as error:
            logger.warning("passed over: %s", error)
    return max(found, key=lambda cache: str(cache.attributes["created"]), default=None)


def finished(cache_dir: Place) -> list[Place]:
    """What has been called finished in a cache directory, by name."""
    if isinstance(cache_dir, Remote):
        return [path for name in Store(cache_dir).children() if is_finished(path := cache_dir / name)]
    return [root.parent for root in sorted(cache_dir.glob("*/zarr.json"))]


def is_finished(path: Place) -> bool:
    return zarr_json(path) is not None if isinstance(path, Remote) else (path / "zarr.json").exists()


class Cache:
    """A finished cache, opened for reading. Every chunk is checked against its checksum when it is first read."""

    def __init__(self, path: Place, attributes: Json, files: Files | None = None) -> None:
        self.path = path
        self._files = files or files_of(path, attributes)
        self.attributes = attributes
        self.specs = {name: spec_of(entry) for name, entry in attributes["manifest"]["arrays"].items()}
        self._checked: set[tuple[str, int]] = set()
        self._tokens: NDArray[np.int32] | None = None

    @classmethod
    def open(cls, path: Place) -> "Cache":
        """Raises UserError, with the fix, for a directory that is no finished cache, one of another schema, and one in
        which a listed file is missing or of another size."""
        attributes = read_attributes(path)
        files = files_of(path, attributes)
        if damaged := next(damage(path, attributes, files), None):
            raise _refusal(path, attributes["request"], *damaged)
        return cls(path, attributes, files)

    @property
    def key(self) -> str:
        return key_of(self.request)

    @property
    def request(self) -> Json:
        """What was asked for: `model` and `dataset` are the options' fields."""
        return self.attributes["request"]

    @property
    def model(self) -> Json:
        """name, path, revision, architecture, weights_sha256, tokenizer_sha256, n_layers, d_model, vocab_size, dtype"""
        return self.attributes["model"]

    @property
    def dataset(self) -> Json:
        """The options, and the fingerprint of the packed tokens."""
        return self.attributes["dataset"]

    @property
    def hooks(self) -> dict[str, str]:
        """Where the base model was read, by the names that transformer_lens gives; {l} is the layer."""
        return self.attributes["hooks"]

    @property
    def n_rows(self) -> int:
        return self.specs["resid_mid"].shape[0]

    @property
    def n_layers(self) -> int:
        return self.specs["resid_mid"].shape[1]

    @property
    def d_model(self) -> int:
        return self.specs["resid_mid"].shape[2]

    @property
    def context(self) -> int:
        """T, tokens in a context."""
        return self.specs["tokens"].shape[1]

    @property
    def n_bytes(self) -> int:
        """Size of all chunk files."""
        return stored_bytes(self.attributes["manifest"]["arrays"])

    @property
    def codec(self) -> Codec:
        """How the training rows are stored; held-out ones are always raw."""
        spec = self.specs[STORED[0]]
        if spec.compressor is not None:
            return Codec(spec.compressor)
        return Codec["int8"] if spec.dtype == "int8" else Codec.raw

    def code(self, name: str) -> Int8 | None:
        """What the numbers of an int8 array stand for; None where they are the bits of bfloat16."""
        if self.specs[name].dtype != "int8":
            return None
        return Int8(*(torch.from_numpy(self._array(f"codec/{name}/{part}")) for part in ("scale", "offset")))

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The training contexts, int32 [n_contexts, T]."""
        if self._tokens is None:
            self._tokens = self._array("tokens").astype(np.int32, copy=False)
        return self._tokens

    @property
    def norm(self) -> MlpNorm:
        """The norm in front of each MLP, float32 [L, D]."""
        gain, bias = (torch.from_numpy(self._array(f"norm/{part}")) for part in ("gain", "bias"))
        return MlpNorm(self.attributes["norm"]["kind"], gain, bias, self.attributes["norm"]["eps"])

    def stats(self, site: str) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [L, D], std [L, D], rms [L]) of a site over all training rows, float64, in the model's units."""
        assert site in SITES, site
        mean, std, rms = (torch.from_numpy(self._array(f"stats/{site}/{part}")) for part in ("mean", "std", "rms"))
        return mean, std, rms

    def held_out(self, split: Split) -> tuple[NDArray[np.int32], Tensor, Tensor]:
        """(contexts int32 [n, T], resid_mid, mlp_out, bfloat16 [n * (T-1), L, D]) of a held-out split, row t being
        (context t // (T-1), position 1 + t % (T-1))."""
        assert split is not Split.train
        contexts = self._array(prefix(split) + "tokens")
        resid_mid, mlp_out = (
            torch.from_numpy(self._array(prefix(split) + name)).view(torch.bfloat16) for name in STORED
        )
        return contexts, resid_mid, mlp_out

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """(context, position, token id) of training rows, each [k]."""
        order = Permutation(self.n_rows, self.attributes["seed"])
        context, position = np.divmod(order.inverse(np.asarray(rows)), self.context - 1)
        return context, position + 1, self.tokens[context, position + 1]

    def shards(self) -> list[Shard]:
        spec = self.specs["resid_mid"]
        return [Shard(i, i * spec.chunk_rows, spec.rows_in(i)) for i in range(spec.n_chunks)]

    def hold(self, chunk: int) -> list[io.FileIO]:
        """The files of a shard, open: of a remote cache they are fetched by this, and stay until they are closed."""
        with ExitStack() as stack:
            files = []
            for name in STORED:
                with self._refusing(name, chunk):
                    files.append(stack.enter_context(self._open(name, chunk)))
            stack.pop_all()
        return files

    def check_room(self, n_shards: int) -> None:
        """Raises UserError when the files of so many shards of a remote cache cannot be on this machine at once."""
        self._files.check_room(n_shards * self.shard_bytes)

    @property
    def shard_bytes(self) -> int:
        """Size of the files of the largest shard."""
        arrays = self.attributes["manifest"]["arrays"]
        return sum(max(file_bytes(arrays[name], shard.chunk) for shard in self.shards()) for name in STORED)

    def map_chunk(self, name: str, chunk: int) -> NDArray[Any]:
        """A chunk as a read-only memory map, padding left out. Not for compressed arrays."""
        spec = self.specs[name]
        assert spec.compressor is None
        with self._refusing(name, chunk), self._open(name, chunk) as file:
            if (name, chunk) not in self._checked:
                self._compare(name, chunk, checksum_in(file, spec.chunk_bytes))
            if os.fstat(file.fileno()).st_size < spec.file_bytes:
                raise EOFError
            # The map has a descriptor of its own, which keeps what this one has locked.
            return np.memmap(file, little(spec.dtype), "r", shape=spec.chunk_shape)[: spec.rows_in(chunk)]

    def read_chunk(self, name: str, chunk: int, out: NDArray[Any]) -> NDArray[Any]:
        """A chunk read into `out` (contiguous, of the shape and type of a chunk). Returns it without padding."""
        spec = self.specs[name]
        assert out.shape == spec.chunk_shape
        assert out.dtype == little(spec.dtype)
        if spec.compressor is not None:
            return self._decompressed(name, chunk, out)
        flat = out.reshape(-1).view(np.uint8).data
        with self._refusing(name, chunk), self._open(name, chunk) as file:
            done = 0
            while done < flat.nbytes:
                n = file.readinto(flat[done:])
                if not n:
                    raise EOFError
                done += n
        if (name, chunk) not in self._checked:
            self._compare(name, chunk, google_crc32c.value(out))
        return out[: spec.rows_in(chunk)]

    def rows(self, name: str, chunk: int) -> Tensor:
        """The rows of a chunk of a stored array, decoded: bfloat16 [n, L, D]."""
        spec, code = self.specs[name], self.code(name)
        stored = torch.from_numpy(self.read_chunk(name, chunk, np.empty(spec.chunk_shape, little(spec.dtype))))
        if code is None:
            return stored.view(torch.bfloat16)
        return code.decode(stored, torch.empty(stored.shape, dtype=torch.bfloat16))

    def _decompressed(self, name: str, chunk: int, out: NDArray[Any]) -> NDArray[Any]:
        spec, entry = self.specs[name], self.attributes["manifest"]["arrays"][name]
        with self._refusing(name, chunk), self._open(name, chunk) as file:
            data = file.readall()
            if len(data) != file_bytes(entry, chunk):
                raise EOFError
        payload = data[:-CRC_BYTES]
        self._compare(name, chunk, google_crc32c.value(payload))  # each time: a damaged stream must not be decoded
        decompress(self.codec, payload, out)
        return out[: spec.rows_in(chunk)]

    @contextmanager
    def _refusing(self, name: str, chunk: int) -> Iterator[None]:
        """A file that has gone or shrunk since the cache was opened is the user's to mend."""
        try:
            yield
        except (FileNotFoundError, EOFError) as error:
            what = "is truncated" if isinstance(error, EOFError) else "is missing"
            raise _refusal(self.path, self.request, name, chunk, what) from error

    def _array(self, name: str) -> NDArray[Any]:
        """A whole array, in memory."""
        spec = self.specs[name]
        whole = np.empty((spec.n_chunks, *spec.chunk_shape), little(spec.dtype))
        for chunk in range(spec.n_chunks):
            self.read_chunk(name, chunk, whole[chunk])
        return whole.reshape(-1, *spec.shape[1:])[: spec.shape[0]]

    def _compare(self, name: str, chunk: int, checksum: int) -> None:
        if checksum != self.attributes["manifest"]["arrays"][name]["crc32c"][chunk]:
            key = self._key(name, chunk)
            what = f"{self.path / key} does not hold what was written (wrong checksum)"
            raise UserError(f"{what}; make it again: {self._files.again(key)}")
        self._checked.add((name, chunk))

    def _key(self, name: str, chunk: int) -> str:
        return self.specs[name].file(Path(), name, chunk).as_posix()

    def _open(self, name: str, chunk: int) -> io.FileIO:
        return self._files.open(self._key(name, chunk))


def read_attributes(path: Place) -> Json:
    """The attributes of a finished cache. Raises UserError for anything else."""
    file, data = path / "zarr.json", zarr_json(path)
    if data is None:
        state = None if isinstance(path, Remote) else read_state(path)
        if state is None:
            raise UserError(f"{path} is no cache (it has no zarr.json); make one with clt extract")
        raise UserError(f"the cache {path} is not finished; go on with: {command_of(state['request'], path.parent)}")
    again = f"remove {path} and make it again with clt extract"
    try:
        attributes: Json = dict(json.loads(data)["attributes"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; {again}") from error
    if attributes.get("kind") != KIND:
        raise UserError(f"{path} is a Zarr group, but no cache of this program; name a directory that clt extract made")
    if attributes.get("schema") != SCHEMA:
        has = f"schema {attributes.get('schema')}, this version reads {SCHEMA}"
        raise UserError(f"{path} has {has}; make a new cache with clt extract (it gets a directory of its own)")
    if attributes.get("checksum") != checksum(attributes):
        raise UserError(f"{file} is damaged (its checksum is wrong); {again}")
    return attributes


def zarr_json(path: Place) -> bytes | None:
    """The group's own; None where there is none."""
    try:
        return Store(path).get("zarr.json") if isinstance(path, Remote) else (path / "zarr.json").read_bytes()
    except FileNotFoundError:
        return None


def damage(path: Place, attributes: Json, files: Files | None = None) -> Iterator[tuple[str, int, str]]:
    """(array, chunk, what is wrong) for every chunk file that is not there or has another size, and ("", 0, what) for
    metadata. Sizes only: what is inside is checked when it is read. In a store one listing tells them; of its metadata,
    which readers of this program do not need, it says whether it is there."""
    files = files or files_of(path, attributes)
    for name, entry in attributes["manifest"]["arrays"].items():
        spec = spec_of(entry)
        for chunk in range(spec.n_chunks):
            size = files.size(spec.file(Path(), name, chunk).as_posix())
            if size is None:
                yield name, chunk, "is missing"
            elif size != (whole := file_bytes(entry, chunk)):
                what = "truncated" if size < whole else "too long"
                yield name, chunk, f"is {what} ({size:,} bytes, not {whole:,})"
    for name, expected in attributes["manifest"]["metadata"].items():
        if isinstance(path, Remote):
            is_there = files.size(name) is not None
        else:
            is_there = (path / name).exists() and google_crc32c.value((path / name).read_bytes()) == expected
        if not is_there:
            yield "", 0, f"{path / name} is missing or damaged"


def _refusal(path: Place, request: Json, name: str, chunk: int, what: str) -> UserError:
    subject = f"{path}: chunk {chunk} of {name} {what}" if name else what
    fix = repair(path, request) if isinstance(path, Remote) else command_of(request, path.parent)
    return UserError(f"{subject}; make it again: {fix}")
