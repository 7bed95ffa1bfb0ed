import itertools
import shutil
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import loader as module
from pipeline.data.cache import Cache
from pipeline.data.loader import Loader
from pipeline.data.options import Read
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data import fake

MODES = [Read.mmap, Read.readinto]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache.open(fake.extract(tmp_path_factory.mktemp("cache")))


def stored(cache: Cache, name: str) -> torch.Tensor:
    """All rows, from the files."""
    shards = [np.array(cache.map_chunk(name, shard.chunk)) for shard in cache.shards()]
    return torch.from_numpy(np.concatenate(shards)).view(torch.bfloat16)


def rows_of(loader: Loader, n_batches: int) -> list[list[int]]:
    return [batch.rows.tolist() for batch in islice(loader, n_batches)]


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("batch_tokens", [1, 10, 49, 100, 244, 600])
def test_a_batch_holds_the_rows_that_it_names(cache: Cache, read: Read, batch_tokens: int) -> None:
    expected = stored(cache, "resid_mid"), stored(cache, "mlp_out")
    with Loader(cache, batch_tokens, seed=0, read=read) as loader:
        for batch in islice(loader, 60):
            assert batch.resid_mid.shape == (batch_tokens, fake.L, fake.D)
            assert batch.resid_mid.dtype == torch.bfloat16
            assert torch.equal(batch.resid_mid, expected[0][batch.rows])
            assert torch.equal(batch.mlp_out, expected[1][batch.rows])


