"""Extracted in a codec: the bytes of a conversion, whoever makes them and however often they are stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data import codecs, inventory, spill
from pipeline.data.cache import Cache
from pipeline.data.codecs import COMPRESSED
from pipeline.data.commands import command_of
from pipeline.data.convert import convert
from pipeline.data.layout import JOURNAL, STORED, directory_of
from pipeline.data.loader import Loader
from pipeline.data.options import Codec, Write
from pipeline.data.tokens import Split
from pipeline.data.verify import problems
from pipeline.data.writer import Writer
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import Crash, FakeModel, stop_after, stored_files

INT8 = Codec["int8"]
CODECS = [codec for codec in Codec if codec is not Codec.raw]
WAYS = [(INT8, Write.scatter), (INT8, Write.spill), *((codec, Write.auto) for codec in COMPRESSED)]
N_BLOCKS, SAMPLED = 9, 7
"""Rows of the sample: two contexts."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of two contexts, and buckets of two shards."""
    monkeypatch.setattr(codecs, "SAMPLE_NUMBERS", SAMPLED * fake.L * fake.D)
    monkeypatch.setattr(spill, "BUCKET_BYTES", 3000)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[Codec, dict[str, bytes]]:
    """Of one process that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "SAMPLE_NUMBERS", SAMPLED * fake.L * fake.D)
        return {
            codec: stored_files(fake.extract(tmp_path_factory.mktemp(codec.value), codec=codec)) for codec in CODECS
        }


def name_of(codec: Codec) -> str:
    return directory_of(Path(), fake.request(seed=7) | {"codec": codec.value}).name


def chunks(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if "/c/" in name}


@pytest.mark.parametrize("codec", COMPRESSED)
def test_a_lossless_codec_gives_the_bytes_of_a_conversion(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]], codec: Codec
) -> None:
    converted = convert(Cache.open(fake.extract(tmp_path)), codec)
    files = stored_files(converted)
    assert chunks(alone[codec]) == chunks(files)
    assert alone[codec].keys() == files.keys()
    direct = Cache.open(fake.extract(tmp_path / "direct", codec=codec))
    mine, its = (cache.attributes for cache in (direct, Cache.open(converted)))
    assert (mine.pop("codec"), its.pop("codec")) == (
        {"name": codec.value, "from": None},
        {"name": codec.value, "from": directory_of(tmp_path, fake.request(seed=7)).name},
    )
    for attributes in (mine, its):
        del attributes["created"], attributes["checksum"]
    assert mine == its


def test_int8_has_the_arrays_and_attributes_of_a_conversion(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]]
) -> None:
    files = stored_files(convert(Cache.open(fake.extract(tmp_path)), INT8))
    assert alone[INT8].keys() == files.keys()
    same = {name for name in files if "/c/" in name and not name.startswith(("codec/", *STORED))}
    assert {name: alone[INT8][name] for name in same} == {name: files[name] for name in same}
    direct = Cache.open(fake.extract(tmp_path / "direct", codec=INT8))
    mine, its = direct.attributes, Cache.open(convert(Cache.open(fake.extract(tmp_path)), INT8)).attributes
    assert mine.keys() == its.keys()
    assert mine["codec"]["from"] is None
    assert mine["codec"].keys() == its["codec"].keys()
    assert mine["codec"]["mlp_out"].keys() == its["codec"]["mlp_out"].keys()
    assert direct.specs == Cache.open(convert(Cache.open(fake.extract(tmp_path)), INT8)).specs
    assert not list(problems(direct.path, mine, lambda n: None))


def test_int8_with_the_same_sample_gives_the_rows_of_a_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When both see all rows, both fit the same codes but for the rounding of a mean in another order."""
    monkeypatch.setattr(codecs, "SAMPLE_NUMBERS", 1 << 26)
    direct = Cache.open(fake.extract(tmp_path / "direct", codec=INT8))
    converted = Cache.open(convert(Cache.open(fake.extract(tmp_path)), INT8))
    for name in STORED:
        mine, its = direct.code(name), converted.code(name)
        assert mine is not None
        assert its is not None
        torch.testing.assert_close(mine.offset, its.offset)
        torch.testing.assert_close(mine.scale, its.scale)
        same = np.mean(
            [
                (direct.read_chunk(name, i, empty(direct)) == converted.read_chunk(name, i, empty(direct))).mean()
                for i in range(5)
            ]
        )
        assert same > 0.99


