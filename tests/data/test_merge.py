"""Merged caches: the rows of their parts in one order, and what cannot be merged."""

import itertools
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from pipeline.data import caches, inventory
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.convert import convert
from pipeline.data.inventory import State
from pipeline.data.layout import SITES, STORED, checksum, directory_of
from pipeline.data.loader import Loader
from pipeline.data.mergeable import hash_rows
from pipeline.data.merged import Merged
from pipeline.data.merging import merge
from pipeline.data.options import Codec, Read
from pipeline.data.tokens import Packed, Split
from pipeline.errors import UserError
from tests.data import fake

MODES = [Read.mmap, Read.readinto]
CODECS = [Codec.raw, Codec["int8"]]


def sliced(packed: dict[Split, Packed], start: int, stop: int) -> dict[Split, Packed]:
    """Some of the training contexts, all of them full, with the same held-out ones."""
    contexts = packed[Split.train].contexts[start:stop]
    return packed | {Split.train: Packed(contexts, contexts.shape[0] * (contexts.shape[1] - 1))}


def text(n: int, context: int = fake.T) -> dict[Split, Packed]:
    """Full contexts."""
    return fake.pack(sizes={Split.train: (n, 0), Split.calibration: (4, 0), Split.evaluation: (3, 0)}, context=context)


WHOLE = text(60)
CUTS = [0, 35, 46, 60]
"""210, 66 and 84 rows."""


def parts_in(folder: Path, codec: Codec = Codec.raw) -> list[Cache]:
    """Three parts of WHOLE, with shards of 42, 33 and 84 rows."""
    made = []
    for i, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        size = ["0.0015", "0.0011", "0.003"][i]
        path = fake.extract(folder, packed=sliced(WHOLE, start, stop), shard_mb=size, seed=20 + i)
        made.append(Cache.open(path if codec is Codec.raw else convert(Cache.open(path), codec)))
    return made