@pytest.mark.parametrize("batch_tokens", [1, 7, 61, 100, 500])
def test_every_row_comes_exactly_once_an_epoch(cache: Cache, batch_tokens: int) -> None:
    n = cache.n_rows
    with Loader(cache, batch_tokens, seed=3) as loader:
        stream = list(itertools.chain(*rows_of(loader, -(-3 * n // batch_tokens))))
    epochs = [stream[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_goes_shard_by_shard_in_orders_of_its_own(cache: Cache) -> None:
    """244 rows in shards of 49: what is read from disk together is used together, and no order is used twice."""
    with Loader(cache, 1, seed=0) as loader:
        stream = np.array(list(itertools.chain(*rows_of(loader, 2 * 244))))
    runs = [[shard for shard, _ in itertools.groupby(epoch // 49)] for epoch in (stream[:244], stream[244:])]
    assert sorted(runs[0]) == sorted(runs[1]) == [0, 1, 2, 3, 4]
    assert runs[0] != runs[1]
    first = [epoch[epoch // 49 == 0].tolist() for epoch in (stream[:244], stream[244:])]
    assert first[0] != first[1] != sorted(first[1])


def test_the_order_follows_from_the_seed(cache: Cache) -> None:
    def order(seed: int) -> list[list[int]]:
        with Loader(cache, 50, seed) as loader:
            return rows_of(loader, 8)

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("start", [0, 1, 3, 4, 5, 11, 60])
def test_starting_at_a_batch_is_skipping_those_before_it(cache: Cache, read: Read, start: int) -> None:
    with Loader(cache, 61, seed=5, read=read) as whole, Loader(cache, 61, seed=5, read=read, start=start) as late:
        expected = rows_of(whole, start + 9)[start:]
        assert late.position == start
        assert rows_of(late, 9) == expected
        assert late.position == start + 9


def test_both_ways_of_reading_give_the_same_batches(cache: Cache) -> None:
    with Loader(cache, 33, 0, read=Read.mmap) as mapped, Loader(cache, 33, 0, read=Read.readinto) as copied:
        for a, b in islice(zip(mapped, copied, strict=True), 40):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("ahead", [2, 4, 9])  # 9: more than there are shards
def test_reading_further_ahead_gives_the_same_batches(cache: Cache, read: Read, ahead: int) -> None:
    with Loader(cache, 33, 0, read=read) as one, Loader(cache, 33, 0, read=read, shards_ahead=ahead) as more:
        for a, b in islice(zip(one, more, strict=True), 40):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_shards_ahead_are_refused(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"cache\.shards_ahead=0.*; use 1 or more"):
        Loader(cache, 33, 0, shards_ahead=0)


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("ahead", [1, 4])
def test_buffers_are_few_and_used_again(cache: Cache, read: Read, ahead: int) -> None:
    row, shard = 2 * fake.L * fake.D * 2, 49 * 2 * fake.L * fake.D * 2
    with Loader(cache, 20, 0, read=read, shards_ahead=ahead) as loader:
        addresses = {batch.resid_mid.data_ptr() for batch in islice(loader, 100)}
        assert len(addresses) == module.BATCHES_AHEAD + 1 == 3
        shards = ahead + 1 if read is Read.readinto else 0
        assert loader.buffer_bytes == 3 * 20 * (row + 8) + shards * shard


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(cache: Cache) -> None:
    with Loader(cache, 20, 0, read=Read.readinto) as loader:
        for batch in islice(loader, 30):
            before = [t.clone() for t in batch]
            for future in [*loader._gatherer._coming]:  # let the threads do all that they may
                future.exception(timeout=10)
            assert all(torch.equal(a, b) for a, b in zip(batch, before, strict=True))


@pytest.mark.parametrize("read", MODES)
def test_a_damaged_shard_reaches_the_one_who_asks(cache: Cache, tmp_path: Path, read: Read) -> None:
    path = tmp_path / cache.path.name
    shutil.copytree(cache.path, path)
    broken = path / "mlp_out/c/3/0/0"
    data = bytearray(broken.read_bytes())
    data[7] ^= 8
    broken.write_bytes(data)
    with Loader(Cache.open(path), 49, 0, read=read) as loader:
        with pytest.raises(UserError, match=r"mlp_out/c/3/0/0 does not hold what was written .* && clt extract"):
            rows_of(loader, 6)
        with pytest.raises(RuntimeError, match="failed before"):  # and it does not look like the end of the data
            rows_of(loader, 6)


@pytest.mark.parametrize("read", MODES)
def test_a_shard_that_goes_while_training_is_named(cache: Cache, tmp_path: Path, read: Read) -> None:
    path = tmp_path / cache.path.name
    shutil.copytree(cache.path, path)
    with Loader(Cache.open(path), 49, 0, read=read) as loader:
        rows_of(loader, 6)
        shutil.rmtree(path / "resid_mid")
        with pytest.raises(UserError, match=r"chunk \d of resid_mid is missing"):
            rows_of(loader, 20)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader-")]


def test_closing_ends_the_threads(cache: Cache) -> None:
    before = threads()
    loader = Loader(cache, 10, 0)
    next(loader)
    assert len(threads()) == len(before) + 2
    loader.close()
    assert threads() == before


@pytest.mark.parametrize(("more", "expected"), [(0, Read.mmap), (-1, Read.readinto)])
def test_auto_maps_what_fits_into_free_memory(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, more: int, expected: Read
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: cache.n_bytes + more)
    with Loader(cache, 10, 0) as loader:
        assert loader.read is expected


def test_free_memory_is_asked_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 24 < module.available_memory() < 1 << 50
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert 1 << 24 < module.available_memory() < 1 << 50


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """1,200 contexts of 32 rows, in 8 shards."""
    sizes = {Split.train: (1200, 0), Split.calibration: (1, 0), Split.evaluation: (1, 0)}
    packed = fake.pack(sizes=sizes, context=33)
    directory = tmp_path_factory.mktemp("long")
    cache = Cache.open(fake.extract(directory, packed=packed, shard_mb="0.14", block_contexts=600, batch_tokens=4096))
    assert len(cache.shards()) == 8
    return cache


def pairs(context: np.ndarray) -> int:
    """Pairs of rows that come from the same context."""
    counts = np.bincount(context)
    return int((counts * (counts - 1) // 2).sum())


def batches_of(cache: Cache, batch_tokens: int, n_epochs: int) -> Iterator[np.ndarray]:
    with Loader(cache, batch_tokens, seed=0) as loader:
        for batch in islice(loader, n_epochs * cache.n_rows // batch_tokens):
            yield batch.rows.numpy()


def test_batches_mix_contexts_as_an_ideal_shuffle_does(long_cache: Cache) -> None:
    """Two rows of a batch come from the same of C contexts with probability (W-1) / (CW-1)."""
    width, batch_tokens = 32, 1024
    found = [pairs(long_cache.locate(rows)[0]) for rows in batches_of(long_cache, batch_tokens, n_epochs=4)]
    ideal = batch_tokens * (batch_tokens - 1) / 2 * (width - 1) / (1200 * width - 1)
    assert abs(np.mean(found) / ideal - 1) < 0.025  # standard error 0.004
    # what an order by context would give, to show that the measure can tell
    assert pairs(np.arange(batch_tokens) // width) > 30 * ideal