def empty(cache: Cache) -> np.ndarray:
    return np.empty(cache.specs["mlp_out"].chunk_shape, np.int8)


def test_what_int8_loses_is_that_of_a_raw_cache_of_the_same_text(tmp_path: Path) -> None:
    """The sample is two contexts, so numbers are clipped."""
    raw = Cache.open(fake.extract(tmp_path))
    cache = Cache.open(fake.extract(tmp_path, codec=INT8))
    with Loader(raw, 61, 0) as one, Loader(cache, 61, 0) as other:
        batches = [(next(one).mlp_out.clone(), next(other).mlp_out.clone()) for _ in range(4)]
    exact, seen = (torch.cat(values) for values in zip(*batches, strict=True))  # an epoch
    code, about = cache.code("mlp_out"), cache.attributes["codec"]["mlp_out"]
    assert code is not None
    assert torch.equal(seen, code.again(exact))
    error = (seen.double() - exact.double()).square().sum(0)
    spread = (exact.double() - exact.double().mean(0)).square().sum(0)
    np.testing.assert_allclose(about["fvu_by_channel"], (error / spread).numpy(), rtol=1e-9)
    assert about["fvu"] == pytest.approx((error.sum() / spread.sum()).item(), rel=1e-9)
    worst = int((error / spread).argmax())
    assert about["worst_channel"] == [worst // fake.D, worst % fake.D]
    assert about["worst_fvu"] == pytest.approx((error / spread).max().item(), rel=1e-9)
    outside = (exact.float() - code.offset).abs() > 127.5 * code.scale
    assert about["clipped"] == pytest.approx(outside.double().mean().item(), rel=1e-12)
    assert about["clipped"] > 0
    for split in (Split.calibration, Split.evaluation):
        for stored, plain in zip(cache.held_out(split)[1:], raw.held_out(split)[1:], strict=True):
            assert torch.equal(stored, plain)
    for site in ("resid_mid", "mlp_in", "mlp_out"):  # of the true rows
        for mine, its in zip(cache.stats(site), raw.stats(site), strict=True):
            assert torch.equal(mine, its)


@pytest.mark.parametrize(("codec", "write"), WAYS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_parts_give_the_bytes_of_one_process(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]], codec: Codec, write: Write, n: int
) -> None:
    order = list(range(n))
    random.Random(n).shuffle(order)
    calls = 0
    for i in order:
        model = FakeModel()
        path = fake.extract(tmp_path, model, part=f"{i}/{n}", write=write, codec=codec)
        calls += model.n_calls
    assert stored_files(path) == alone[codec]
    assert calls == 25 + (codec is INT8)  # the sample is one pass, made once


def test_the_batch_size_changes_no_stored_row(tmp_path: Path, alone: dict[Codec, dict[str, bytes]]) -> None:
    files = chunks(stored_files(fake.extract(tmp_path, codec=INT8, batch_tokens=5 * fake.T)))
    assert {name for name in files if files[name] != alone[INT8][name]} <= {n for n in files if n.startswith("stats/")}


@pytest.mark.parametrize(("codec", "write"), WAYS)
def test_stopped_after_every_block_it_goes_on_to_the_same_bytes(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]], codec: Codec, write: Write
) -> None:
    for number in range(N_BLOCKS):
        with pytest.raises(Crash):
            fake.extract(tmp_path, after_block=stop_after(number), write=write, codec=codec)
        found = inventory.look(tmp_path / name_of(codec))
        assert found is not None
        assert found.detail == f"{100 * (number + 1) // N_BLOCKS} %"
    with pytest.raises(UserError) as refusal:
        Cache.open(tmp_path / name_of(codec))
    command = command_of(fake.request(seed=7) | {"codec": codec.value}, tmp_path)
    assert str(refusal.value).endswith(f"is not finished; go on with: {command}")
    assert f"cache.codec={codec}" in command
    assert stored_files(fake.extract(tmp_path, codec=codec)) == alone[codec]


