"""A cache opens with other libraries, and with what docs/cache.md says alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import torch
import xarray
import zarr

from pipeline.data.cache import Cache
from pipeline.data.layout import SITES
from pipeline.data.shuffle import Permutation
from pipeline.data.tokens import Split
from tests.data import fake
from tests.data.fake import D, L, T

PAGE = (Path(__file__).parents[2] / "docs/cache.md").read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache.open(fake.extract(tmp_path_factory.mktemp("cache")))


def arrays(cache: Cache) -> dict[str, np.ndarray]:
    """Every array as our own reader has it."""
    norm = cache.norm
    found = {"tokens": cache.tokens, "norm/gain": norm.gain.numpy(), "norm/bias": norm.bias.numpy()}
    for name in ("resid_mid", "mlp_out"):
        found[name] = np.concatenate([cache.map_chunk(name, shard.chunk) for shard in cache.shards()])
    for split in (Split.calibration, Split.evaluation):
        tokens, *rows = cache.held_out(split)
        found[f"{split}/tokens"] = tokens
        found |= {
            f"{split}/{name}": values.view(torch.uint16).numpy()
            for name, values in zip(("resid_mid", "mlp_out"), rows, strict=True)
        }
    for site in SITES:
        found |= {
            f"stats/{site}/{part}": values.numpy()
            for part, values in zip(("mean", "std", "rms"), cache.stats(site), strict=True)
        }
    return found


def through_zarr(path: Path, name: str) -> Any:
    return zarr.open_array(path / name, mode="r")[:]


def through_xarray(path: Path, name: str) -> Any:
    group, _, variable = name.rpartition("/")
    with xarray.open_zarr(path, group=group or None, consolidated=False) as data:
        return data[variable].values


def through_tensorstore(path: Path, name: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / name)}}
    return tensorstore.open(spec, read=True).result().read().result()


@pytest.mark.parametrize("read", [through_zarr, through_xarray, through_tensorstore])
def test_another_library_reads_the_same_numbers(cache: Cache, read: Any) -> None:
    expected = arrays(cache)
    assert set(expected) == set(cache.specs)
    for name, values in expected.items():
        found = read(cache.path, name)
        assert found.dtype == values.dtype, name
        assert found.tobytes() == values.tobytes(), name


@pytest.mark.parametrize("read", [through_zarr, through_xarray, through_tensorstore])
def test_the_bits_are_bfloat16(cache: Cache, read: Any) -> None:
    bits = read(cache.path, "mlp_out")
    _, position, token = cache.locate(np.arange(cache.n_rows))
    phase = token[:, None, None] * 1.7 + position[:, None, None] * 0.31
    phase = phase + np.arange(L)[:, None] * 0.9 + np.arange(D) * 2.3
    values = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    np.testing.assert_allclose(values, np.cos(phase * 1.1), rtol=2**-8, atol=1e-4)


def test_xarray_and_tensorstore_know_the_dimensions_by_name(cache: Cache) -> None:
    data = xarray.open_zarr(cache.path, consolidated=False)
    assert data.sizes == {"row": 244, "layer": L, "d_model": D, "context": 41, "position": T}
    assert data["resid_mid"].dims == ("row", "layer", "d_model")
    assert data["resid_mid"].attrs["logical_dtype"] == "bfloat16"
    assert data.attrs["norm"] == {"kind": "layer", "eps": 1e-5}
    assert xarray.open_zarr(cache.path, group="stats/mlp_in", consolidated=False)["rms"].dims == ("layer",)
    kvstore = {"driver": "file", "path": str(cache.path / "calibration/mlp_out")}
    store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    assert store.domain.labels == ("row", "layer", "d_model")


# A reader and a writer made from docs/cache.md: nothing of the program is used from here to the line of dashes.


class Stranger:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = json.loads((path / "zarr.json").read_text())["attributes"]
        assert (self.about["kind"], self.about["schema"]) == ("clt-cache", 1)
        rest = {key: value for key, value in self.about.items() if key != "checksum"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert google_crc32c.value(text.encode()) == self.about["checksum"]
        for name, crc in self.about["manifest"]["metadata"].items():
            assert google_crc32c.value((path / name).read_bytes()) == crc

    def array(self, name: str) -> np.ndarray:
        entry = self.about["manifest"]["arrays"][name]
        length, *rest = entry["shape"]
        rows, dtype, pieces = entry["chunk_rows"], np.dtype(entry["dtype"]).newbyteorder("<"), []
        assert len(entry["crc32c"]) == -(-length // rows)
        for chunk, crc in enumerate(entry["crc32c"]):
            data = (self.path / name / "c" / str(chunk) / "/".join("0" * len(rest))).read_bytes()
            assert data[-4:] == crc.to_bytes(4, "little")
            assert google_crc32c.value(data[:-4]) == crc
            pieces.append(np.frombuffer(data[:-4], dtype).reshape(rows, *rest))
        return np.concatenate(pieces)[:length]

    def token_of(self, row: int) -> tuple[int, int, int]:
        """context, position, token"""
        n, seed = self.about["n_rows"]["train"], self.about["seed"]
        [t] = [t for t in range(n) if permuted(t, n, seed) == row]
        context, position = t // (self.about["context"] - 1), 1 + t % (self.about["context"] - 1)
        return context, position, int(self.array("tokens")[context, position])


def permuted(t: int, n: int, seed: int) -> int:
    w = max(2, (n - 1).bit_length())
    low = w // 2
    high = w - low
    while True:
        a, b, a_bits, b_bits = t >> low, t % 2**low, high, low
        for r in range(6 if n > 65536 else 12):
            digest = hashlib.blake2b(f"{seed}\0feistel\0{r}".encode(), digest_size=8).digest()
            x = (b + (int.from_bytes(digest, "little") >> 1)) % 2**64
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
            a, b, a_bits, b_bits = b, a ^ (x >> (64 - a_bits)), b_bits, a_bits
        t = a * 2**b_bits + b
        if t < n:
            return t


def write_by_hand(path: Path, values: dict[str, np.ndarray], seed: int, context: int) -> None:
    """The training rows are given in the order of their tokens."""
    n, entries, metadata = len(values["mlp_out"]), {}, {}
    groups = {"/".join(name.split("/")[:i]) for name in values for i in range(1, name.count("/") + 1)}
    for name, value in values.items():
        if name in ("resid_mid", "mlp_out"):
            stored = np.empty_like(value)
            stored[[permuted(t, n, seed) for t in range(n)]] = value
        else:
            stored = value
        rows = min(4, len(stored))
        n_chunks = -(-len(stored) // rows)
        padded = np.zeros((n_chunks * rows, *stored.shape[1:]), stored.dtype)
        padded[: len(stored)] = stored
        crcs = []
        for i in range(n_chunks):
            data = padded[i * rows : (i + 1) * rows].astype(stored.dtype.newbyteorder("<")).tobytes()
            crcs.append(google_crc32c.value(data))
            file = (path / name / "c" / str(i)).joinpath(*["0"] * (stored.ndim - 1))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data + crcs[-1].to_bytes(4, "little"))
        dims = ["context", "position"] if name.endswith("tokens") else ["row", "layer", "d_model"][-stored.ndim :]
        dims = ["layer"] if name.endswith("rms") else dims
        sizes = {"shape": list(stored.shape), "chunk_rows": rows, "dtype": stored.dtype.name, "dims": dims}
        entries[name] = sizes | {"crc32c": crcs}
        metadata[f"{name}/zarr.json"] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(stored.shape),
            "data_type": stored.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *stored.shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "dimension_names": dims,
        }
    metadata |= {f"{name}/zarr.json": {"zarr_format": 3, "node_type": "group", "attributes": {}} for name in groups}
    for name, content in metadata.items():
        (path / name).write_text(json.dumps(content))
    about = {"kind": "clt-cache", "schema": 1, "request": {}, "context": context, "seed": seed, "created": "2026-01-01"}
    about["norm"] = {"kind": "layer", "eps": 1e-5}
    about["manifest"] = {
        "arrays": entries,
        "metadata": {name: google_crc32c.value((path / name).read_bytes()) for name in metadata},
    }
    text = json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    about["checksum"] = google_crc32c.value(text.encode())
    (path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": about}))


# ----------------------------------------------------------------------------------------------------------------------


def test_a_reader_written_from_the_page_finds_the_same_rows_and_tokens(cache: Cache) -> None:
    stranger = Stranger(cache.path)
    for name, values in arrays(cache).items():
        assert stranger.array(name).tobytes() == values.tobytes(), name
    context, position, token = cache.locate(np.arange(0, 244, 40))
    for i, row in enumerate(range(0, 244, 40)):
        assert stranger.token_of(row) == (context[i], position[i], token[i])


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (2, 1), (10, 7), (244, 7), (65_536, 3), (65_537, 3), (100_000, 7)])
def test_the_permutation_of_the_page_is_ours(n: int, seed: int) -> None:
    some = np.arange(0, n, 1 + n // 50)
    assert [permuted(int(t), n, seed) for t in some] == Permutation(n, seed).forward(some).tolist()


def test_the_worked_examples_of_the_page_are_right() -> None:
    ten = [permuted(t, 10, 7) for t in range(10)]
    many = [permuted(t, 100_000, 7) for t in range(4)]
    for n, seed, values in ((10, 7, ten), (100_000, 7, many)):
        assert f"n = {n:,}, seed = {seed}: {', '.join(map(str, values))}" in PAGE


def test_the_page_names_every_array_and_attribute(cache: Cache) -> None:
    for name in cache.attributes:
        assert f"`{name}`" in PAGE, name
    for entry in cache.attributes["manifest"]["arrays"].values():
        for key in entry:
            assert f'"{key}"' in PAGE


def test_a_cache_written_from_the_page_opens_with_ours_and_with_the_others(cache: Cache, tmp_path: Path) -> None:
    values = arrays(cache)
    order = Permutation(cache.n_rows, 7).forward(np.arange(cache.n_rows))
    given = {name: value[order] if name in ("resid_mid", "mlp_out") else value for name, value in values.items()}
    write_by_hand(tmp_path, given, seed=7, context=T)
    written = Cache.open(tmp_path)
    assert len(written.shards()) == 61
    for name, value in arrays(written).items():
        assert value.tobytes() == values[name].tobytes(), name
        for read in (through_zarr, through_xarray, through_tensorstore):
            assert read(tmp_path, name).tobytes() == value.tobytes()
    rows = np.arange(cache.n_rows)
    assert all((a == b).all() for a, b in zip(written.locate(rows), cache.locate(rows), strict=True))
