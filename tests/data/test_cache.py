import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.data import caches
from pipeline.data.cache import Cache
from pipeline.data.commands import command_of
from pipeline.data.layout import SITES, checksum, directory_of, hierarchy, key_of, request_of
from pipeline.data.layout import Size as S
from pipeline.data.options import DatasetKind, DatasetOptions, Dtype, ModelOptions
from pipeline.data.tokens import Split
from pipeline.errors import UserError
from tests.data import fake
from tests.data.fake import D, FakeModel, L, T, read_everything


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake.extract(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    shutil.copytree(path, tmp_path / path.name)
    return tmp_path / path.name


def activations(split: Split) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Tokens, resid_mid and mlp_out of all rows in the order of the tokens, straight from the model."""
    contexts, n_rows = fake.pack()[split]
    resid_mid, mlp_out = FakeModel().collect(torch.from_numpy(contexts))
    rows = [t[:, 1:].reshape(-1, L, D)[:n_rows].bfloat16() for t in (resid_mid, mlp_out)]
    return contexts[:, 1:].reshape(-1)[:n_rows], rows[0], rows[1]


def test_each_row_holds_what_the_model_computes_for_its_token(path: Path) -> None:
    cache = Cache.open(path)
    tokens, *expected = activations(Split.train)
    context, position, token = cache.locate(np.arange(cache.n_rows))
    t = context * (T - 1) + position - 1
    assert sorted(t) == list(range(len(tokens)))  # a bijection of rows and tokens
    assert (token == tokens[t]).all()
    assert (t != np.arange(len(t))).mean() > 0.9  # and shuffled
    for name, values in zip(("resid_mid", "mlp_out"), expected, strict=True):
        stored = torch.from_numpy(zarr.open_group(path, mode="r")[name][:]).view(torch.bfloat16)
        assert torch.equal(stored, values[t])


def test_plain_zarr_lists_and_reads_every_array_without_a_warning(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(path, mode="r")
        members = dict(group.members(max_depth=None))
        read = {name: member[:] for name, member in members.items() if isinstance(member, zarr.Array)}
    rows = ("tokens", "resid_mid", "mlp_out")
    stats = [f"stats/{site}/{part}" for site in SITES for part in ("mean", "std", "rms")]
    held_out = [f"{split}/{name}" for split in ("calibration", "evaluation") for name in rows]
    assert sorted(read) == sorted([*rows, *held_out, *stats, "norm/gain", "norm/bias"])
    assert members["resid_mid"].metadata.dimension_names == ("row", "layer", "d_model")
    assert members["tokens"].metadata.dimension_names == ("context", "position")
    assert members["resid_mid"].attrs["logical_dtype"] == "bfloat16"
    assert (read["tokens"] == fake.pack()[Split.train].contexts).all()
    assert read["resid_mid"].shape == (244, L, D)
    assert group.attrs["norm"] == {"kind": "layer", "eps": 1e-5}
    assert group.attrs["hooks"]["resid_mid"] == "blocks.{l}.ln2.hook_in"


def test_a_shard_is_one_plain_file_and_the_padding_of_the_last_is_zero(path: Path) -> None:
    cache = Cache.open(path)
    shards = cache.shards()
    assert [(shard.first, shard.n_rows) for shard in shards] == [(0, 49), (49, 49), (98, 49), (147, 49), (196, 48)]
    last = (path / "resid_mid/c/4/0/0").read_bytes()
    assert len(last) == 49 * L * D * 2 + 4
    assert last[48 * L * D * 2 : -4] == bytes(L * D * 2)
    assert cache.map_chunk("resid_mid", 4).shape == (48, L, D)
    assert cache.read_chunk("resid_mid", 4, np.empty((49, L, D), "<u2")).shape == (48, L, D)


def test_held_out_splits_stand_in_the_order_of_their_tokens(path: Path) -> None:
    cache = Cache.open(path)
    for split in (Split.calibration, Split.evaluation):
        contexts, resid_mid, mlp_out = cache.held_out(split)
        _, *expected = activations(split)
        assert (contexts == fake.pack()[split].contexts).all()
        assert torch.equal(resid_mid, expected[0])
        assert torch.equal(mlp_out, expected[1])


def test_the_first_rows_of_a_held_out_split_are_read_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(fake.extract(tmp_path, shard_mb="0.0003"))  # chunks of 8 and of 9 rows
    read: list[tuple[str, int]] = []
    chunk_of = Cache.read_chunk
    monkeypatch.setattr(
        Cache,
        "read_chunk",
        lambda self, name, chunk, out: read.append((name, chunk)) or chunk_of(self, name, chunk, out),
    )
    for split in (Split.calibration, Split.evaluation):
        spec = cache.specs[f"{split}/mlp_out"]
        whole = cache.held_out(split)[1:]
        for n in (1, spec.chunk_rows, min(spec.chunk_rows + 1, spec.shape[0]), spec.shape[0] + 5):
            read.clear()
            first = cache.held_out_rows(split, n)
            assert all(torch.equal(rows, all_rows[:n]) for rows, all_rows in zip(first, whole, strict=True))
            chunks = -(-min(n, spec.shape[0]) // spec.chunk_rows)
            assert sorted(read) == sorted(
                (f"{split}/{name}", i) for name in ("resid_mid", "mlp_out") for i in range(chunks)
            )


def test_statistics_are_those_of_the_stored_numbers(path: Path) -> None:
    cache = Cache.open(path)
    _, resid_mid, mlp_out = activations(Split.train)
    norm = FakeModel().mlp_norm()
    resid = resid_mid.double()
    centred = resid - resid.mean(-1, keepdim=True)
    normed = centred / (resid.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    values = {"resid_mid": resid, "mlp_in": normed * norm.gain + norm.bias, "mlp_out": mlp_out.double()}
    for site, x in values.items():
        mean, std, rms = cache.stats(site)
        assert mean.dtype == torch.float64
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if site == "mlp_in" else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(mean, x.mean(0), **tolerance)
        torch.testing.assert_close(std, x.std(0, unbiased=False), **tolerance)
        torch.testing.assert_close(rms, x.square().mean((0, 2)).sqrt(), **tolerance)


def test_the_norm_comes_back_as_it_was(path: Path) -> None:
    norm, expected = Cache.open(path).norm, FakeModel().mlp_norm()
    assert (norm.kind, norm.eps) == (expected.kind, expected.eps)
    assert torch.equal(norm.gain, expected.gain)
    assert torch.equal(norm.bias, expected.bias)


def test_what_made_a_cache_stands_in_it(path: Path) -> None:
    cache = Cache.open(path)
    assert (cache.n_rows, cache.n_layers, cache.d_model, cache.context) == (244, L, D, T)
    assert cache.model["weights_sha256"] == "weights 1.0"
    assert cache.model["dtype"] == "float32"
    assert len(cache.dataset["fingerprint"]) == 64
    assert cache.key == key_of(fake.request(seed=7))
    assert cache.path.name == f"fake-text-{cache.key}"
    assert cache.attributes["versions"]["zarr"] == zarr.__version__
    assert cache.n_bytes == sum(
        f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name not in ("zarr.json", ".manifest")
    )


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, lambda file: file.write_bytes(file.read_bytes() + b"x")])
@pytest.mark.parametrize(
    "name", ["resid_mid/c/2/0/0", "tokens/c/0/0", "stats/mlp_in/rms/c/0", "evaluation/mlp_out/c/0/0/0"]
)
def test_a_damaged_chunk_is_refused_with_its_name_and_the_command_that_mends_it(
    copy: Path, name: str, harm: Callable[[Path], None]
) -> None:
    read_everything(copy)
    harm(copy / name)
    with pytest.raises(UserError) as refusal:
        read_everything(copy)
    message = str(refusal.value)
    assert name in message or f"chunk {name.split('/c/')[1][0]} of {name.split('/c/')[0]} " in message
    assert command_of(fake.request(seed=7), copy.parent) in message
    assert "\n" not in message


def test_reading_into_a_buffer_finds_the_same_damage(copy: Path) -> None:
    cache = Cache.open(copy)
    buffer = np.empty((49, L, D), "<u2")
    flip(copy / "mlp_out/c/1/0/0")
    with pytest.raises(UserError, match=r"rm .*mlp_out/c/1/0/0 && clt extract"):
        cache.read_chunk("mlp_out", 1, buffer)
    truncate(copy / "mlp_out/c/2/0/0")
    with pytest.raises(UserError, match="chunk 2 of mlp_out is truncated"):
        cache.read_chunk("mlp_out", 2, buffer)
    (copy / "mlp_out/c/3/0/0").unlink()
    with pytest.raises(UserError, match="chunk 3 of mlp_out is missing"):
        cache.map_chunk("mlp_out", 3)


def test_damaged_metadata_is_refused(copy: Path) -> None:
    flip(copy / "stats/zarr.json")
    with pytest.raises(UserError, match=r"stats/zarr\.json is missing or damaged; make it again: clt extract"):
        Cache.open(copy)


def edit(path: Path, **attributes: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= attributes
    root["attributes"]["checksum"] = checksum(root["attributes"])
    (path / "zarr.json").write_text(json.dumps(root))


def test_a_cache_of_another_schema_is_refused(copy: Path) -> None:
    edit(copy, schema=0)
    with pytest.raises(UserError, match=r"has schema 0, this version reads 1; .*clt extract"):
        Cache.open(copy)


def test_changed_attributes_are_noticed(copy: Path) -> None:
    edit(copy, seed=7)  # rewriting them is not damage
    Cache.open(copy)
    text = (copy / "zarr.json").read_text()
    for wrong in (text.replace('"seed": 7', '"seed": 8'), text[:-20]):
        assert wrong != text
        (copy / "zarr.json").write_text(wrong)
        with pytest.raises(UserError, match=r"zarr\.json is damaged"):
            Cache.open(copy)


def test_a_directory_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "other")
    with pytest.raises(UserError, match="no cache of this program"):
        Cache.open(tmp_path / "other")
    with pytest.raises(UserError, match="make one with clt extract"):
        Cache.open(tmp_path / "nothing")


MODEL = ModelOptions("local", "org/model", revision="abc")
TEXT = DatasetOptions("text", DatasetKind.text, "400k", context=16)


@pytest.fixture
def text(tmp_path: Path) -> DatasetOptions:
    (tmp_path / "text.txt").write_text("Some words.\n")
    return DatasetOptions("text", DatasetKind.text, "400k", path=str(tmp_path / "text.txt"), context=16)


def changed(options: DatasetOptions, **fields: object) -> DatasetOptions:
    return DatasetOptions(**(vars(options) | fields))


def test_the_key_names_the_request_and_not_how_it_is_carried_out(text: DatasetOptions) -> None:
    key = key_of(request_of(MODEL, text))
    other_device = ModelOptions("local", "org/model", revision="abc", device="cuda:1", default_dataset="world")
    assert key_of(request_of(other_device, text)) == key
    assert key_of(request_of(MODEL, changed(text, n_tokens="400000"))) == key
    assert key_of(request_of(MODEL, changed(text, skip_tokens="00"))) == key
    assert "skip_tokens" not in request_of(MODEL, text)["dataset"]  # keys from before there was the option
    skipping = key_of(request_of(MODEL, changed(text, skip_tokens="1k")))
    assert key_of(request_of(MODEL, changed(text, skip_tokens="1000"))) == skipping
    others = [
        request_of(ModelOptions("local", "org/model", revision="abd"), text),
        request_of(ModelOptions("local", "org/model", revision="abc", dtype=Dtype.bfloat16), text),
        *(request_of(MODEL, changed(text, **{field: value})) for field, value in OTHER.items()),
    ]
    assert key not in {key_of(other) for other in others}
    Path(str(text.path)).write_text("Other words.\n")
    assert key_of(request_of(MODEL, text)) != key


OTHER = {"n_tokens": "400001", "context": 17, "held_out": 1, "seed": 1, "skip_tokens": "17"}


def test_find_gives_the_cache_or_the_command_that_makes_it(text: DatasetOptions, tmp_path: Path, copy: Path) -> None:
    request = request_of(MODEL, text)
    with pytest.raises(
        UserError, match=r"does not exist; run: clt extract model=local model\.path=org/model .*cache\.dir="
    ):
        caches.find(tmp_path, MODEL, text)
    edit(copy, request=request)
    copy.rename(directory_of(tmp_path, request))
    assert caches.find(tmp_path, MODEL, text).key == key_of(request)
    assert caches.with_key(tmp_path, key_of(request), request).key == key_of(request)
    (directory_of(tmp_path, request) / "zarr.json").rename(tmp_path / "aside")
    (directory_of(tmp_path, request) / "tokens/.manifest").unlink()
    (directory_of(tmp_path, request) / ".journal").mkdir()
    with pytest.raises(UserError, match="is not finished; run: clt extract"):
        caches.find(tmp_path, MODEL, text)


def test_the_newest_cache_is_the_one_made_last_that_can_be_used(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert caches.newest(tmp_path / "nowhere") is None
    for name, created in (("a", "2026-01-03"), ("b", "2026-01-02"), ("c", "2026-01-04")):
        shutil.copytree(copy, tmp_path / name)
        edit(tmp_path / name, created=created)
    shutil.rmtree(copy)
    (tmp_path / "c/resid_mid/c/0/0/0").unlink()
    newest = caches.newest(tmp_path)
    assert newest is not None
    assert newest.path == tmp_path / "a"
    assert "passed over" in caplog.text


@pytest.mark.parametrize(
    ("n_rows", "shape", "shard_mb", "rows", "n_shards"),
    [
        (400_000, (4, 128), "auto", 30_770, 13),  # the world: 31,250 kB of at most 32 MB, as equal as can be
        (10_000_000, (12, 768), "auto", 1820, 5495),  # GPT-2 small: 1,820 rows are 32 MB
        (50_000_000, (12, 768), "auto", 3640, 13_737),  # 64 MB
        (100_000_000, (12, 768), "auto", 7281, 13_735),  # 128 MB, since 64 MB would be 27,473 shards
        (1000, (4, 128), "auto", 1000, 1),  # no larger than what there is
        (1000, (4, 128), "0.1", 100, 10),
        (10, (4, 128), "0.0001", 1, 10),
    ],
)
def test_shards_are_equally_long_and_within_the_size_that_is_asked_for(
    n_rows: int, shape: tuple[int, int], shard_mb: str, rows: int, n_shards: int
) -> None:
    spec = hierarchy(*shape, 64, dict.fromkeys(Split, S(-(-n_rows // 63), n_rows)), shard_mb)["resid_mid"]
    assert (spec.chunk_rows, spec.n_chunks) == (rows, n_shards)
    assert (n_shards - 1) * rows < n_rows <= n_shards * rows


@pytest.mark.parametrize("wrong", ["", "0", "-1", "32MB", "0.0000001"])
def test_a_shard_size_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(UserError, match="use auto or a number of MB"):
        hierarchy(4, 128, 64, dict.fromkeys(Split, S(10, 630)), wrong)