@pytest.mark.parametrize(("codec", "write"), WAYS)
def test_stopped_before_any_file_takes_its_name_it_goes_on_to_the_same_bytes(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, codec: Codec, write: Write
) -> None:
    """Each start comes two renamings further: codes, journal, sorted shards, metadata."""
    replace, left, n_starts = Path.replace, 0, 0

    def counted(self: Path, target: Path) -> Any:
        nonlocal left
        if not left:
            raise Crash
        left -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    for n in range(0, 60, 2):
        left, n_starts = n, n_starts + 1
        try:
            path = fake.extract(tmp_path, write=write, codec=codec, commit_seconds=0)
            break
        except Crash:
            with pytest.raises(UserError, match=r"is not finished|is no cache|put it back"):
                Cache.open(tmp_path / name_of(codec))
    assert n_starts > 3
    left = 1000
    assert stored_files(path) == alone[codec]


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "write"), WAYS)
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    tmp_path: Path, codec: Codec, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # a child has samples and buckets of the usual size
    whole = stored_files(fake.extract(tmp_path / "whole", codec=codec))
    command = [sys.executable, "-m", "tests.data.fake", str(tmp_path), "0.02", "0/1", write, codec]
    moments, path, n_killed = random.Random(0), tmp_path / name_of(codec), 0
    while not (path / "zarr.json").exists():
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        while process.poll() is None and not path.exists():
            time.sleep(0.001)
        time.sleep(4 + moments.random())
        os.kill(process.pid, signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        if n_killed == 3:
            fake.extract(tmp_path, codec=codec)
    assert stored_files(fake.extract(tmp_path, codec=codec)) == whole


@pytest.mark.parametrize(("codec", "write"), WAYS)
@pytest.mark.parametrize("origin", ["extracted", "converted"])
def test_a_damaged_shard_is_made_again_by_extract_and_the_others_are_left_alone(
    tmp_path: Path, codec: Codec, write: Write, origin: str
) -> None:
    if origin == "extracted":
        path = fake.extract(tmp_path, codec=codec)
    else:
        path = convert(Cache.open(fake.extract(tmp_path)), codec)
    before, codec_before = stored_files(path), Cache.open(path).attributes["codec"]
    shards = sorted(path.glob("*_*/c/*/0/0"))
    (path / "resid_mid/c/1/0/0").unlink()
    cut = path / "mlp_out/c/3/0/0"
    cut.write_bytes(cut.read_bytes()[:-5])
    times = {file: file.stat().st_mtime_ns for file in shards if file.exists() and file != cut}
    with pytest.raises(Crash):  # and this too may be interrupted
        fake.extract(tmp_path, after_block=stop_after(2), write=write, codec=codec)
    model = FakeModel()
    assert fake.extract(tmp_path, model, codec=codec) == path
    assert stored_files(path) == before
    assert Cache.open(path).attributes["codec"] == codec_before
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert model.n_calls <= 21


def test_a_lost_code_is_fitted_again_and_gives_the_same(tmp_path: Path, alone: dict[Codec, dict[str, bytes]]) -> None:
    path = fake.extract(tmp_path, codec=INT8)
    (path / "codec/mlp_out/scale/c/0/0").unlink()
    model = FakeModel()
    fake.extract(tmp_path, model, codec=INT8)
    assert stored_files(path) == alone[INT8]
    assert model.n_calls == 1  # the sample


def test_scales_are_never_mixed_when_a_code_that_cannot_be_fitted_again_is_lost(tmp_path: Path) -> None:
    """Of a converted cache: its sample was another one. All rows of the array are made again, in the new code."""
    raw = Cache.open(fake.extract(tmp_path))
    path = convert(raw, INT8)
    kept = {file: file.read_bytes() for file in path.rglob("resid_mid/c/*/0/0")}
    (path / "codec/mlp_out/offset/c/0/0").unlink()
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(3), codec=INT8)
    fake.extract(tmp_path, codec=INT8)
    cache = Cache.open(path)
    assert not list(problems(path, cache.attributes, lambda n: None))
    code = cache.code("mlp_out")
    assert code is not None
    for shard in raw.shards():
        assert torch.equal(cache.rows("mlp_out", shard.chunk), code.again(raw.rows("mlp_out", shard.chunk)))
    assert {file: file.read_bytes() for file in kept} == kept
    exact = torch.cat([raw.rows("mlp_out", shard.chunk) for shard in raw.shards()]).double()
    seen = torch.cat([cache.rows("mlp_out", shard.chunk) for shard in raw.shards()]).double()
    lost = (seen - exact).square().sum(0) / (exact - exact.mean(0)).square().sum(0)
    np.testing.assert_allclose(cache.attributes["codec"]["mlp_out"]["fvu_by_channel"], lost.numpy(), rtol=1e-9)


