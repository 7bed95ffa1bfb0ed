"""A cache in another codec: the same rows, or as near as is said, for every reader."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.data import convert as module
from pipeline.data.cache import Cache
from pipeline.data.codecs import COMPRESSED
from pipeline.data.convert import convert, describe
from pipeline.data.layout import JOURNAL, STORED
from pipeline.data.loader import Loader
from pipeline.data.options import Codec, Read
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import stored_files

CODECS = [codec for codec in Codec if codec is not Codec.raw]


@pytest.fixture
def raw(tmp_path: Path) -> Cache:
    return Cache.open(fake.extract(tmp_path))


def batches(cache: Cache, read: Read = Read.auto, n: int = 7) -> list[torch.Tensor]:
    found = []
    with Loader(cache, batch_tokens=40, seed=3, read=read) as loader:
        for _ in range(n):
            batch = next(loader)
            found.append(torch.stack([batch.resid_mid, batch.mlp_out]).clone())
            assert len(batch.rows) == 40
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_a_converted_cache_is_beside_its_source_and_the_loader_gives_its_rows(raw: Cache, codec: Codec) -> None:
    path = convert(raw, codec)
    assert path.parent == raw.path.parent
    cache = Cache.open(path)
    assert cache.codec is codec
    assert not (path / JOURNAL).exists()
    assert cache.request == raw.request | {"codec": codec.value}
    for one, other in zip(batches(cache), batches(raw), strict=True):
        if codec in COMPRESSED:
            assert torch.equal(one, other)
        else:
            assert not torch.equal(one, other)
            torch.testing.assert_close(one.float(), other.float(), rtol=2**-8, atol=0.03)
    for split in (Split.calibration, Split.evaluation):  # metrics are against raw targets
        for one, other in zip(cache.held_out(split)[1:], raw.held_out(split)[1:], strict=True):
            assert torch.equal(one, other)
    for one, other in zip(cache.stats("mlp_out"), raw.stats("mlp_out"), strict=True):
        assert torch.equal(one, other)
    assert (cache.tokens == raw.tokens).all()
    assert cache.n_bytes == sum(file.stat().st_size for file in path.rglob("c/*") if file.is_file()) + sum(
        file.stat().st_size for file in path.rglob("c/**/*") if file.is_file() and file.parent.name != "c"
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
def test_plain_zarr_reads_it(raw: Cache, codec: Codec) -> None:
    group = zarr.open_group(convert(raw, codec), mode="r")
    plain = zarr.open_group(raw.path, mode="r")
    for name in STORED:
        values = group[name][:]
        if codec in COMPRESSED:
            assert (values == plain[name][:]).all()
            continue
        exact = torch.from_numpy(plain[name][:]).view(torch.bfloat16).float().numpy()
        seen = group[f"codec/{name}/offset"][:] + group[f"codec/{name}/scale"][:] * values
        assert np.abs(seen - exact).max() < 0.03
        assert "offset + scale * q" in group[name].attrs["value"]


def test_what_int8_loses_is_measured_by_its_formula_and_said(raw: Cache) -> None:
    cache = Cache.open(convert(raw, Codec["int8"]))
    for name in STORED:
        stored, exact = (torch.empty(0), torch.empty(0))
        for shard in raw.shards():
            bits = np.empty(raw.specs[name].chunk_shape, "<u2")
            exact = torch.cat([exact, torch.from_numpy(raw.read_chunk(name, shard.chunk, bits)).view(torch.bfloat16)])
            q = np.empty(cache.specs[name].chunk_shape, np.int8)
            code = cache.code(name)
            assert code is not None
            rows = torch.from_numpy(cache.read_chunk(name, shard.chunk, q).copy())
            stored = torch.cat([stored, code.decode(rows, torch.empty(rows.shape, dtype=torch.bfloat16))])
        error = (stored.double() - exact.double()).square().sum(0)
        spread = (exact.double() - exact.double().mean(0)).square().sum(0)
        about = cache.attributes["codec"][name]
        assert about["fvu"] == pytest.approx((error.sum() / spread.sum()).item(), rel=1e-9)
        np.testing.assert_allclose(about["fvu_by_channel"], (error / spread).numpy(), rtol=1e-9)
        worst = (error / spread).argmax().item()
        assert about["worst_fvu"] == pytest.approx((error / spread).max().item(), rel=1e-9)
        assert about["worst_channel"] == [worst // raw.d_model, worst % raw.d_model]
        assert about["clipped"] == 0  # the sample is the whole of this cache, and sines have no tails
    lines = list(describe(cache))
    assert lines[0] == "int8: 32 bytes a token, 1.88 times smaller than raw (60)" or "times smaller" in lines[0]
    assert "FVU" in lines[1]
    assert "worst channel" in lines[2]


@pytest.mark.parametrize("codec", CODECS)
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(
    raw: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec
) -> None:
    path = convert(raw, codec)
    whole = stored_files(path)
    n_steps = 0
    write_aside = module.write_aside

    def failing(file: Path, data: bytes) -> None:
        nonlocal n_steps
        n_steps -= 1
        if n_steps < 0:
            raise KeyboardInterrupt
        write_aside(file, data)

    monkeypatch.setattr(module, "write_aside", failing)
    shutil.rmtree(path)
    written: list[int] = []
    for _ in range(100):
        n_steps = 5
        try:
            convert(raw, codec)
            break
        except KeyboardInterrupt:
            assert not (path / "zarr.json").exists()
            with pytest.raises(UserError, match=rf"not finished; go on with: clt cache convert .* codec={codec}"):
                Cache.open(path)
            written.append(sum(file.is_file() for file in path.rglob("c/**/*")))
    assert written == sorted(written)
    assert len(written) > 2
    assert stored_files(path) == whole


@pytest.mark.parametrize("codec", COMPRESSED)
def test_back_to_raw_are_the_bytes_of_the_first_one(raw: Cache, codec: Codec) -> None:
    before = stored_files(raw.path)
    packed = Cache.open(convert(raw, codec))
    shutil.rmtree(raw.path)
    again = convert(packed, Codec.raw)
    assert again == raw.path
    after = stored_files(again)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"zarr.json"}
    about = json.loads(after["zarr.json"])["attributes"]["codec"]
    assert about == {"name": "raw", "from": packed.path.name}


def test_lost_bits_do_not_come_back(raw: Cache) -> None:
    cache = Cache.open(convert(raw, Codec["int8"]))
    for codec in (Codec.raw, Codec["pcodec"]):
        with pytest.raises(UserError, match="stored as int8, which has lost bits; convert the raw cache"):
            convert(cache, codec)


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_compressed_cache_cannot_be_mapped_and_a_damaged_file_is_named(raw: Cache, codec: Codec) -> None:
    path = convert(raw, codec)
    with pytest.raises(UserError, match=f"cache.read=mmap: a {codec} cache has to be decoded"):
        Loader(Cache.open(path), batch_tokens=8, seed=0, read=Read.mmap)
    file = next(file for file in sorted((path / "mlp_out/c").rglob("*")) if file.is_file())
    data = bytearray(file.read_bytes())
    data[20] ^= 4
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=rf"{file} does not hold what was written .* clt extract .* cache.codec={codec}"
    ):
        batches(Cache.open(path))
    file.write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"chunk 0 of mlp_out is truncated .*make it again: clt extract"):
        Cache.open(path)
    assert convert(raw, codec) == path  # made anew
    for one, other in zip(batches(Cache.open(path)), batches(raw), strict=True):
        assert torch.equal(one, other)


def test_the_same_again_costs_nothing(raw: Cache, caplog: pytest.LogCaptureFixture) -> None:
    path = convert(raw, Codec["int8"])
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    caplog.set_level(logging.INFO)
    assert convert(raw, Codec["int8"]) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    assert convert(raw, Codec.raw) == raw.path
