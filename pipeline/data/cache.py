"""The activation cache on disk: its layout, and the reader.

A cache is a Zarr v3 group, `<cache.dir>/<model>-<dataset>-<key>/`, which any Zarr reader opens:

    zarr.json                  attributes, the manifest among them. Written last: nothing opens a directory without it
    tokens                     int32 [n_contexts, T]
    resid_mid, mlp_out         uint16 [N, L, D], the bits of bfloat16, in an order that `shuffle.py` computes;
                               without mlp_out where targets are recomputed (cache.targets=recompute)
    norm/, stats/<site>/       of the norm in front of each MLP, and over the training rows
    calibration/, evaluation/  tokens, resid_mid, mlp_out of the held-out contexts, in the order of the tokens

An array is cut along its first axis; each chunk is one file of plain little-endian numbers and a 4-byte crc32c, so that
it can be memory-mapped. To Zarr a missing chunk is zeros; here the manifest is the truth: what it does not list does
not exist, and a file that differs from it is refused. The name of the directory is the hash of what was asked for.
"""

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.normalize import MlpNorm
from pipeline.data.address import Place
from pipeline.data.chunk_files import Files, files_of
from pipeline.data.codecs import Int8, decompress
from pipeline.data.condition import damage, read_attributes, refusal
from pipeline.data.layout import (
    CRC_BYTES,
    SITES,
    STORED,
    Json,
    checksum_in,
    file_bytes,
    key_of,
    little,
    prefix,
    read_into,
    spec_of,
    stored,
    stored_bytes,
)
from pipeline.data.options import Codec, Targets
from pipeline.data.pieces import Piece, Shard, Source
from pipeline.data.shuffle import Permutation
from pipeline.data.tokens import Split
from pipeline.errors import UserError