@pytest.mark.parametrize("spoil", ["unlink", "flip"])
def test_a_code_that_goes_while_rows_are_written_is_noticed(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]], spoil: str
) -> None:
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(3), codec=INT8)
    file = tmp_path / name_of(INT8) / "codec/resid_mid/scale/c/0/0"
    if spoil == "unlink":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[7] ^= 1
        file.write_bytes(data)
    model = FakeModel()
    assert stored_files(fake.extract(tmp_path, model, codec=INT8)) == alone[INT8]
    assert model.n_calls == 25 - 4 * 3 + 1  # four blocks were done; the same code is fitted again


@pytest.mark.parametrize("codec", COMPRESSED)
def test_compressed_shards_cannot_be_scattered(tmp_path: Path, codec: Codec) -> None:
    with pytest.raises(UserError, match=rf"cache.write=scatter: the size of a {codec} shard is not known.*; use"):
        fake.extract(tmp_path / "cache", write=Write.scatter, codec=codec)
    assert not (tmp_path / "cache").exists()


def test_extraction_and_conversion_do_not_go_on_with_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Cache.open(fake.extract(tmp_path))
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(1), codec=INT8)
    with pytest.raises(
        UserError, match=r"is being made by clt extract, .*; go on with clt extract .*codec=int8 .*, or"
    ):
        convert(raw, INT8)
    path = fake.extract(tmp_path, codec=INT8)
    assert convert(raw, INT8) == path  # there already

    def stop(*arguments: Any) -> None:
        raise Crash

    other = Codec["pcodec"]
    monkeypatch.setattr("pipeline.data.convert.publish", stop)
    with pytest.raises(Crash):
        convert(raw, other)
    with pytest.raises(
        UserError, match=r"clt cache convert, which is not finished; go on with clt cache convert .*pcodec"
    ):
        fake.extract(tmp_path, codec=other)
    monkeypatch.undo()
    convert(raw, other)


@pytest.mark.parametrize("codec", CODECS)
def test_the_disk_holds_no_more_than_the_codec_or_what_is_spilled(
    tmp_path: Path, alone: dict[Codec, dict[str, bytes]], codec: Codec
) -> None:
    """Before sorting: int8 is in its place at its size; what will be compressed waits raw, which is counted before."""
    plan = fake.plan_of(tmp_path, FakeModel(), fake.pack(), "0.0015", 6, 7, codec)
    width = fake.L * fake.D * (1 if codec is INT8 else 2)
    assert plan.bytes_per_token == 2 * width
    with pytest.raises(Crash):
        fake.extract(tmp_path, after_block=stop_after(N_BLOCKS - 1), codec=codec)
    path = tmp_path / name_of(codec)
    sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
    rows = sum(
        size
        for name, size in sizes.items()
        if name.startswith((*STORED, f"{JOURNAL}/spill/resid", f"{JOURNAL}/spill/mlp"))
    )
    if codec is INT8:
        assert rows == 2 * 5 * (49 * width + 4)
    else:
        assert rows == 2 * 244 * (width + 8)
        with Writer(fake.plan_of(tmp_path, FakeModel(), fake.pack(), "0.0015", 6, 7, codec)) as writer:
            assert not writer.todo


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "write"), WAYS)
def test_parts_at_the_same_time_give_the_same_bytes(
    tmp_path: Path, codec: Codec, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes: one fits the codes, the other finds them."""
    monkeypatch.undo()
    whole = stored_files(fake.extract(tmp_path / "whole", codec=codec))
    command = [sys.executable, "-m", "tests.data.fake", str(tmp_path), "0.02"]
    at_work = [subprocess.Popen([*command, f"{i}/2", write, codec], cwd=Path(__file__).parents[2]) for i in range(2)]
    assert [process.wait() for process in at_work] == [0, 0]
    assert stored_files(tmp_path / name_of(codec)) == whole
