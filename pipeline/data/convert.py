"""A cache with its training rows stored by another codec. Held-out rows stay raw: metrics are against them.

    convert(Cache.open(path), Codec["int8"])      # -> a cache beside it, named by the request with the new codec

1. int8 chooses its scales from a sample: the rows of the first shards, which are a random draw, since rows are stored
   in an order that is random over the whole cache.
2. Each chunk is read (and checked), encoded and written aside; one that is there is not made again, so a conversion
   that was stopped goes on with the same command. Errors of a chunk are noted before it gets its name.
3. The small arrays are copied, then Zarr's metadata written, the group's own `zarr.json` last.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import root
from pipeline.data.cache import Cache
from pipeline.data.codecs import LOSSLESS, Int8, Loss, compress, encoded, fit_int8, sample_rows, told, warning_of
from pipeline.data.commands import command_of, is_conversion
from pipeline.data.condition import damage, read_attributes
from pipeline.data.journal import read_state
from pipeline.data.layout import (
    CRC_BYTES,
    JOURNAL,
    STORED,
    Json,
    check_codec,
    directory_of,
    file_bytes,
    gb,
    little,
    with_codec,
)
from pipeline.data.options import Codec
from pipeline.data.plan import disk_of, free_bytes
from pipeline.data.publish import mend_root, publish
from pipeline.errors import UserError
from pipeline.files import take_lock, write_aside
from pipeline.progress import Progress


def convert(source: Cache, codec: Codec) -> Path:
    """-> the directory of the new cache, finished; one that is damaged is made anew. Raises UserError for a source that
    has lost bits, for a codec that would lose bits of what targets are recomputed from, for a full disk, and when
    another process is at work there."""
    assert isinstance(source.path, Path), "caches are converted on a disk"
    if source.codec is codec:
        return source.path
    if source.codec not in LOSSLESS:
        raise UserError(f"{source.path} is stored as {source.codec}, which has lost bits; convert the raw cache")
    check_codec(codec, source.targets)
    request = source.request | {"codec": codec.value}
    path = directory_of(source.path.parent, request)
    mend_root(path, request)
    if (path / root.NAME).exists():
        if next(damage(path, read_attributes(path)), None) is None:
            return path
        root.forget(path)  # first: what is being removed is no cache
        shutil.rmtree(path)
    _check_space(source, codec, path)
    lock = take_lock(path / JOURNAL, path)
    try:
        if (begun := read_state(path)) is not None and not is_conversion(begun):
            fix = f"go on with {command_of(request, path.parent)}, or remove it"
            raise UserError(f"{path} is being made by clt extract, which is not finished; {fix}")
        conversion = _Conversion(source, codec, path)
        made = {"codec": {"name": codec.value, "from": source.path.name}, "n_chunks": conversion.n_chunks}
        about = source.attributes | {"request": request} | made
        del about["created"], about["checksum"]
        write_aside(path / JOURNAL / "state.json", json.dumps(about).encode())
        conversion.run(request)
        shutil.rmtree(path / JOURNAL)
    finally:
        os.close(lock)
    return path


class _Conversion:
    def __init__(self, source: Cache, codec: Codec, path: Path) -> None:
        self.source, self.codec, self.path = source, codec, path
        self.specs = with_codec(source.specs, codec)
        self.crcs: dict[str, dict[int, int]] = {name: {} for name in self.specs}

    @property
    def n_chunks(self) -> int:
        """Of all arrays."""
        return sum(spec.n_chunks for spec in self.specs.values())

    def run(self, request: Json) -> None:
        codes = {name: self._code(name) if self.codec is Codec["int8"] else None for name in self.source.stored}
        with Progress(self.n_chunks, unit="chunks", desc=f"to {self.codec}") as progress:
            for name, spec in self.specs.items():
                for chunk in range(spec.n_chunks):
                    file = spec.file(self.path, name, chunk)
                    if not file.exists():
                        self._write(name, chunk, file, codes.get(name))
                    with file.open("rb") as stream:
                        stream.seek(-CRC_BYTES, os.SEEK_END)
                        self.crcs[name][chunk] = int.from_bytes(stream.read(), "little")
                    progress.update(1)
        about = {k: v for k, v in self.source.attributes.items() if k != "codec"}
        publish(self.path, self.specs, about | {"request": request, "codec": self._about()}, self.crcs)

    def _write(self, name: str, chunk: int, file: Path, code: Int8 | None) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if name not in self.source.stored or self.codec is Codec.raw:
            data = self._plain(name, chunk)
        else:
            data = self._encoded(name, chunk, code)
        write_aside(file, data + int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little"))

    def _plain(self, name: str, chunk: int) -> bytes:
        if name.startswith("codec/"):
            return self._code_file(name).read_bytes()
        return self._chunk(name, chunk).tobytes()

    def _chunk(self, name: str, chunk: int) -> NDArray[Any]:
        """A whole chunk of the source, padding included."""
        spec = self.source.specs[name]
        out = np.empty(spec.chunk_shape, little(spec.dtype))
        self.source.read_chunk(name, chunk, out)
        return out

    def _encoded(self, name: str, chunk: int, code: Int8 | None) -> bytes:
        bits = self._chunk(name, chunk)
        if code is None:
            return compress(self.codec, bits)
        rows = torch.from_numpy(bits).view(torch.bfloat16)
        q = torch.zeros(rows.shape, dtype=torch.int8)  # padding stays zero
        n = self.source.specs[name].rows_in(chunk)
        q[:n], lost = encoded(code, rows[:n])
        write_aside(self._loss_file(name, chunk), lost.numpy().tobytes())
        return q.numpy().tobytes()

    def _code(self, name: str) -> Int8:
        """The scales: chosen once, and kept for a conversion that goes on."""
        files = {part: self._code_file(f"codec/{name}/{part}") for part in Int8._fields}
        shape = self.source.specs[name].shape[1:]
        if not all(file.exists() for file in files.values()):
            code = fit_int8(self._sample(name))
            for part, file in files.items():
                write_aside(file, np.ascontiguousarray(getattr(code, part).numpy(), "<f4").tobytes())
        return Int8(*(torch.from_numpy(np.fromfile(file, "<f4").reshape(shape)) for file in files.values()))

    def _sample(self, name: str) -> torch.Tensor:
        wanted, parts = sample_rows(*self.source.specs[name].shape[1:]), []
        for chunk in range(self.source.specs[name].n_chunks):
            rows = self._chunk(name, chunk)[: self.source.specs[name].rows_in(chunk)][:wanted]
            parts.append(rows)
            wanted -= len(rows)
            if not wanted:
                break
        return torch.from_numpy(np.concatenate(parts)).view(torch.bfloat16)

    def _about(self) -> Json:
        """Attributes that say what the codec did."""
        about: Json = {"name": self.codec.value, "from": self.source.path.name}
        if self.codec is Codec["int8"]:
            for name in self.source.stored:
                about[name] = self._loss(name)
        plain: Json = json.loads(json.dumps(about))
        return plain

    def _loss(self, name: str) -> Json:
        spec = self.source.specs[name]
        total = np.zeros((2, *spec.shape[1:]))
        for chunk in range(spec.n_chunks):
            total += np.fromfile(self._loss_file(name, chunk)).reshape(total.shape)
        return told(total, self.source.stats(name)[1].numpy(), spec.shape[0])

    def _code_file(self, name: str) -> Path:
        return self.path / JOURNAL / name.replace("/", "-")

    def _loss_file(self, name: str, chunk: int) -> Path:
        return self.path / JOURNAL / f"loss-{name}-{chunk}"


def _check_space(source: Cache, codec: Codec, path: Path) -> None:
    """Compressed sizes are not known before: as large as raw, then."""
    rows = sum(spec.n_chunks * spec.file_bytes for name, spec in source.specs.items() if name in source.stored)
    needed, free = rows // 2 if codec is Codec["int8"] else rows, free_bytes(path)
    if needed > free:
        sizes = f"up to {gb(needed)} to write, {gb(free)} free on {disk_of(path)}"
        raise UserError(f"{path} does not fit: {sizes}; make room first")


def describe(cache: Cache) -> Iterator[str]:
    """Lines: bytes a token, ratio to raw, and what was lost."""
    arrays, spec = cache.attributes["manifest"]["arrays"], cache.specs[STORED[0]]
    stored = sum(file_bytes(arrays[name], chunk) for name in cache.stored for chunk in range(spec.n_chunks))
    per_token, raw = stored / spec.shape[0], 2 * len(cache.stored) * int(np.prod(spec.shape[1:]))
    yield f"{cache.codec}: {per_token:,.0f} bytes a token, {raw / per_token:.2f} times smaller than raw ({raw:,})"
    for name in cache.stored if cache.codec is Codec["int8"] else ():
        loss = cache.attributes["codec"][name]
        layer, dim = loss["worst_channel"]
        if line := warning_of(name, Loss(*(loss[field] for field in Loss._fields))):
            yield line
        yield (
            f"{name}: FVU {loss['fvu']:.2g} against bfloat16, worst channel {loss['worst_fvu']:.2g} (layer {layer}, "
            f"dimension {dim}), {100 * loss['clipped']:.2g} % of the numbers clipped"
        )
