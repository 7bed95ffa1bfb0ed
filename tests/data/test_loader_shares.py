"""The ranks that share the tokens: together they hand out what one process does, in its order."""

import itertools
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.data import loader as module
from pipeline.data.address import Local, Remote
from pipeline.data.cache import Cache
from pipeline.data.convert import convert
from pipeline.data.loader import Batch, Loader
from pipeline.data.merging import merge
from pipeline.data.options import Codec, Read
from pipeline.data.transfer import copy
from pipeline.dist.share import Share
from pipeline.errors import UserError
from tests.data import fake
from tests.data.s3 import Server

RAW = Codec.raw


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """244 rows in shards of 52, the last with 36."""
    return Cache.open(fake.extract(tmp_path_factory.mktemp("cache")))


def shares(count: int, parts: int) -> list[Share]:
    return [Share(index, count, parts) for index in range(count)]


def copied(batch: Batch) -> list[Tensor]:
    return [tensor.clone() for tensor in batch if tensor is not None]


def assert_the_union_is_the_whole(
    cache: Cache, batch_tokens: int, count: int, parts: int, n_batches: int, start: int = 0, read: Read = Read.auto
) -> None:
    """Tensor by tensor, part by part, the ranks' slices one after the other."""
    with Loader(cache, batch_tokens, 3, read, start) as loader:
        expected = [copied(batch) for batch in islice(loader, n_batches)]
    taken = []
    for share in shares(count, parts):
        with Loader(cache, batch_tokens, 3, read, start, share=share) as loader:
            taken.append([copied(batch) for batch in islice(loader, n_batches)])
    for whole, *held in zip(expected, *taken, strict=True):
        for tensor, *pieces in zip(whole, *held, strict=True):
            slices = [piece.unflatten(0, (parts, -1)) for piece in pieces]
            in_order = [piece[part] for part in range(parts) for piece in slices]
            assert torch.equal(torch.cat(in_order), tensor)


@pytest.mark.parametrize(("read", "start"), [(Read.mmap, 0), (Read.mmap, 60), (Read.readinto, 5)])
@pytest.mark.parametrize(
    ("batch_tokens", "count", "parts"), [(10, 2, 1), (61, 3, 1), (60, 4, 3), (600, 3, 2), (3, 3, 1), (49, 5, 7)]
)
def test_together_the_ranks_hand_out_the_batches_of_one_process(
    cache: Cache, batch_tokens: int, count: int, parts: int, read: Read, start: int
) -> None:
    assert_the_union_is_the_whole(cache, batch_tokens, count, parts, 12, start, read)


@pytest.mark.parametrize("codec", list(Codec), ids=str)
def test_so_they_do_with_every_codec(cache: Cache, codec: Codec) -> None:
    converted = cache if codec is RAW else Cache.open(convert(cache, codec))
    assert_the_union_is_the_whole(converted, 50, 3, 2, 11)


@pytest.mark.parametrize("codec", [RAW, Codec["int8"]], ids=str)
def test_so_they_do_on_a_merged_cache(tmp_path: Path, codec: Codec) -> None:
    parts = [Cache.open(fake.extract(tmp_path, packed=fake.pack(seed), seed=seed)) for seed in (1, 2)]
    if codec is not RAW:
        parts = [Cache.open(convert(part, codec)) for part in parts]
    merged = Cache.open(merge(parts, tmp_path))
    for read in (Read.mmap, Read.readinto):
        assert_the_union_is_the_whole(merged, 52, 3, 2, 21, 2, read)


def test_so_they_do_on_a_remote_cache(cache: Cache, s3: Server, tmp_path: Path) -> None:
    assert isinstance(cache.path, Path)
    place = Remote(f"s3://bucket/{tmp_path.name}/{cache.path.name}", Local(tmp_path / "local", 10**8))
    assert copy(cache.path, place)
    assert_the_union_is_the_whole(Cache.open(place), 50, 3, 2, 11)


@pytest.mark.parametrize(("batch_tokens", "count", "parts"), [(10, 4, 1), (61, 3, 1), (60, 4, 3), (500, 3, 2)])
def test_of_all_ranks_together_each_row_comes_once_an_epoch(
    cache: Cache, batch_tokens: int, count: int, parts: int
) -> None:
    """However the batches cut the epochs."""
    n_batches = -(-3 * cache.n_rows // batch_tokens)
    streams = []
    for share in shares(count, parts):
        with Loader(cache, batch_tokens, 0, share=share) as loader:
            streams.append([batch.rows.reshape(parts, -1).tolist() for batch in islice(loader, n_batches)])
    stream = [
        row
        for batch in range(n_batches)
        for part in range(parts)
        for row in itertools.chain(*(held[batch][part] for held in streams))
    ]
    for epoch in range(3):
        assert sorted(stream[epoch * cache.n_rows : (epoch + 1) * cache.n_rows]) == list(range(cache.n_rows))


def test_buffers_are_as_large_as_the_share(cache: Cache) -> None:
    row = 2 * fake.L * fake.D * 2 + 8
    with Loader(cache, 60, 0, Read.mmap, share=Share(2, 4, 3)) as loader:
        assert next(loader).resid_mid.shape == (15, fake.L, fake.D)
        assert loader.buffer_bytes == (module.BATCHES_AHEAD + 1) * 15 * row


def test_a_share_without_rows_is_refused_before_anything_is_read(cache: Cache) -> None:
    with pytest.raises(UserError, match=r"train\.batch_tokens=6 in train\.accumulate=2 parts of 3 .* 4 data ranks"):
        Loader(cache, 6, 0, share=Share(0, 4, 2))