@pytest.fixture(scope="module", params=CODECS, ids=str)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("merged")
    cache = Cache.open(merge(parts_in(folder, request.param), folder))
    assert isinstance(cache, Merged)
    return cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three parts and nothing else."""
    folder = tmp_path_factory.mktemp("parts")
    parts_in(folder)
    return folder


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> list[Cache]:
    """Copies of them under tmp_path / cache, in order."""
    shutil.copytree(made, tmp_path / "cache")
    found = [Cache.open(file.parent) for file in (tmp_path / "cache").glob("*/zarr.json")]
    return sorted(found, key=lambda cache: int(cache.attributes["seed"]))


def stored(cache: Merged, name: str) -> torch.Tensor:
    """Rows of all parts, one part after the other."""
    chunks = [part.rows(name, shard.chunk) for part in cache.parts for shard in part.shards()]
    return torch.cat(chunks)


def rows_of(loader: Loader, n_batches: int) -> list[list[int]]:
    return [batch.rows.tolist() for batch in islice(loader, n_batches)]


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("batch_tokens", [1, 33, 100, 360, 500])
def test_a_batch_holds_the_rows_of_the_parts_that_it_names(merged: Merged, read: Read, batch_tokens: int) -> None:
    expected = stored(merged, "resid_mid"), stored(merged, "mlp_out")
    with Loader(merged, batch_tokens, seed=0, read=read) as loader:
        for batch in islice(loader, max(3, min(40, 2000 // batch_tokens))):
            assert torch.equal(batch.resid_mid, expected[0][batch.rows])
            assert torch.equal(batch.mlp_out, expected[1][batch.rows])


@pytest.mark.parametrize("read", MODES)
def test_every_row_comes_exactly_once_an_epoch(merged: Merged, read: Read) -> None:
    assert merged.n_rows == 360
    with Loader(merged, 36, seed=3, read=read) as loader:
        stream = list(itertools.chain(*rows_of(loader, 30)))
    epochs = [stream[i * 360 : (i + 1) * 360] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(360))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("read", MODES)
@pytest.mark.parametrize("start", [1, 5, 6, 29])
def test_starting_at_a_batch_is_skipping_those_before_it(merged: Merged, read: Read, start: int) -> None:
    with Loader(merged, 61, seed=5, read=read) as whole, Loader(merged, 61, seed=5, read=read, start=start) as late:
        assert rows_of(late, 9) == rows_of(whole, start + 9)[start:]


def test_the_two_ways_of_reading_and_reading_ahead_give_the_same_batches(merged: Merged) -> None:
    with (
        Loader(merged, 33, 0, read=Read.mmap) as mapped,
        Loader(merged, 33, 0, read=Read.readinto, shards_ahead=3) as read,
    ):
        for a, b in islice(zip(mapped, read, strict=True), 40):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_group_has_a_share_of_every_part_by_the_documented_rule(merged: Merged) -> None:
    shards, n_groups = merged.shards(), merged.attributes["n_groups"]
    assert len(shards) == n_groups == sum(len(part.shards()) for part in merged.parts) == 8
    first = [0, 210, 276, 360]
    for g, shard in enumerate(shards):
        expected = [
            first[p] + row
            for p, n in enumerate([210, 66, 84])
            for row in range(n * g // n_groups, n * (g + 1) // n_groups)
        ]
        assert shard.rows(np.arange(shard.n_rows)).tolist() == expected


def test_rows_find_their_context_position_and_token(merged: Merged) -> None:
    """The model is a formula of token and position, so a wrong place shows in the values."""
    assert np.array_equal(merged.tokens, WHOLE[Split.train].contexts)
    rows = np.random.default_rng(0).permutation(360)
    context, position, token = merged.locate(rows)
    assert np.array_equal(token, merged.tokens[context, position])
    assert sorted(zip(context.tolist(), position.tolist(), strict=True)) == [
        (c, p) for c in range(60) for p in range(1, fake.T)
    ]
    resid_mid, mlp_out = fake.FakeModel().collect(torch.from_numpy(merged.tokens).long())
    for name, expected in (("resid_mid", resid_mid), ("mlp_out", mlp_out)):
        assert (stored(merged, name)[rows].float() - expected[context, position]).abs().max() < 0.05
    for wrong in (-1, 360):
        with pytest.raises(IndexError):
            merged.locate(np.array([wrong]))


def test_merged_parts_are_what_one_extraction_of_the_whole_text_is(parts: list[Cache], tmp_path: Path) -> None:
    merged = Cache.open(merge(parts, tmp_path / "cache"))
    assert isinstance(merged, Merged)
    whole = Cache.open(fake.extract(tmp_path / "whole", packed=WHOLE))
    for site in SITES:
        for a, b in zip(merged.stats(site), whole.stats(site), strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12, atol=1e-12)
    for a, b in zip(merged.norm, whole.norm, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    for split in (Split.calibration, Split.evaluation):
        for mine, theirs in zip(merged.held_out(split), whole.held_out(split), strict=True):
            assert np.array_equal(torch.as_tensor(mine).float(), torch.as_tensor(theirs).float())
    for name in STORED:
        by_row = torch.cat([whole.rows(name, shard.chunk) for shard in whole.shards()])
        assert torch.equal(in_text_order(merged, stored(merged, name)), in_text_order(whole, by_row))


def in_text_order(cache: Cache, rows: torch.Tensor) -> torch.Tensor:
    context, position, _ = cache.locate(np.arange(cache.n_rows))
    return rows[np.lexsort((position, context))]


def pairs(context: np.ndarray) -> int:
    counts = np.bincount(context)
    return int((counts * (counts - 1) // 2).sum())


@pytest.fixture(scope="module")
def long_merged(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """700 and 300 contexts of 32 rows."""
    packed, folder = text(1000, context=33), tmp_path_factory.mktemp("long")
    parts = []
    for i, (start, stop) in enumerate([(0, 700), (700, 1000)]):
        path = fake.extract(folder, packed=sliced(packed, start, stop), shard_mb="0.14", seed=i, batch_tokens=4096,
                            block_contexts=600)  # fmt: skip
        parts.append(Cache.open(path))
    return Cache.open(merge(parts, folder))


@pytest.mark.parametrize("read", MODES)
def test_batches_mix_contexts_of_all_parts_as_an_ideal_shuffle_does(long_merged: Cache, read: Read) -> None:
    """Two rows of a batch come from the same of C contexts with probability (W-1) / (CW-1)."""
    width, batch_tokens, found, shares = 32, 1024, [], []
    with Loader(long_merged, batch_tokens, seed=0, read=read) as loader:
        for batch in islice(loader, 8 * long_merged.n_rows // batch_tokens):
            context = long_merged.locate(batch.rows.numpy())[0]
            found.append(pairs(context))
            shares.append(np.mean(context < 700))
    ideal = batch_tokens * (batch_tokens - 1) / 2 * (width - 1) / (1000 * width - 1)
    assert abs(np.mean(found) / ideal - 1) < 0.02  # standard error 0.003
    assert abs(np.mean(shares) - 0.7) < 0.001
    assert 0.6 < min(shares) < max(shares) < 0.8


def test_held_out_contexts_of_all_parts_stand_there_once(tmp_path: Path) -> None:
    """Part 1 has two evaluation contexts that part 0 has as well, and two of its own, in two shards' order."""
    first, second = text(20), fake.pack(seed=1)
    second[Split.train] = Packed(second[Split.train].contexts[:11], 66)
    shared = first[Split.evaluation].contexts[:2]
    mixed = np.concatenate([second[Split.evaluation].contexts[:1], shared, second[Split.evaluation].contexts[1:2]])
    second[Split.evaluation] = Packed(mixed, 4 * (fake.T - 1))
    a, b = (Cache.open(fake.extract(tmp_path, packed=packed, seed=i)) for i, packed in enumerate([first, second]))
    merged = Cache.open(merge([a, b], tmp_path))
    contexts, resid_mid, mlp_out = merged.held_out(Split.evaluation)
    expected = np.concatenate([first[Split.evaluation].contexts, mixed[[0, 3]]])
    assert np.array_equal(contexts, expected)
    values = fake.FakeModel().collect(torch.from_numpy(expected).long(), first=1)
    for seen, value in zip((resid_mid, mlp_out), values, strict=True):
        assert torch.equal(seen, value.reshape(-1, fake.L, fake.D).bfloat16())
    assert len(merged.held_out(Split.calibration)[0]) == 8
    assert merged.attributes["n_rows"] == {"train": 186, "calibration": 48, "evaluation": 30}