class Cache:
    """A finished cache, opened for reading. Every chunk is checked against its checksum when it is first read."""

    def __init__(self, path: Place, attributes: Json, files: Files | None = None) -> None:
        self.path = path
        self._files = files or files_of(path, attributes)
        self.attributes = attributes
        self.specs = {name: spec_of(entry) for name, entry in attributes["manifest"]["arrays"].items()}
        self._checked: set[tuple[str, int]] = set()
        self._tokens: NDArray[np.int32] | None = None
        self._codes: dict[str, Int8 | None] = {}

    @classmethod
    def open(cls, path: Place) -> "Cache":
        """A finished cache, plain or merged. Raises UserError, with the fix, for a directory that is none, one of
        another schema, and one in which a listed file is missing or of another size."""
        attributes = read_attributes(path)
        files = files_of(path, attributes)
        if damaged := next(damage(path, attributes, files), None):
            raise refusal(path, attributes["request"], *damaged)
        if "parts" in attributes:
            from pipeline.data.merged import Merged  # made of caches

            return Merged(path, attributes, files)
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
    def targets(self) -> Targets:
        """Whether training rows hold mlp_out; held-out ones always do."""
        return Targets.stored if "mlp_out" in self.specs else Targets.recompute

    @property
    def stored(self) -> tuple[str, ...]:
        """The arrays of training rows: resid_mid and, but for targets that are recomputed, mlp_out."""
        return stored(self.specs)

    @property
    def codec(self) -> Codec:
        """How the training rows are stored; held-out ones are always raw."""
        spec = self.specs[STORED[0]]
        if spec.compressor is not None:
            return Codec(spec.compressor)
        return Codec["int8"] if spec.dtype == "int8" else Codec.raw

    def code(self, name: str) -> Int8 | None:
        """What the numbers of an int8 array stand for; None where they are the bits of bfloat16."""
        if name not in self._codes:
            numbers = [f"codec/{name}/{part}" for part in ("scale", "offset") if self.specs[name].dtype == "int8"]
            self._codes[name] = Int8(*(torch.from_numpy(self._array(n)) for n in numbers)) if numbers else None
        return self._codes[name]

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
        return self._array(prefix(split) + "tokens"), *self.held_out_rows(split)

    def held_out_tokens(self, split: Split) -> NDArray[np.int32]:
        """The contexts of a held-out split, int32 [n, T]."""
        return self._array(prefix(split) + "tokens").astype(np.int32, copy=False)

    def held_out_rows(self, split: Split, n: int | None = None) -> tuple[Tensor, Tensor]:
        """resid_mid, mlp_out of the first n rows of a held-out split, or of all that it has; no more chunks are read
        than hold them. bfloat16 [n, L, D]"""
        assert split is not Split.train
        resid_mid, mlp_out = (
            torch.from_numpy(self._array(prefix(split) + name, n)).view(torch.bfloat16) for name in STORED
        )
        return resid_mid, mlp_out

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """(context, position, token id) of training rows, each [k]."""
        order = Permutation(self.n_rows, self.attributes["seed"])
        context, position = np.divmod(order.inverse(np.asarray(rows)), self.context - 1)
        return context, position + 1, self.tokens[context, position + 1]

    def shards(self) -> list[Shard]:
        """Every training row, in the pieces in which they are read: here chunk by chunk."""
        spec = self.specs["resid_mid"]
        return [Shard(i, (Piece(0, i, 0, spec.rows_in(i), i * spec.chunk_rows),)) for i in range(spec.n_chunks)]

    def buffer(self, name: str) -> NDArray[Any]:
        """Room for the rows of any shard."""
        spec = self.specs[name]
        return np.empty(spec.chunk_shape, little(spec.dtype))

    def bring(self, shard: Shard, name: str, out: NDArray[Any] | None) -> list[Source]:
        """The rows of a shard: mapped, or read into `out`, a `buffer`."""
        chunk = shard.chunk
        rows = self.map_chunk(name, chunk) if out is None else self.read_chunk(name, chunk, out)
        return [Source(rows, self.code(name))]

    def owner(self, piece: Piece) -> "Cache":
        """In whose files a piece lies."""
        assert piece.part == 0
        return self

    def hold(self, shard: Shard) -> list[io.FileIO]:
        """The files of a shard, open: of a remote cache they are fetched by this, and stay until they are closed."""
        with ExitStack() as stack:
            files = []
            for name, piece in product(self.stored, shard.pieces):
                cache = self.owner(piece)
                with cache._refusing(name, piece.chunk):
                    files.append(stack.enter_context(cache._open(name, piece.chunk)))
            stack.pop_all()
        return files

    def check_room(self, n_shards: int) -> None:
        """Raises UserError when the files of so many shards of a remote cache cannot be on this machine at once."""
        self._files.check_room(n_shards * self.shard_bytes)

    @property
    def shard_bytes(self) -> int:
        """Size of the files that the largest shard lies in."""
        return max(
            sum(self.owner(piece)._file_bytes(name, piece.chunk) for name in self.stored for piece in shard.pieces)
            for shard in self.shards()
        )

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
        with self._refusing(name, chunk), self._open(name, chunk) as file:
            read_into(file, 0, out)
        if (name, chunk) not in self._checked:
            self._compare(name, chunk, google_crc32c.value(out))
        return out[: spec.rows_in(chunk)]

    def read_rows(self, name: str, chunk: int, start: int, out: NDArray[Any]) -> None:
        """Rows of a chunk from `start` on, as many as `out` has (contiguous). The first time, all of the chunk is read
        and checked. Not for compressed arrays."""
        spec = self.specs[name]
        assert spec.compressor is None
        assert out.dtype == little(spec.dtype)
        with self._refusing(name, chunk), self._open(name, chunk) as file:
            if (name, chunk) not in self._checked:
                self._compare(name, chunk, checksum_in(file, spec.chunk_bytes))
            read_into(file, start * out.nbytes // max(1, len(out)), out)

    def rows(self, name: str, chunk: int) -> Tensor:
        """The rows of a chunk of a stored array, decoded: bfloat16 [n, L, D]."""
        spec, code = self.specs[name], self.code(name)
        stored = torch.from_numpy(self.read_chunk(name, chunk, np.empty(spec.chunk_shape, little(spec.dtype))))
        if code is None:
            return stored.view(torch.bfloat16)
        return code.decode(stored, torch.empty(stored.shape, dtype=torch.bfloat16))

    def _decompressed(self, name: str, chunk: int, out: NDArray[Any]) -> NDArray[Any]:
        spec = self.specs[name]
        with self._refusing(name, chunk), self._open(name, chunk) as file:
            data = file.readall()
            if len(data) != self._file_bytes(name, chunk):
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
            raise refusal(self.path, self.request, name, chunk, what) from error

    def _array(self, name: str, n: int | None = None) -> NDArray[Any]:
        """A whole array, in memory; or its first n rows."""
        spec = self.specs[name]
        n_rows = spec.shape[0] if n is None else min(n, spec.shape[0])
        n_chunks = -(-n_rows // spec.chunk_rows)
        whole = np.empty((n_chunks, *spec.chunk_shape), little(spec.dtype))
        for chunk in range(n_chunks):
            self.read_chunk(name, chunk, whole[chunk])
        return whole.reshape(-1, *spec.shape[1:])[:n_rows]

    def _compare(self, name: str, chunk: int, checksum: int) -> None:
        if checksum != self.attributes["manifest"]["arrays"][name]["crc32c"][chunk]:
            key = self._key(name, chunk)
            what = f"{self.path / key} does not hold what was written (wrong checksum)"
            raise UserError(f"{what}; make it again: {self._files.again(key)}")
        self._checked.add((name, chunk))

    def _file_bytes(self, name: str, chunk: int) -> int:
        return file_bytes(self.attributes["manifest"]["arrays"][name], chunk)

    def _key(self, name: str, chunk: int) -> str:
        return self.specs[name].file(Path(), name, chunk).as_posix()

    def _open(self, name: str, chunk: int) -> io.FileIO:
        return self._files.open(self._key(name, chunk))