def test_nothing_is_copied_and_zarr_opens_what_it_has_of_its_own(parts: list[Cache], tmp_path: Path) -> None:
    before = {part.path: fake.stored_files(part.path) for part in parts}
    path = merge(parts, tmp_path / "cache")
    assert path.name.startswith("fake-merged-")
    group = zarr.open_group(path, mode="r")
    assert sorted(group) == ["calibration", "evaluation", "norm", "stats"]
    assert group["evaluation/resid_mid"].shape == (18, fake.L, fake.D)
    assert np.array_equal(group["stats/mlp_in/mean"][:], Cache.open(path).stats("mlp_in")[0].numpy())
    assert [part["path"] for part in group.attrs["parts"]] == [part.path.name for part in parts]
    assert {part.path: fake.stored_files(part.path) for part in parts} == before
    assert not [place for place in (tmp_path / "cache").iterdir() if place.name.startswith(".")]


def test_merging_again_says_that_it_is_there_and_merged_ones_are_taken_apart(
    parts: list[Cache], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    root = tmp_path / "cache"
    path = merge(parts, root, name="all")
    assert path == root / "all"
    before = fake.stored_files(path)
    assert merge(parts, root) == merge(parts, root, name="other") == path
    assert "already there" in caplog.text
    two = merge(parts[:2], root)
    assert merge([Cache.open(two), parts[2]], root) == path
    assert merge([parts[0], parts[2]], root) not in {path, two}
    (path / "norm/gain/c/0/0").unlink()
    with pytest.raises(
        UserError, match=r"chunk 0 of norm/gain is missing; make it again: clt cache merge .* --name all"
    ):
        Cache.open(path)
    assert merge(parts, root) == path
    assert fake.stored_files(path) == before


def test_a_merged_cache_is_found_by_its_key_and_as_the_newest(parts: list[Cache], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    merged = Cache.open(merge(parts, root, name="all"))
    newest = caches.newest(root)
    assert newest is not None
    assert newest.path == merged.path
    assert caches.with_key(root, merged.key, merged.request).path == merged.path
    assert inventory.find(root, merged.key[:6]).path == merged.path
    shutil.rmtree(merged.path)
    names = " ".join(part.path.name for part in parts)
    with pytest.raises(UserError, match=f"does not exist; run: clt cache merge {names} --cache-dir {root}"):
        caches.with_key(root, merged.key, merged.request)


def test_parts_elsewhere_are_named_by_their_whole_path(parts: list[Cache], tmp_path: Path) -> None:
    path = merge(parts, tmp_path / "elsewhere")
    assert [part["path"] for part in Cache.open(path).attributes["parts"]] == [str(part.path) for part in parts]
    names = " ".join(str(part.path) for part in parts)
    assert command_of(Cache.open(path).request, path.parent) == f"clt cache merge {names} --cache-dir {path.parent}"
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"its part {parts[0].path} is missing; make it again: clt extract"):
        Cache.open(path)


def test_a_directory_of_caches_can_be_moved(parts: list[Cache], tmp_path: Path) -> None:
    path = merge(parts, tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert Cache.open(tmp_path / "moved" / path.name).n_rows == 360


def damaged(part: Path) -> str:
    (part / "mlp_out/c/1/0/0").unlink()
    return f"its part cannot be read: {part}: chunk 1 of mlp_out is missing; make it again: clt extract "


def missing(part: Path) -> str:
    shutil.rmtree(part)
    return f"its part {part} is missing; make it again: clt extract "


def another(part: Path) -> str:
    fake.extract(part.parent / "x", packed=sliced(WHOLE, 0, 40)).rename(part.parent / "y")
    shutil.rmtree(part)
    (part.parent / "y").rename(part)
    return f"its part {part} is another than was merged; merge again: clt cache merge "


@pytest.mark.parametrize("harm", [damaged, missing, another])
def test_a_part_that_is_not_what_was_merged_is_named(
    parts: list[Cache], tmp_path: Path, harm: Callable[[Path], str]
) -> None:
    path = merge(parts, tmp_path / "cache")
    expected = harm(parts[0].path)
    with pytest.raises(UserError) as error:
        Cache.open(path)
    assert str(error.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(error.value)
    found = inventory.look(path)
    assert found is not None
    assert (found.state, found.detail) == (State.damaged, str(error.value).removeprefix(f"{path}: "))


def test_a_part_that_was_mended_is_still_the_one_that_was_merged(parts: list[Cache], tmp_path: Path) -> None:
    path = merge(parts, tmp_path / "cache")
    (parts[2].path / "mlp_out/c/0/0/0").unlink()
    fake.extract(tmp_path / "cache", packed=sliced(WHOLE, *CUTS[2:]), shard_mb="0.003", seed=22)
    assert Cache.open(parts[2].path).attributes["created"] != parts[2].attributes["created"]
    assert Cache.open(path).n_rows == 360


@pytest.mark.parametrize("read", MODES)
def test_a_flipped_bit_of_a_part_is_found_when_a_piece_of_its_chunk_is_read(
    parts: list[Cache], tmp_path: Path, read: Read
) -> None:
    path = merge(parts, tmp_path / "cache")
    broken = parts[1].path / "resid_mid/c/1/0/0"
    data = bytearray(broken.read_bytes())
    data[-5] ^= 1
    broken.write_bytes(data)
    with (
        Loader(Cache.open(path), 30, 0, read=read) as loader,
        pytest.raises(UserError, match=r"resid_mid/c/1/0/0 does not hold what was written .* && clt extract"),
    ):
        rows_of(loader, 12)


def edit(part: Cache, **changes: Any) -> Cache:
    """A part that says other things of itself: key=value, or key__inner=value."""
    file = part.path / "zarr.json"
    root = json.loads(file.read_bytes())
    about = root["attributes"]
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        about[outer] = about[outer] | {inner: value} if inner else value
    about["checksum"] = checksum(about)
    file.write_text(json.dumps(root))
    return Cache.open(part.path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model__weights_sha256": "x"}, "weights of the model"),
        ({"model__revision": "main"}, "revision of the model"),
        ({"model__tokenizer_sha256": "x"}, "tokenizer"),
        ({"model__layers": [1, 4]}, "layers"),
        ({"model__dtype": "bfloat16"}, r"arithmetic \(model.dtype\)"),
        ({"hooks__mlp_out": "x"}, "hooks"),
        ({"norm__eps": 1e-6}, "norm"),
        ({"bos_token_id": None}, r"token at position 0 \(dataset.bos\)"),
    ],
)
def test_parts_that_differ_in_more_than_their_text_are_refused(
    parts: list[Cache], tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    other = edit(parts[1], **changes)
    with pytest.raises(UserError, match=f"{other.path} and {parts[0].path} differ in the {what}: .*; merge caches"):
        merge([parts[0], other], tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_other_contexts_and_codecs_are_refused(parts: list[Cache], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    longer = Cache.open(fake.extract(root, packed=text(9, context=9), seed=3))
    with pytest.raises(UserError, match=r"differ in the context length \(dataset.context\): 9 and 7"):
        merge([parts[0], longer], root)
    int8 = Cache.open(convert(parts[1], Codec["int8"]))
    with pytest.raises(UserError, match=r"differ in the codec \(clt cache convert\): int8 and raw"):
        merge([parts[0], int8], root)
    small = [Cache.open(convert(part, Codec["blosc-lz4-bitshuffle"])) for part in parts[:2]]
    with pytest.raises(UserError, match=r"no range of rows can be read; convert the parts first: clt cache convert"):
        merge(small, root)


def test_too_few_parts_and_the_same_part_twice_are_refused(parts: list[Cache], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    for few in ([], parts[:1]):
        with pytest.raises(UserError, match="one cache is nothing to merge; name two or more"):
            merge(few, root)
    both = Cache.open(merge(parts[:2], root))
    for twice in ([parts[0], parts[1], parts[0]], [both, parts[1]], [both, both]):
        with pytest.raises(UserError, match="is named twice, or is a part of a merged cache that is named"):
            merge(twice, root)
    for name in ("", ".", "..", "a/b", ".hidden", str(tmp_path)):
        with pytest.raises(UserError, match="not the name of a directory"):
            merge(parts, root, name=name)
    with pytest.raises(UserError, match="exists and is another cache; choose another name"):
        merge(parts, root, name=both.path.name)


def test_contexts_in_several_parts_are_counted_and_taken_when_allowed(parts: list[Cache], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    again = Cache.open(fake.extract(root, packed=sliced(WHOLE, 40, 48), seed=3))
    with pytest.raises(UserError, match=r"8 training contexts of .* would be trained on twice; .*--allow-repeats"):
        merge([*parts, again], root)
    merged = Cache.open(merge([*parts, again], root, allow_repeats=True))
    assert merged.n_rows == 360 + 48
    assert command_of(merged.request, root).endswith(f"{again.path.name} --allow-repeats --cache-dir {root}")
    assert merge(parts, root, allow_repeats=True) == merge(parts, root)  # where there are none it changes nothing


@pytest.mark.parametrize(
    ("mine", "theirs", "what"),
    [
        (Split.train, Split.evaluation, "trained on"),
        (Split.train, Split.calibration, "trained on"),
        (Split.calibration, Split.evaluation, "held out for calibration"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_contexts_that_another_part_holds_out_are_refused_always(
    parts: list[Cache], tmp_path: Path, mine: Split, theirs: Split, what: str, swapped: bool
) -> None:
    other = fake.pack(seed=5, sizes={Split.train: (8, 0), Split.calibration: (4, 0), Split.evaluation: (3, 0)})
    other[mine].contexts[1:3] = WHOLE[theirs].contexts[:2]
    seen = Cache.open(fake.extract(tmp_path / "cache", packed=other, seed=3))
    both = [seen, parts[0]] if swapped else [parts[0], seen]
    match = f"2 contexts that {parts[0].path} holds out are {what} in {seen.path}; metrics would"
    with pytest.raises(UserError, match=match):
        merge(both, tmp_path / "cache", allow_repeats=True)


def test_the_hash_of_contexts_sees_every_token_and_its_place() -> None:
    contexts = np.random.default_rng(0).integers(0, 3, (5000, 6), dtype=np.int32)
    n_distinct = len(np.unique(contexts, axis=0))
    assert len(np.unique(hash_rows(contexts))) == n_distinct
    assert hash_rows(contexts[:7]).tolist() == hash_rows(contexts)[:7].tolist()


def test_a_plain_cache_keeps_its_order_of_batches(tmp_path: Path) -> None:
    """Rows of a run that is continued: this order was there before there were merged caches."""
    with Loader(Cache.open(fake.extract(tmp_path)), 61, seed=5) as loader:
        batches = rows_of(loader, 12)
    assert batches[0][:10] == [52, 88, 75, 49, 96, 72, 80, 81, 65, 90]
    assert batches[9][:10] == [77, 89, 94, 50, 70, 86, 49, 82, 87, 91]
    assert directory_of(tmp_path, fake.request(seed=7)).exists()
